import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow as tf

from efficientnet.errors import ConfigError
from efficientnet.numerics.optimizers import OPTIMIZERS, lars, make_optimizer, rmsprop, sgd, treatment
from efficientnet.numerics.precision import POLICIES, policy
from efficientnet.numerics.schedules import warmup_schedule
from efficientnet.numerics.stochastic_rounding import apply_updates
from efficientnet.parallel.packing import make_packing

KEY = jax.random.key(5)
SCHEDULE = warmup_schedule('polynomial', peak=2.0, total_steps=60, warmup_steps=12)
# Names, and whether the LARS of the paper and reference adapts them.
SHAPES = {
    'stem/conv/kernel': ((3, 3, 3, 8), True),
    'stem/norm/scale': ((8,), False),
    'stem/norm/bias': ((8,), False),
    'block1a/proxy_bias': ((8,), False),
    'block1a/bias_scale/kernel': ((8, 4), True),  # only a parameter's own name counts
    'head/dense/kernel': ((40, 20), True),  # four rows, the last of them nearly empty
    'head/dense/bias': ((5,), False),
}


def tree_of(flat):
    tree = {}
    for name, x in flat.items():
        *folders, leaf = name.split('/')
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = x
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


PACKING = make_packing(tree_of(random_params()))
PADDING = np.asarray(PACKING.pack(tree_of(random_params()), jnp.float32))[0] == 0


def pack(flat, dtype=jnp.float32):
    return make_packing(tree_of(flat)).pack(tree_of(flat), dtype)[0]


def unpack(rows):
    return flat_of(PACKING.unpack(np.asarray(rows)[None]))


def once(build, flat_grads, flat_params, dtype=jnp.float32, **options):
    """Updates of the first step of an optimizer, by name."""
    packing = make_packing(tree_of(flat_params))
    transform, params = build(packing=packing, **options), pack(flat_params, dtype)
    updates, _ = jax.jit(transform.update)(pack(flat_grads), transform.init(params), params)
    assert updates.dtype == jnp.float32
    return flat_of(packing.unpack(np.asarray(updates)[None]))


def run(transform, params, steps=60):
    """Weights after each of a number of updates."""
    rows = pack(params)
    state, update = transform.init(rows), jax.jit(transform.update)
    for step in range(steps):
        updates, state = update(pack(random_grads(step)), state, rows)
        rows = apply_updates(rows, updates)
        assert not np.asarray(rows)[PADDING].any()
        yield unpack(rows)


def run_optax(transform, params, steps=60):
    """The same of a transformation of trees."""
    tree = tree_of(params)
    state, update = transform.init(tree), jax.jit(transform.update)
    for step in range(steps):
        updates, state = update(tree_of(random_grads(step)), state, tree)
        tree = optax.apply_updates(tree, updates)
        yield flat_of(tree)


def is_treated(what):
    """A mask for optax, by `treatment`."""
    return tree_of({name: getattr(treatment(name), what) for name in SHAPES})


