"""Rounding as transformations of packed arrays: where updates land, whose bits are drawn, what is stored."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficientnet.errors import ConfigError
from efficientnet.numerics.optimizers import rmsprop
from efficientnet.numerics.stochastic_rounding import (
    apply_updates,
    round_updates,
    row_bits,
    stochastic_round,
    store_state_as,
)
from efficientnet.parallel.packing import ROW, make_packing

FORMATS = [jnp.float16, jnp.bfloat16]
KEY = jax.random.key(11)
rounded = jax.jit(stochastic_round, static_argnums=1)
SHAPES = {'stem': (3, 3, 3, 8), 'block1a': (40, 30), 'block2a': (7,), 'head': ()}
TREE = {
    block: {'conv': {'kernel': np.random.default_rng(2).normal(size=shape) * 0.1}, 'bias': np.full((5,), 0.01)}
    for block, shape in SHAPES.items()
}
PACKING = make_packing(TREE)
STAGES = [['stem'], ['block1a', 'head'], ['block2a', 'head']]


def patterns(x):
    return np.asarray(x).view(np.uint16)


def packing_of(numbers):
    return make_packing({'w': np.zeros((numbers,))})


def pack(tree, dtype):
    return make_packing(tree).pack(jax.tree.map(jnp.asarray, tree), dtype)[0]


def random_updates(seed=0, size=1e-4):
    """Of the whole tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * np.float32(size), TREE)


def bits_equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def test_bits_are_uniform_and_rows_differ():
    packing = make_packing({'a': np.zeros((20_000,)), 'b': np.zeros((20_000,))})
    bits = np.asarray(row_bits(KEY, 'weights', packing))
    assert bits.shape == packing.shape
    assert bits.dtype == np.uint16
    assert len(np.unique(bits, axis=0)) == len(bits)
    ones = np.unpackbits(bits.view(np.uint8)).astype(np.float64)
    assert abs(ones.mean() - 0.5) < 4.5 * 0.5 / np.sqrt(ones.size)
    correlations = np.corrcoef(bits.astype(np.float64))[np.triu_indices(len(bits), 1)]
    assert np.abs(correlations).max() < 6 / np.sqrt(ROW)


