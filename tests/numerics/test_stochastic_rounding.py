"""Rounding numbers, against the definition: which neighbour, how often, at every edge of the formats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientnet.numerics.stochastic_rounding import stochastic_round

FORMATS = [jnp.float16, jnp.bfloat16]
KEY = jax.random.key(11)
rounded = jax.jit(stochastic_round, static_argnums=1)
EVERY = jnp.arange(2**16).astype(jnp.uint16)  # all random bits there are


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
    for word in (0, 1, 2**15, 2**16 - 1):
        result = rounded(jnp.asarray(numbers.astype(np.float32)), dtype, jnp.full(numbers.shape, word, jnp.uint16))
        np.testing.assert_array_equal(patterns(result), patterns(numbers))


@pytest.mark.parametrize('dtype', FORMATS)
def test_zero_infinity_nan(dtype):
    special = jnp.asarray([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, -jnp.nan])
    payloads = jnp.asarray(from_bits([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFC00000]))  # NaNs of every kind
    for word in (0, 2**16 - 1):
        bits = jnp.full(special.shape, word, jnp.uint16)
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
    """Over all random bits there are, in integers: XLA on CPU would flush these sums to zero."""
    x = jnp.full((2**16,), from_bits(word))
    found = patterns(rounded(x, jnp.bfloat16, EVERY)).astype(np.int64)
    sign, magnitude = word >> 31, word & 0x7FFFFFFF
    assert set(found >> 15) == {sign}
    assert (found & 0x7FFF).sum() == magnitude
    assert set(found & 0x7FFF) <= {magnitude >> 16, (magnitude >> 16) + 1}


@pytest.mark.parametrize(
    'x',
    [
        *[1.0 + 2.0**-23, 0.3, -5.4321, 2048 - 2.0**-12, 1.9999999, 65503.99, 2.0**-14 * 1.3],
        *[2.0**-14 - 2.0**-38, 3.3e-5, -(2.0**-16) * 1.1, 2.0**-17 + 2.0**-40, 2.0**-16 - 2.0**-40],  # subnormals
    ],
)
def test_fp16_is_exactly_unbiased_down_to_where_its_bits_end(x):
    """The fraction of a step has 13 bits for normals and 16 in the last binade of those that are not cut off."""
    found = np.asarray(rounded(jnp.full((2**16,), x, jnp.float32), jnp.float16, EVERY)).astype(np.float64)
    assert found.mean() == np.float64(np.float32(x))
    assert len(set(found)) == 2


@pytest.mark.parametrize(
    'x',
    [2.0**-14 - 2.0**-30, 6.1e-5, 3.3e-5, 7.3e-6, 1e-6, 2.0**-24 * 1.5, 6e-8, 2.0**-25, 2.0**-26 * 1.1, 1e-9, 2.0**-40],
)
@pytest.mark.parametrize('sign', [1, -1])
def test_fp16_subnormals_against_exact_fractions(x, sign):
    """The upper neighbour comes as often as the fraction of the step says, cut off to 16 bits."""
    x = np.float32(x)
    step = 2.0**-24
    low = np.floor(np.float64(x) / step)
    fraction = np.float64(x) / step - low
    found = np.asarray(rounded(jnp.full((2**16,), sign * x), jnp.float16, EVERY)).astype(np.float64)
    up = np.floor(fraction * 2**16) + np.arange(2**16) >= 2**16
    np.testing.assert_array_equal(found, sign * np.where(up, low + 1, low) * step)
    assert 0 <= x - sign * found.mean() < 2.0**-16 * step


def test_smallest_numbers_never_round_up():
    """Below 2^-40 a fraction is less than one in 2^16; fp32 subnormals are far below."""
    x = jnp.asarray(from_bits([1, 0x007FFFFF, 0x00800000, 0x20000000, 0x2B7FFFFF, 0x2B800000]))
    found = rounded(x, jnp.float16, jnp.full((6,), 2**16 - 1, jnp.uint16))
    np.testing.assert_array_equal(found, np.asarray([0, 0, 0, 0, 0, 2.0**-24], np.float16))


def z_score(x, dtype, draws=200_000, seed=0):
    bits = jax.random.bits(jax.random.fold_in(KEY, seed), (draws,), jnp.uint16)
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
    bits = rng.integers(0, 2**16, x.size, dtype=np.uint16)
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
    bits = jnp.asarray([0, 2**15 - 1, 2**15, 2**16 - 1], jnp.uint16)
    x = jnp.full((4,), 65520.0)  # half-way from 65504 to where 65536 would be
    np.testing.assert_array_equal(rounded(x, jnp.float16, bits), [65504, 65504, np.inf, np.inf])
    np.testing.assert_array_equal(rounded(-8 * x, jnp.float16, bits), [-np.inf] * 4)
    huge = jnp.full((4,), from_bits(0x7F7F8000))
    np.testing.assert_array_equal(np.isinf(np.asarray(rounded(huge, jnp.bfloat16, bits), np.float32)), [0, 0, 1, 1])


def test_other_formats_and_bits_are_refused():
    with pytest.raises(TypeError, match='float32'):
        stochastic_round(jnp.ones((1,)), jnp.float32, jnp.zeros((1,), jnp.uint16))
    with pytest.raises(TypeError, match='uint16, not as uint32'):
        stochastic_round(jnp.ones((1,)), jnp.float16, jnp.zeros((1,), jnp.uint32))