def rate_in_float64(n):
    return 2.0 * n / 12 if n <= 12 else (2.0 - 2e-5) * (1 - (n - 12) / 48) ** 2 + 2e-5


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize(('weight_decay', 'eps'), [(0.0, 0.0), (2.5e-6, 0.0), (0.05, 0.0), (0.05, 0.3)])
def test_lars_against_float64(weight_decay, eps, nesterov):
    """Sixty updates of warm-up and decay: a rate outside the momentum buffer ends elsewhere."""
    eta, mu = 0.02, 0.885
    w = {name: x.astype(np.float64) for name, x in random_params().items()}
    m = {name: np.zeros_like(x) for name, x in w.items()}
    transform = lars(SCHEDULE, PACKING, mu, weight_decay, eta, eps, nesterov)
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
    """For that array only: its neighbours among the rows keep their own."""
    params, grads, name = random_params(), random_grads(0), 'head/dense/kernel'
    usual = once(lars, grads, params, learning_rate=0.5, weight_decay=0.1)
    if zero != 'gradients':
        params[name] = np.zeros_like(params[name])
    if zero != 'weights':
        grads[name] = np.zeros_like(grads[name])
    found = once(lars, grads, params, learning_rate=0.5, weight_decay=0.1)
    np.testing.assert_allclose(found[name], -0.5 * (grads[name] + 0.1 * params[name]), rtol=1e-6)
    for other in set(SHAPES) - {name}:
        np.testing.assert_array_equal(found[other], usual[other])


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_lars_norms_do_not_overflow(dtype):
    """|w| = 64,000 · 24 has no fp16, nor have its squares; a small gradient's squares vanish in fp16."""
    w, g = np.full((576,), 64_000.0, dtype), np.full((576,), 1e-6, np.float32)
    found = once(lars, {'kernel': g}, {'kernel': w}, dtype, learning_rate=1.0, trust_coefficient=0.001)
    np.testing.assert_allclose(found['kernel'], -0.001 * w.astype(np.float32), rtol=1e-5)


def test_lars_keeps_an_overflow_to_its_array():
    grads = random_grads(0)
    usual = once(lars, grads, random_params(), learning_rate=1.0)
    grads['stem/conv/kernel'][0] = np.inf
    found = once(lars, grads, random_params(), learning_rate=1.0)
    assert not np.isfinite(found['stem/conv/kernel']).all()
    for other in set(SHAPES) - {'stem/conv/kernel'}:
        np.testing.assert_array_equal(found[other], usual[other])


def test_lars_norms_of_many_rows():
    """A million numbers beside a single one, in fp32, to a few units in the last place."""
    rng = np.random.default_rng(3)
    params = {'big/kernel': rng.normal(size=(1000, 1001)).astype(np.float32), 'one/kernel': np.ones((1,), np.float32)}
    grads = {name: rng.normal(size=w.shape).astype(np.float32) for name, w in params.items()}
    found = once(lars, grads, params, learning_rate=1.0)
    for name, w in params.items():
        ratio = 0.001 * np.linalg.norm(w.astype(np.float64)) / np.linalg.norm(grads[name].astype(np.float64))
        np.testing.assert_allclose(found[name], -ratio * grads[name], rtol=3e-6)


def test_lars_is_not_the_one_of_optax():
    """Other excluded parameters, and another denominator as soon as weight decay is not tiny."""
    params, grads = tree_of(random_params()), tree_of(random_grads(0))

    def theirs(weight_decay, **options):
        transform = optax.lars(1.0, weight_decay, trust_coefficient=0.001, momentum=0.9, **options)
        return flat_of(jax.jit(transform.update)(grads, transform.init(params), params)[0])

    ours = once(lars, random_grads(0), random_params(), learning_rate=1.0, weight_decay=0.05)
    for name, (_, adapted) in SHAPES.items():
        ratio = np.linalg.norm(ours[name]) / np.linalg.norm(theirs(0.05)[name])
        assert 0.8 < ratio < 0.95 if adapted else ratio > 100
    # With a mask, and without weight decay, the two agree: nothing else differs.
    ours, theirs = (
        once(lars, random_grads(0), random_params(), learning_rate=1.0),
        theirs(0.0, trust_ratio_mask=is_treated('adapted')),
    )
    for name in SHAPES:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_rmsprop_is_tensorflows(momentum):
    params = random_params()
    rate = tf.Variable(0.0)
    variables = {name: tf.Variable(x) for name, x in params.items()}
    theirs = tf.compat.v1.train.RMSPropOptimizer(rate, decay=0.953125, momentum=momentum, epsilon=1e-3)
    for step, found in enumerate(run(rmsprop(SCHEDULE, PACKING, 0.953125, momentum, 1e-3), params, steps=30)):
        rate.assign(rate_in_float64(step + 1))
        theirs.apply_gradients([(tf.constant(g), variables[name]) for name, g in random_grads(step).items()])
        for name, variable in variables.items():
            np.testing.assert_allclose(found[name], variable.numpy(), rtol=1e-4, atol=1e-4)