def test_bits_are_those_of_the_documented_names():
    """Key, packed array, array and row, one folded into the other: a stage must find them again."""
    found = row_bits(KEY, 'momentum', PACKING)
    row = PACKING.names.index('block1a/conv/kernel') + 3  # the arrays before it have a row each
    assert PACKING.indices[0, row] == 3
    key = KEY
    for number in (zlib.crc32(b'momentum'), zlib.crc32(b'block1a/conv/kernel'), 3):
        key = jax.random.fold_in(key, number)
    words = np.asarray(jax.random.bits(key, (ROW // 2,), jnp.uint32))
    np.testing.assert_array_equal(found[row, ::2], words & 0xFFFF)
    np.testing.assert_array_equal(found[row, 1::2], words >> 16)


@pytest.mark.parametrize('dtype', FORMATS)
@pytest.mark.parametrize('size', [1e-5, 1e-2, 10.0])
@pytest.mark.parametrize('rounding', ['stochastic', 'nearest'])
def test_landing_is_exact(dtype, size, rounding):
    """weight + (rounded - weight) is a neighbour of weight + update, in its format, for any sizes of the two."""
    transform = round_updates(PACKING, dtype, rounding, KEY)
    weights, updates = pack(TREE, dtype), pack(random_updates(size=size), jnp.float32)
    landing, state = jax.jit(transform.update)(updates, transform.init(weights), weights)
    after = apply_updates(weights, landing)
    assert state.count == 1
    assert landing.dtype == jnp.float32
    assert after.dtype == dtype
    target = weights.astype(jnp.float32) + updates
    if rounding == 'nearest':
        np.testing.assert_array_equal(patterns(after), patterns(target.astype(dtype)))
    ends = [rounded(target, dtype, jnp.full(weights.shape, b, jnp.uint16)) for b in (0, 2**16 - 1)]
    assert ((patterns(after) == patterns(ends[0])) | (patterns(after) == patterns(ends[1]))).all()


@pytest.mark.parametrize('dtype', FORMATS)
def test_landing_survives_cancellation(dtype):
    """Updates that all but cancel weights, whose difference must still come out exact."""
    rng, packing = np.random.default_rng(3), packing_of(200 * ROW)
    w = jnp.asarray(rng.normal(size=packing.shape) * np.exp2(rng.uniform(-10, 10, packing.shape)), dtype)
    nearly_one = 1 + rng.choice([-1, 1], packing.shape) * np.exp2(-rng.uniform(1, 24, packing.shape))
    u = -w.astype(jnp.float32) * jnp.asarray(nearly_one, jnp.float32)
    transform = round_updates(packing, dtype, 'stochastic', KEY)
    landing, _ = jax.jit(transform.update)(u, transform.init(w), w)
    found = np.asarray(apply_updates(w, landing), np.float32)
    target = w.astype(jnp.float32) + u
    ends = [np.asarray(rounded(target, dtype, jnp.full(w.shape, b, jnp.uint16)), np.float32) for b in (0, 2**16 - 1)]
    assert ((found == ends[0]) | (found == ends[1])).all()


def test_overflow_of_a_weight_reaches_the_update():
    transform = round_updates(packing_of(3), jnp.float16, 'stochastic', KEY)
    weights = pack({'w': np.full((3,), 65000.0)}, jnp.float16)
    updates = pack({'w': np.asarray([0.0, 1000.0, -1.4e5])}, jnp.float32)
    landing, _ = jax.jit(transform.update)(updates, transform.init(weights), weights)
    np.testing.assert_array_equal(landing[0, :4], [0, np.inf, -np.inf, 0])


@pytest.mark.parametrize('dtype', FORMATS)
@pytest.mark.parametrize(('rounding', 'low', 'high'), [('stochastic', 1.9, 2.1), ('nearest', 1.0, 1.0)])
def test_small_updates_accumulate(dtype, rounding, low, high):
    """1 + 10,000 × 1e-4: lost one and all to nearest, kept on average by stochastic rounding."""
    transform, weights = round_updates(packing_of(64), dtype, rounding, KEY), pack({'w': np.ones((64,))}, dtype)
    updates = pack({'w': np.full((64,), 1e-4)}, jnp.float32)

    def body(carry, _):
        weights, state = carry
        landing, state = transform.update(updates, state, weights)
        return (apply_updates(weights, landing), state), None

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, None, length=10_000)[0])
    weights, _ = run((weights, transform.init(weights)))
    assert low <= weights[0, :64].astype(jnp.float32).mean() <= high
    assert not weights[0, 64:].any()


def test_fp32_weights_pass_through():
    transform, inner = round_updates(PACKING, jnp.float32, 'stochastic', KEY), optax.trace(0.9)
    updates = pack(random_updates(), jnp.float32)
    found, _ = transform.update(updates, transform.init(updates), updates)
    assert found is updates
    assert store_state_as(inner, PACKING, jnp.float32, 'stochastic', KEY) is inner


def rounding_chain(packing, dtype, key=KEY):
    trace = store_state_as(optax.trace(0.9), packing, dtype, 'stochastic', key)
    return optax.chain(trace, round_updates(packing, dtype, 'stochastic', key))


def step_with(transform, weights, state, updates):
    updates, state = jax.jit(transform.update)(updates, state, weights)
    return apply_updates(weights, updates), state


def steps_of(names, dtype, steps=3):
    """Weights and momentum, as trees, after a few updates of the named part of the tree, and their packed arrays."""
    tree = {name: TREE[name] for name in names}
    packing = make_packing(tree)
    transform, weights = rounding_chain(packing, dtype), pack(tree, dtype)
    state = transform.init(weights)
    for seed in range(steps):
        updates = random_updates(seed)
        weights, state = step_with(transform, weights, state, pack({n: updates[n] for n in names}, jnp.float32))
    return packing, [weights, state[0].inner.trace]


@pytest.mark.parametrize('dtype', FORMATS)
@pytest.mark.parametrize('names', STAGES)
def test_a_stage_rounds_as_the_whole(dtype, names):
    """Any sub-tree under the same names ends on the same bits, weights and momentum alike."""
    (whole_packing, whole), (packing, part) = steps_of(SHAPES, dtype), steps_of(names, dtype)
    for a, b in zip(whole, part, strict=True):
        tree = whole_packing.unpack(a[None])
        assert bits_equal({name: tree[name] for name in names}, packing.unpack(b[None]))


@pytest.mark.parametrize('dtype', FORMATS)
def test_padding_stays_zero(dtype):
    packing, arrays = steps_of(SHAPES, dtype, steps=5)
    padding = np.asarray(packing.pack(jax.tree.map(jnp.ones_like, TREE), jnp.float32))[0] == 0
    assert padding.sum() > 1000
    for rows in arrays:
        assert not np.asarray(rows, np.float32)[padding].any()
        assert np.asarray(rows, np.float32)[~padding].all()


def test_bits_differ_by_key_step_name_and_place():
    """Ten thousand numbers half-way between two neighbours: every source of bits must flip half of them."""
    tree = {name: np.ones((10_000,)) for name in ('a', 'b')}
    packing, ones = make_packing(tree), pack(tree, jnp.float16)
    half = (ones * 2.0**-11).astype(jnp.float32)

    def ups(key=KEY, steps=1):
        transform = round_updates(packing, jnp.float16, 'stochastic', key)
        state, update = transform.init(ones), jax.jit(transform.update)
        for _ in range(steps):
            landing, state = update(half, state, ones)
        return {name: np.asarray(d > 0) for name, d in packing.unpack(landing[None]).items()}

    base, other_key, next_step = ups(), ups(jax.random.key(12)), ups(steps=2)
    np.testing.assert_array_equal(base['a'], ups()['a'])
    pairs = [
        (base['a'], x)
        for x in (base['b'], other_key['a'], next_step['a'], np.roll(base['a'], 1), np.roll(base['a'], ROW))
    ]
    for first, second in pairs:
        assert 0.48 < first.mean() < 0.52
        assert 0.48 < (first == second).mean() < 0.52


def test_packed_arrays_draw_different_bits():
    """Weights, momentum and mean square of one update: any two agree by chance only."""
    draw = jax.jit(lambda name: row_bits(KEY, name, packing_of(10_000)), static_argnums=0)
    drawn = [np.asarray(draw(name)) for name in ('weights', 'momentum', 'mean_square')]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert 0.48 < (first < 2**15).mean() < 0.52
            assert 0.48 < ((first < 2**15) == (second < 2**15)).mean() < 0.52


def test_stored_state_draws_under_the_names_of_its_fields():
    packing, ones = packing_of(ROW), jnp.ones((1, ROW), jnp.float16)
    transform = store_state_as(optax.trace(0.5), packing, jnp.float16, 'stochastic', KEY)
    updates = jnp.full((1, ROW), 1 + 2.0**-11)
    _, state = transform.update(updates, transform.init(ones), ones)
    bits = row_bits(jax.random.fold_in(KEY, 0), 'trace', packing)
    np.testing.assert_array_equal(state.inner.trace, stochastic_round(updates, jnp.float16, bits))


def test_stored_state_is_small_and_computed_in_fp32():
    """The update sees the unrounded state; counts stay integers; the mean over many numbers is the fp32 state."""
    packing = packing_of(30_000)
    inner = rmsprop(0.1, packing, decay=0.5)
    weights = pack({'w': np.ones((30_000,))}, jnp.float32)
    updates = 0.3 * weights
    transform = store_state_as(inner, packing, jnp.float16, 'stochastic', KEY)
    plain, plain_state = inner.update(updates, inner.init(weights), weights)
    start = transform.init(weights)
    found, state = jax.jit(transform.update)(updates, start, weights)
    np.testing.assert_allclose(found, plain, rtol=1e-6)
    for name in ('mean_square', 'momentum'):
        stored, exact = getattr(state.inner, name), getattr(plain_state, name)[0, 0]
        assert stored.dtype == jnp.float16
        stored = np.asarray(packing.unpack(stored[None])['w'], np.float64)
        assert len(set(stored)) == 2
        assert abs(stored.mean() - exact) < 4.5 * stored.std() / np.sqrt(stored.size)
    assert state.inner.count.dtype == jnp.int32
    assert state.inner.count == state.count == 1
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.dtype, a.shape) == (b.dtype, b.shape), start, state))


