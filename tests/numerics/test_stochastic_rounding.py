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


def as_float(pattern, dtype):
    return np.asarray(jax.lax.bitcast_convert_type(jnp.asarray(pattern, jnp.uint16), dtype))


def from_bits(word):
    return np.asarray(word, np.uint32).view(np.float32)


def patterns(x):
    return np.asarray(x).view(np.uint16)


def finite_numbers(dtype):
    every = as_float(np.arange(2**16), dtype)
    return every[np.isfinite(every.astype(np.float32))]


@pytest.mark.parametrize('dtype', FORMATS)
def test_numbers_of_the_format_never_change(dtype):
    numbers = finite_numbers(dtype)
    assert len(numbers) == {jnp.float16: 63_488, jnp.bfloat16: 65_280}[dtype]
    for word in (0, 1, 2**31, 2**32 - 1):
        result = rounded(jnp.asarray(numbers.astype(np.float32)), dtype, jnp.full(numbers.shape, word, jnp.uint32))
        np.testing.assert_array_equal(patterns(result), patterns(numbers))


@pytest.mark.parametrize('dtype', FORMATS)
def test_zero_infinity_nan(dtype):
    special = jnp.asarray([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, -jnp.nan])
    payloads = jnp.asarray(from_bits([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFC00000]))  # NaNs of every kind
    for word in (0, 2**32 - 1):
        bits = jnp.full(special.shape, word, jnp.uint32)
        result = rounded(special, dtype, bits)
        np.testing.assert_array_equal(patterns(result[:4]), patterns(special[:4].astype(dtype)))
        assert np.isnan(np.asarray(result[4:], np.float32)).all()
        assert np.isnan(np.asarray(rounded(payloads, dtype, bits[:4]), np.float32)).all()


BF16_WORDS = [
    *[0x3F800001, 0x3F80FFFF, 0x3F808000, 0xBF804321, 0x3FFFFFFF, 0x3FFF0001],  # normals, ties, the next binade
    *[0x00000001, 0x00008000, 0x0000FFFF, 0x80001234],  # below the smallest subnormal
    *[0x00010001, 0x007F1234, 0x807FFFFF, 0x007FFFFF, 0x00800001],  # subnormals and the step out of them
    *[0x7F7F0000, 0x7E7FABCD],
]


@pytest.mark.parametrize('word', BF16_WORDS)
def test_bf16_is_exactly_unbiased(word):
    """Over all 65,536 random words that matter, in integers: XLA on CPU would flush these sums to zero."""
    random_words = jnp.arange(2**16, dtype=jnp.uint32) << 16
    x = jnp.full((2**16,), from_bits(word))
    found = patterns(rounded(x, jnp.bfloat16, random_words)).astype(np.int64)
    sign, magnitude = word >> 31, word & 0x7FFFFFFF
    assert set(found >> 15) == {sign}
    assert (found & 0x7FFF).sum() == magnitude
    assert set(found & 0x7FFF) <= {magnitude >> 16, (magnitude >> 16) + 1}
    # Nor may the lower half of the random word change anything.
    np.testing.assert_array_equal(patterns(rounded(x, jnp.bfloat16, random_words + 0xFFFF)), found)


@pytest.mark.parametrize('x', [1.0 + 2.0**-23, 0.3, -5.4321, 2048 - 2.0**-12, 1.9999999, 65503.99, 2.0**-14 * 1.3])
def test_fp16_normals_are_exactly_unbiased(x):
    """Thirteen random bits decide, so 8192 words say all."""
    words = jnp.arange(2**13, dtype=jnp.uint32) << 19
    found = np.asarray(rounded(jnp.full((2**13,), x, jnp.float32), jnp.float16, words)).astype(np.float64)
    assert found.mean() == np.float64(np.float32(x))
    assert len(set(found)) == 2


@pytest.mark.parametrize(
    'x',
    [2.0**-14 - 2.0**-30, 6.1e-5, 3.3e-5, 7.3e-6, 1e-6, 2.0**-24 * 1.5, 6e-8, 2.0**-25, 2.0**-26 * 1.1, 1e-9, 2.0**-40],
)
@pytest.mark.parametrize('sign', [1, -1])
def test_fp16_subnormals_against_exact_fractions(x, sign):
    """The result changes from the upper to the lower neighbour at the word that the fraction asks for."""
    x = np.float32(x)
    step = 2.0**-24
    low = np.floor(np.float64(x) / step)
    fraction = np.float64(x) / step - low
    threshold = int(np.ceil(fraction * 2**32))  # words below it round up
    words = np.asarray([0, max(threshold - 1, 0), threshold, 2**32 - 1], np.uint32)
    found = np.asarray(rounded(jnp.full((4,), sign * x), jnp.float16, jnp.asarray(words)))
    up = np.where(words < fraction * 2**32, low + 1, low) * step
    np.testing.assert_array_equal(found.astype(np.float64), sign * up)


def test_smallest_numbers_never_round_up_by_more_than_their_due():
    """Below 2^-56 a fraction is less than one in 2^32; fp32 subnormals are far below."""
    x = jnp.asarray(from_bits([1, 0x007FFFFF, 0x00800000, 0x20000000]))
    np.testing.assert_array_equal(rounded(x, jnp.float16, jnp.zeros((4,), jnp.uint32)), np.zeros(4, np.float16))