def test_rmsprop_decays_kernels_and_proxies_only():
    params, decay = random_params(), 0.1
    (plain,) = run(rmsprop(1e-3, PACKING), params, steps=1)
    (found,) = run(rmsprop(1e-3, PACKING, weight_decay=decay), params, steps=1)
    for name, w in params.items():
        g = random_grads(0)[name].astype(np.float64)
        if name.endswith(('/kernel', '/proxy_bias')):
            g = g + decay * w
            assert not np.array_equal(found[name], plain[name])
        else:
            np.testing.assert_array_equal(found[name], plain[name])
        expected = w - 1e-3 * g / np.sqrt(0.9 + 0.1 * g**2 + 1e-3)
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6)


def test_rmsprop_starts_at_one_and_does_not_move_the_padding():
    transform = rmsprop(0.1, PACKING, weight_decay=0.1)
    rows = pack(random_params())
    state = transform.init(rows)
    np.testing.assert_array_equal(state.mean_square, np.ones(PACKING.shape))
    for step in range(3):
        _, state = transform.update(pack(random_grads(step)), state, rows)
        assert not np.asarray(state.momentum)[PADDING].any()


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_is_the_usual_one(nesterov):
    params = random_params()
    theirs = optax.chain(optax.add_decayed_weights(0.05, is_treated('decayed')), optax.sgd(0.1, 0.9, nesterov))
    ours = sgd(0.1, PACKING, 0.9, nesterov, weight_decay=0.05)
    for a, b in zip(run(ours, params, 20), run_optax(theirs, params, 20), strict=True):
        for name in params:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5)


def test_sgd_rate_is_outside_the_buffer():
    seen = []

    def schedule(n):
        seen.append(n)
        return jnp.where(n == 2, 0.0, 1.0).astype(jnp.float32)

    rows = pack({'kernel': np.ones((2,))})
    transform = sgd(schedule, make_packing({'kernel': np.ones((2,))}), momentum=0.5)
    state, updates = transform.init(rows), []
    for _ in range(3):
        u, state = transform.update(rows, state, rows)
        updates.append(float(u[0, 0]))
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
    assert treatment(name) == treatment(f'bias/scale/{name}') == (adapted, decayed)


@pytest.mark.parametrize('name', list(OPTIMIZERS))
@pytest.mark.parametrize('chosen', list(POLICIES))
def test_every_optimizer_under_every_policy(name, chosen):
    """Formats as the table says, unchanged by an update, weights near those of fp32, and zeros in the padding."""
    formats = policy(chosen)
    transform = make_optimizer(name, 0.01, formats, 'stochastic', KEY, PACKING, momentum=0.9, weight_decay=1e-4)
    reference = OPTIMIZERS[name](0.01, PACKING, momentum=0.9, weight_decay=1e-4)
    params = pack(random_params(), formats.master)
    exact = params.astype(jnp.float32)
    state, exact_state = transform.init(params), reference.init(exact)
    assert {x.dtype for x in jax.tree.leaves(state)} == {formats.state, jnp.dtype(jnp.int32)}
    step = jax.jit(transform.update)
    for n in range(5):
        grads = pack(random_grads(n))
        updates, after = step(grads, state, params)
        same = jax.tree.map(lambda a, b: (a.dtype, a.shape) == (b.dtype, b.shape), after, state)
        assert jax.tree.all(same)
        params, state = apply_updates(params, updates), after
        exact_updates, exact_state = reference.update(grads, exact_state, exact)
        exact = apply_updates(exact, exact_updates)
    atol = {2: 0.06 if formats.master == jnp.bfloat16 else 0.008, 4: 1e-6}[formats.master.itemsize]
    assert params.dtype == formats.master
    np.testing.assert_allclose(params.astype(jnp.float32), exact, atol=atol, rtol=1e-5)
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
    (momentum,) = (x for path, x in leaves.items() if path.endswith('.momentum'))
    for rows in (params, momentum):
        assert not np.asarray(rows, np.float32)[PADDING].any()