@pytest.mark.parametrize('dtype', FORMATS)
def test_replicas_stay_identical_under_pmap(dtype):
    """A hundred compiled steps on two devices leave the same bits as on one."""
    transform, weights = rounding_chain(PACKING, dtype), pack(TREE, dtype)
    updates = pack(random_updates(), jnp.float32)

    def run(weights):
        def body(carry, _):
            return step_with(transform, *carry, updates), None

        return jax.lax.scan(body, (weights, transform.init(weights)), None, length=100)[0]

    both = jax.pmap(run, devices=jax.devices()[:2])(jnp.stack([weights, weights]))
    both = jax.tree.map(np.asarray, both)
    first, second = (jax.tree.map(lambda x, i=i: x[i], both) for i in range(2))
    alone = jax.jit(run)(weights)
    assert bits_equal(first, second)
    assert bits_equal(first, alone)
    assert not bits_equal(first[0], weights)


def test_a_skipped_step_leaves_no_trace():
    transform, weights = rounding_chain(PACKING, jnp.float16), pack(TREE, jnp.float16)
    state, updates = transform.init(weights), pack(random_updates(), jnp.float32)

    @jax.jit
    def maybe(weights, state, updates, finite):
        changed = step_with(transform, weights, state, updates)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, (weights, state))

    skipped = maybe(weights, state, updates * jnp.nan, False)
    assert bits_equal(skipped, (weights, state))
    assert bits_equal(maybe(*skipped, updates, True), maybe(weights, state, updates, True))


@pytest.mark.parametrize('tree', [{}, {'empty': np.ones((0, 3)), 'scalar': np.ones(()), 'row': np.ones((ROW + 1,))}])
def test_empty_and_odd_shapes(tree):
    packing, weights = make_packing(tree), pack(tree, jnp.float16)
    transform = rounding_chain(packing, jnp.float16)
    after, _ = step_with(transform, weights, transform.init(weights), weights.astype(jnp.float32))
    jax.tree.map(lambda a, w: np.testing.assert_array_equal(a, 2 * w), packing.unpack(after[None]), tree)


def test_apply_updates_in_every_format():
    for dtype in (jnp.float32, *FORMATS):
        after = apply_updates({'w': jnp.ones((3,), dtype)}, {'w': jnp.full((3,), 0.5)})
        assert after['w'].dtype == dtype
        np.testing.assert_array_equal(after['w'].astype(jnp.float32), 1.5)


@pytest.mark.parametrize('build', [round_updates, lambda *a: store_state_as(optax.identity(), *a)])
def test_unknown_rounding(build):
    with pytest.raises(ConfigError, match=r"precision\.rounding='up'.*stochastic, nearest"):
        build(PACKING, jnp.float16, 'up', KEY)