def z_score(x, dtype, draws=200_000, seed=0):
    bits = jax.random.bits(jax.random.fold_in(KEY, seed), (draws,), jnp.uint32)
    found = np.asarray(rounded(jnp.full((draws,), x, jnp.float32), dtype, bits)).astype(np.float64)
    x, low, high = np.float64(np.float32(x)), found.min(), found.max()
    assert low < x < high
    return (found.mean() - x) / np.sqrt((x - low) * (high - x) / draws)


@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize(
    'x',
    [
        *[1.0001, 3.14159, 1.9993, 2047.9, 65500.3, 1e-3],
        *[6.11e-5, 6.1e-5, 6.09e-5, 3.1e-5, 7.3e-6, 1.003e-6, 1.31e-7, 6e-8, 2e-8, 1e-9],  # from the last binade down
    ],
)
def test_fp16_mean_is_unbiased(x, sign):
    assert abs(z_score(sign * x, jnp.float16, seed=int(abs(np.log(x)) * 100) + (sign > 0))) < 4.5


@pytest.mark.parametrize('dtype', FORMATS)
def test_only_the_two_neighbours_appear(dtype):
    """A million arbitrary finite fp32 patterns, against neighbours found by binary search."""
    rng = np.random.default_rng(1)
    words = rng.integers(0, 0x7F800000, 1_000_000, dtype=np.uint32) | rng.integers(0, 2, 1_000_000, np.uint32) << 31
    # Uniform patterns are mostly outside fp16's range: put half of them inside it.
    inside = rng.uniform(-45, 17, 500_000)
    words[:500_000] = (np.exp2(inside) * rng.choice([-1, 1], 500_000)).astype(np.float32).view(np.uint32)
    x = from_bits(words)
    bits = rng.integers(0, 2**32, x.size, dtype=np.uint32)
    found = patterns(rounded(jnp.asarray(x), dtype, jnp.asarray(bits)))
    positive = np.unique(np.abs(finite_numbers(dtype).astype(np.float64)))
    below = np.searchsorted(positive, np.abs(x.astype(np.float64)), side='right') - 1
    exact = positive[below] == np.abs(x.astype(np.float64))
    np.testing.assert_array_equal(found >> 15, words >> 31)
    infinity = positive.size  # patterns of non-negative numbers count up from zero, and infinity comes next
    magnitude = (found & 0x7FFF).astype(np.int64)
    beyond = np.abs(x.astype(np.float64)) >= {jnp.float16: 65536.0, jnp.bfloat16: 2.0**128}[dtype]
    assert (magnitude[beyond] == infinity).all()
    assert np.isin((magnitude - below)[~beyond], [0, 1]).all()
    assert (magnitude == below)[exact & ~beyond].all()


def test_overflow_is_visible():
    words = jnp.asarray([0, 2**31 - 1, 2**31, 2**32 - 1], jnp.uint32)
    x = jnp.full((4,), 65520.0)  # half-way from 65504 to where 65536 would be
    np.testing.assert_array_equal(rounded(x, jnp.float16, words), [np.inf, np.inf, 65504, 65504])
    np.testing.assert_array_equal(rounded(-8 * x, jnp.float16, words), [-np.inf] * 4)
    huge = jnp.full((4,), from_bits(0x7F7F8000))
    np.testing.assert_array_equal(np.isinf(np.asarray(rounded(huge, jnp.bfloat16, words), np.float32)), [1, 1, 0, 0])


def test_other_formats_are_refused():
    with pytest.raises(TypeError, match='float32'):
        stochastic_round(jnp.ones((1,)), jnp.float32, jnp.zeros((1,), jnp.uint32))


# The transformations, on packed arrays.

SHAPES = {'stem': (3, 3, 3, 8), 'block1a': (40, 30), 'block2a': (7,), 'head': ()}
TREE = {
    block: {'conv': {'kernel': np.random.default_rng(2).normal(size=shape) * 0.1}, 'bias': np.full((5,), 0.01)}
    for block, shape in SHAPES.items()
}
PACKING = make_packing(TREE)
STAGES = [['stem'], ['block1a', 'head'], ['block2a', 'head']]


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
    assert bits.dtype == np.uint32
    assert len(np.unique(bits, axis=0)) == len(bits)
    ones = np.unpackbits(bits.view(np.uint8)).astype(np.float64)
    assert abs(ones.mean() - 0.5) < 4.5 * 0.5 / np.sqrt(ones.size)
    correlations = np.corrcoef(bits.astype(np.float64))[np.triu_indices(len(bits), 1)]
    assert np.abs(correlations).max() < 6 / np.sqrt(ROW)


def test_bits_are_those_of_the_documented_names():
    """Key, packed array, array and row, one folded into the other: a stage or a later version must find them again."""
    found = row_bits(KEY, 'momentum', PACKING)
    row = PACKING.names.index('block1a/conv/kernel') + 3  # the arrays before it have a row each
    assert PACKING.indices[0, row] == 3
    key = KEY
    for number in (zlib.crc32(b'momentum'), zlib.crc32(b'block1a/conv/kernel'), 3):
        key = jax.random.fold_in(key, number)
    np.testing.assert_array_equal(found[row], jax.random.bits(key, (ROW,), jnp.uint32))


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
    ends = [rounded(target, dtype, jnp.full(weights.shape, w, jnp.uint32)) for w in (0, 2**32 - 1)]
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
    ends = [np.asarray(rounded(target, dtype, jnp.full(w.shape, b, jnp.uint32)), np.float32) for b in (0, 2**32 - 1)]
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
            assert 0.48 < (first < 2**31).mean() < 0.52
            assert 0.48 < ((first < 2**31) == (second < 2**31)).mean() < 0.52


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