@pytest.mark.parametrize('name', list(OPTIMIZERS))
def test_a_stage_updates_as_the_whole(name):
    """Norms, rates and rounding are per array and name: slicing the tree changes no bit."""

    def final(blocks):
        part = lambda flat: {n: x for n, x in flat.items() if n.split('/')[0] in blocks}  # noqa: E731
        packing, rows = make_packing(tree_of(part(random_params()))), pack(part(random_params()), jnp.float16)
        transform = make_optimizer(name, SCHEDULE, policy('16.16'), 'stochastic', KEY, packing, momentum=0.9)
        state, update = transform.init(rows), jax.jit(transform.update)
        for step in range(3):
            updates, state = update(pack(part(random_grads(step))), state, rows)
            rows = apply_updates(rows, updates)
        return packing.unpack(np.asarray(rows)[None])

    whole = final(('stem', 'block1a', 'head'))
    for blocks in (('stem', 'head'), ('block1a',)):
        for block, tree in final(blocks).items():
            jax.tree.map(np.testing.assert_array_equal, tree, whole[block])


@pytest.mark.parametrize('name', list(OPTIMIZERS))
def test_programs_do_not_grow_with_the_number_of_arrays(name):
    """What is handed to XLA has as many operations for 30 arrays of several sizes as for 3."""

    def sizes(arrays):
        owns = ('kernel', 'bias', 'proxy_bias')
        packing = make_packing(tree_of({f'{i}/{owns[i % 3]}': np.ones((3, 200 + 40 * i)) for i in range(arrays)}))
        assert len(packing.names) == arrays
        transform = make_optimizer(name, SCHEDULE, policy('16.16'), 'stochastic', KEY, packing, weight_decay=0.1)
        rows = jax.ShapeDtypeStruct(packing.shape, jnp.float32)
        state = jax.eval_shape(transform.init, rows)
        programs = jax.jit(transform.init).lower(rows), jax.jit(transform.update).lower(rows, state, rows)
        return [len(program.as_text().splitlines()) for program in programs]

    assert sizes(3) == sizes(30)
    assert sizes(3)[1] < 2500


def test_overflow_of_stored_state_shows():
    flat = {'kernel': np.ones((2,))}
    transform = make_optimizer('rmsprop', 0.1, policy('16.16'), 'nearest', KEY, make_packing(flat))
    rows = pack(flat, jnp.float16)
    _, state = transform.update(pack({'kernel': np.asarray([1.0, 1e4])}), transform.init(rows), rows)
    assert jnp.isinf(state[0].inner.mean_square[0, :3]).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ('name', 'options', 'rounding', 'match'),
    [
        ('adam', {}, 'nearest', r"optimizer\.name='adam'.*lars, rmsprop, sgd"),
        ('sgd', {'trust_coefficient': 0.1}, 'nearest', r'optimizer\.trust_coefficient.*sgd.*momentum, nesterov'),
        ('lars', {}, 'up', r"precision\.rounding='up'"),
        ('rmsprop', {'eps': 0.0}, 'nearest', r'optimizer\.epsilon=0\.0 must be above 0 for rmsprop'),
        ('rmsprop', {'eps': -1e-3}, 'nearest', r'optimizer\.epsilon=-0\.001 must be above 0'),
    ],
)
def test_mistakes(name, options, rounding, match):
    with pytest.raises(ConfigError, match=match):
        make_optimizer(name, 0.1, policy('16.16'), rounding, KEY, PACKING, **options)
