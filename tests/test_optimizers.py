import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow as tf

from efficientnet.errors import ConfigError
from efficientnet.optimizers import OPTIMIZERS, lars, make_optimizer, rmsprop, sgd, treatment
from efficientnet.precision import POLICIES, policy
from efficientnet.schedules import warmup_schedule
from efficientnet.stochastic_rounding import apply_updates

KEY = jax.random.key(5)
SCHEDULE = warmup_schedule('polynomial', peak=2.0, total_steps=60, warmup_steps=12)
# Names, and whether the LARS of the paper and reference adapts them.
SHAPES = {
    'stem/conv/kernel': ((3, 3, 3, 8), True),
    'stem/norm/scale': ((8,), False),
    'stem/norm/bias': ((8,), False),
    'block1a/proxy_bias': ((8,), False),
    'block1a/bias_scale/kernel': ((8, 4), True),  # only a parameter's own name counts
    'head/dense/kernel': ((8, 5), True),
    'head/dense/bias': ((5,), False),
}


def tree_of(flat):
    tree = {}
    for name, x in flat.items():
        *folders, leaf = name.split('/')
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jnp.asarray(x)
    return tree


def flat_of(tree):
    return {
        '/'.join(key.key for key in path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in SHAPES.items()}


def random_grads(step):
    rng = np.random.default_rng(1000 + step)
    return {name: (rng.normal(size=shape) * 0.3).astype(np.float32) for name, (shape, _) in SHAPES.items()}


def run(transform, params, steps=60):
    """Weights after each of a number of updates."""
    params, state = tree_of(params), None
    state = transform.init(params)
    update = jax.jit(transform.update)
    for step in range(steps):
        updates, state = update(tree_of(random_grads(step)), state, params)
        params = apply_updates(params, updates)
        yield flat_of(params)


def rate_in_float64(n):
    return 2.0 * n / 12 if n <= 12 else (2.0 - 2e-5) * (1 - (n - 12) / 48) ** 2 + 2e-5


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize(('weight_decay', 'eps'), [(0.0, 0.0), (2.5e-6, 0.0), (0.05, 0.0), (0.05, 0.3)])
def test_lars_against_float64(weight_decay, eps, nesterov):
    """Sixty updates of warm-up and decay: a rate outside the momentum buffer ends elsewhere."""
    eta, mu = 0.02, 0.885
    w = {name: x.astype(np.float64) for name, x in random_params().items()}
    m = {name: np.zeros_like(x) for name, x in w.items()}
    transform = lars(SCHEDULE, mu, weight_decay, eta, eps, nesterov)
    for step, found in enumerate(run(transform, random_params())):
        rate = rate_in_float64(step + 1)
        for name, (_, adapted) in SHAPES.items():
            g = random_grads(step)[name].astype(np.float64)
            delta = rate * g
            if adapted:
                w_norm, g_norm = np.linalg.norm(w[name]), np.linalg.norm(g)
                trust = eta * w_norm / (g_norm + weight_decay * w_norm + eps)
                delta = rate * trust * (g + weight_decay * w[name])
            m[name] = mu * m[name] + delta
            w[name] = w[name] - (mu * m[name] + delta if nesterov else m[name])
            np.testing.assert_allclose(found[name], w[name], rtol=2e-4, atol=2e-4 * np.abs(w[name]).max())


@pytest.mark.parametrize('zero', ['weights', 'gradients', 'both'])
def test_lars_trust_ratio_is_one_if_a_norm_is_zero(zero):
    w = jnp.zeros((3, 2)) if zero != 'gradients' else jnp.ones((3, 2))
    g = jnp.zeros((3, 2)) if zero != 'weights' else jnp.full((3, 2), 0.25)
    transform = lars(0.5, weight_decay=0.1)
    updates, _ = transform.update({'kernel': g}, transform.init({'kernel': w}), {'kernel': w})
    np.testing.assert_allclose(updates['kernel'], -0.5 * (g + 0.1 * w), rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_lars_norms_do_not_overflow(dtype):
    """|w| = 64,000 · 8 has no fp16, nor have its squares; a small gradient's squares vanish in fp16."""
    w, g = jnp.full((64,), 64_000.0, dtype), jnp.full((64,), 1e-6)
    transform = lars(1.0, trust_coefficient=0.001)
    updates, _ = transform.update({'kernel': g}, transform.init({'kernel': w}), {'kernel': w})
    assert updates['kernel'].dtype == jnp.float32
    np.testing.assert_allclose(updates['kernel'], -0.001 * w.astype(jnp.float32), rtol=1e-5)


def test_lars_is_not_the_one_of_optax():
    """Other excluded parameters, and another denominator as soon as weight decay is not tiny."""
    params, grads = tree_of(random_params()), tree_of(random_grads(0))
    ours, theirs = (
        flat_of(t.update(grads, t.init(params), params)[0])
        for t in (lars(1.0, 0.9, 0.05), optax.lars(1.0, 0.05, trust_coefficient=0.001, momentum=0.9))
    )
    for name, (_, adapted) in SHAPES.items():
        ratio = np.linalg.norm(ours[name]) / np.linalg.norm(theirs[name])
        assert 0.8 < ratio < 0.95 if adapted else ratio > 100
    # With a mask, and without weight decay, the two agree: nothing else differs.
    mask = jax.tree_util.tree_map_with_path(lambda path, _: treatment(path[-1].key).adapted, params)
    theirs = optax.lars(1.0, 0.0, trust_coefficient=0.001, momentum=0.9, trust_ratio_mask=mask)
    ours = lars(1.0, 0.9)
    for a, b in zip(
        *(jax.tree.leaves(t.update(grads, t.init(params), params)[0]) for t in (ours, theirs)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_rmsprop_is_tensorflows(momentum):
    params = random_params()
    rate = tf.Variable(0.0)
    variables = {name: tf.Variable(x) for name, x in params.items()}
    theirs = tf.compat.v1.train.RMSPropOptimizer(rate, decay=0.953125, momentum=momentum, epsilon=1e-3)
    for step, found in enumerate(run(rmsprop(SCHEDULE, 0.953125, momentum, 1e-3), params, steps=30)):
        rate.assign(rate_in_float64(step + 1))
        theirs.apply_gradients([(tf.constant(g), variables[name]) for name, g in random_grads(step).items()])
        for name, variable in variables.items():
            np.testing.assert_allclose(found[name], variable.numpy(), rtol=1e-4, atol=1e-4)


def test_rmsprop_decays_kernels_and_proxies_only():
    params, decay = random_params(), 0.1
    (plain,) = run(rmsprop(1e-3), params, steps=1)
    (found,) = run(rmsprop(1e-3, weight_decay=decay), params, steps=1)
    for name, w in params.items():
        g = random_grads(0)[name].astype(np.float64)
        if name.endswith(('/kernel', '/proxy_bias')):
            g = g + decay * w
            assert not np.array_equal(found[name], plain[name])
        else:
            np.testing.assert_array_equal(found[name], plain[name])
        expected = w - 1e-3 * g / np.sqrt(0.9 + 0.1 * g**2 + 1e-3)
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_is_the_usual_one(nesterov):
    params = random_params()
    mask = jax.tree_util.tree_map_with_path(lambda path, _: treatment(path[-1].key).decayed, tree_of(params))
    theirs = optax.chain(optax.add_decayed_weights(0.05, mask), optax.sgd(0.1, 0.9, nesterov))
    ours = sgd(0.1, 0.9, nesterov, weight_decay=0.05)
    for a, b in zip(run(ours, params, 20), run(theirs, params, 20), strict=True):
        for name in params:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5)


def test_sgd_rate_is_outside_the_buffer():
    seen = []
    transform = sgd(lambda n: jnp.asarray(seen.append(n) or jnp.where(n == 2, 0.0, 1.0), jnp.float32), momentum=0.5)
    params, g = {'kernel': jnp.ones((2,))}, {'kernel': jnp.ones((2,))}
    state, updates = transform.init(params), []
    for _ in range(3):
        u, state = transform.update(g, state, params)
        updates.append(float(u['kernel'][0]))
    assert updates == [-1.0, 0.0, -1.75]
    assert [int(n) for n in seen] == [1, 2, 3]
    assert seen[0].dtype == jnp.int32


@pytest.mark.parametrize(
    ('name', 'adapted', 'decayed'),
    [
        ('kernel', True, True),
        ('bias', False, False),
        ('scale', False, False),
        ('proxy_scale', False, True),
        ('proxy_bias', False, True),
        ('biases', True, True),
    ],
)
def test_treatment(name, adapted, decayed):
    assert treatment(name) == (adapted, decayed)


@pytest.mark.parametrize('name', list(OPTIMIZERS))
@pytest.mark.parametrize('chosen', list(POLICIES))
def test_every_optimizer_under_every_policy(name, chosen):
    """Formats as the table says, unchanged by an update, and weights near those of fp32."""
    formats = policy(chosen)
    transform = make_optimizer(name, 0.01, formats, 'stochastic', KEY, momentum=0.9, weight_decay=1e-4)
    reference = OPTIMIZERS[name](0.01, momentum=0.9, weight_decay=1e-4)
    params = jax.tree.map(lambda w: w.astype(formats.master), tree_of(random_params()))
    exact = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    state, exact_state = transform.init(params), reference.init(exact)
    assert {x.dtype for x in jax.tree.leaves(state)} == {formats.state, jnp.dtype(jnp.int32)}
    step = jax.jit(transform.update)
    for n in range(5):
        updates, after = step(tree_of(random_grads(n)), state, params)
        same = jax.tree.map(lambda a, b: (a.dtype, a.shape) == (b.dtype, b.shape), after, state)
        assert jax.tree.all(same)
        params, state = apply_updates(params, updates), after
        exact_updates, exact_state = reference.update(tree_of(random_grads(n)), exact_state, exact)
        exact = apply_updates(exact, exact_updates)
    atol = {2: 0.06 if formats.master == jnp.bfloat16 else 0.008, 4: 1e-6}[formats.master.itemsize]
    for w, e in zip(jax.tree.leaves(params), jax.tree.leaves(exact), strict=True):
        assert w.dtype == formats.master
        np.testing.assert_allclose(w.astype(jnp.float32), e, atol=atol, rtol=1e-5)


@pytest.mark.parametrize('name', list(OPTIMIZERS))
def test_a_stage_updates_as_the_whole(name):
    """Norms, rates and rounding are per array and name: slicing the tree changes no bit."""
    transform = make_optimizer(name, SCHEDULE, policy('16.16'), 'stochastic', KEY, momentum=0.9)
    whole = jax.tree.map(lambda w: w.astype(jnp.float16), tree_of(random_params()))
    part = {name: whole[name] for name in ('stem', 'head')}
    whole_state, part_state = transform.init(whole), transform.init(part)
    update = jax.jit(transform.update)
    for step in range(3):
        grads = tree_of(random_grads(step))
        updates, whole_state = update(grads, whole_state, whole)
        whole = apply_updates(whole, updates)
        updates, part_state = update({name: grads[name] for name in part}, part_state, part)
        part = apply_updates(part, updates)
    for block, tree in part.items():
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), tree, whole[block]))


def test_overflow_of_stored_state_shows():
    transform = make_optimizer('rmsprop', 0.1, policy('16.16'), 'nearest', KEY)
    params = {'kernel': jnp.ones((2,), jnp.float16)}
    _, state = transform.update({'kernel': jnp.asarray([1.0, 1e4])}, transform.init(params), params)
    assert jnp.isinf(state[0].inner.mean_square['kernel']).tolist() == [False, True]


@pytest.mark.parametrize(
    ('name', 'options', 'rounding', 'match'),
    [
        ('adam', {}, 'nearest', r"optimizer\.name='adam'.*lars, rmsprop, sgd"),
        ('sgd', {'trust_coefficient': 0.1}, 'nearest', r'optimizer\.trust_coefficient.*sgd.*momentum, nesterov'),
        ('lars', {}, 'up', r"precision\.rounding='up'"),
    ],
)
def test_mistakes(name, options, rounding, match):
    with pytest.raises(ConfigError, match=match):
        make_optimizer(name, 0.1, policy('16.16'), rounding, KEY, **options)
