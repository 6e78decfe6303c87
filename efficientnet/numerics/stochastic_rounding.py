"""Stochastic rounding of 16-bit weights and optimizer state: why training without an fp32 copy works.

A weight of 1.0 in fp16 cannot move by less than 0.0005 (downwards) or 0.001 (upwards), and LARS steps are
far smaller: rounded to nearest, they are lost one and all. Rounded up with a probability equal to the
fraction of the step, they arrive on average (evidence: Zamirai et al., https://arxiv.org/abs/2010.06192).

The rounding itself works on the bits of the number as integers. Adding random low bits to an fp32 number
and masking, which is exact for bf16, is wrong for fp16 below 2^-14, where fp16 spacing stops shrinking; and
floating point cannot be used there for bf16, since XLA on CPU flushes fp32 subnormals, which bf16's are, to
zero.

Random bits depend on (key, update count, which packed array, name of the array, place in it) and on nothing
else, so that every replica's copy of a weight stays bit-identical, and a pipeline stage that holds some of the
weights rounds them as the whole would.
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficientnet.errors import ConfigError
from efficientnet.numerics.precision import BF16, FP16, FP32
from efficientnet.numerics.random_keys import random_words
from efficientnet.parallel.packing import ROW, StagedPacking

ROUNDINGS = ('stochastic', 'nearest')


def stochastic_round(x: jax.Array, dtype: jax.typing.DTypeLike, bits: jax.Array) -> jax.Array:
    """Rounds x to one of its two 16-bit neighbours, up with the probability that keeps the mean.

    With neighbours lo <= |x| < hi and f = (|x| - lo) / (hi - lo), |result| = hi where f + bits / 2^16 >= 1, else lo.
    A number that the format has is returned unchanged, as are the sign of zero and infinities; NaN stays NaN.

    - bf16: f has 16 bits, so the mean over all 65,536 values of `bits` is exactly x, subnormals included.
    - fp16: f has 13 bits for normals and more below 2^-14. Down to 2^-17 the mean is exactly x; from there on f is cut
      off to 16 bits: a bias towards zero of less than 2^-16 of a step (there a step is 2^-24).
    - Overflow: infinity counts as the neighbour after the largest finite number (65504 in fp16), at its
      usual distance; from there on the result is infinity, never the largest number, so that a finite check
      sees it. (The reference's hardware gives NaN, which the same check sees.)

    Args:
        x: fp32, any shape.
        dtype: float16 or bfloat16.
        bits: uint16, uniform, of x's shape.

    Returns:
        An array of x's shape in `dtype`.

    Raises:
        TypeError: Another format, or bits that are not uint16.
    """
    if bits.dtype != jnp.uint16:
        raise TypeError(f'stochastic_round takes random bits as uint16, not as {bits.dtype}')
    word = jax.lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = word & 0x7FFFFFFF
    # A 16-bit float's pattern, read as an integer, counts steps from zero. How many is |x|, in units of 2^-16 step?
    if dtype == BF16:
        steps = magnitude
    elif dtype == FP16:
        # Where fp16 has normal numbers, patterns differ by the exponents' bias and 13 bits of the fraction.
        normal = jnp.minimum(magnitude - ((127 - 15) << 23), 0x7C00 << 13) << 3
        # Below, fp16's spacing is constant, and the leading bit, which fp32 leaves out, counts.
        places = (127 - 14) - (magnitude >> 23)
        subnormal = (((magnitude & 0x7FFFFF) | 0x800000) << 3) >> jnp.minimum(places, 31)
        steps = jnp.where(magnitude >= (127 - 14) << 23, normal, subnormal)
    else:
        raise TypeError(f'stochastic_round has no {jnp.dtype(dtype).name}; it rounds to float16 and bfloat16')
    rounded = (steps + bits.astype(jnp.uint32)) >> 16
    rounded = jnp.where(magnitude > 0x7F800000, 0x7FFF, rounded)
    sign = (word >> 16) & 0x8000
    return jax.lax.bitcast_convert_type((sign | rounded).astype(jnp.uint16), dtype)


def row_bits(key: jax.Array, name: str, packing: StagedPacking) -> jax.Array:
    """Draws the random bits of one packed array, each row by (key, name, its owner's name, its index there).

    A random word serves two neighbours: drawing words is most of what rounding costs.

    Args:
        key: Typed PRNG key, such as that of one update.
        name: Which packed array is rounded, such as 'weights' or 'momentum'.
        packing: Of the array.

    Returns:
        Uniform uint16 [rows, ROW].
    """
    names = packing.own(packing.per_array(_checksum, np.uint32))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, _checksum(name)), names)
    keys = jax.vmap(jax.random.fold_in)(keys[packing.own(packing.owners)], packing.own(packing.indices))
    # Written to memory: each half would otherwise be computed from a word of its own.
    words = jax.lax.optimization_barrier(random_words(keys, ROW // 2))
    return jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1, ROW)


class RoundUpdatesState(NamedTuple):
    """Updates made so far, int32 []."""

    count: jax.Array


def round_updates(
    packing: StagedPacking, dtype: jax.typing.DTypeLike, rounding: str, key: jax.Array
) -> optax.GradientTransformation:
    """Makes updates, at the end of a chain, land 16-bit weights on 16-bit numbers.

    update -> round(weight + update) - weight, in fp32. The difference is exact wherever it matters:
    `apply_updates` lands on the rounded number. (Not where it would be an fp32 subnormal, on a device that
    flushes those: bf16 weights below 2^-118 may stay put there.)

    Args:
        packing: Of the weights.
        dtype: Format of the weights; with float32 updates pass through.
        rounding: 'stochastic' or 'nearest'.
        key: Typed PRNG key, the same on every replica and stage.

    Returns:
        A transformation from fp32 updates to fp32 updates, [rows, ROW], that needs the weights.

    Raises:
        ConfigError: Unknown rounding.
    """
    _check_rounding(rounding)
    if dtype == FP32:
        return optax.identity()

    def init(params: jax.Array) -> RoundUpdatesState:
        del params
        return RoundUpdatesState(count=jnp.zeros((), jnp.int32))

    def update(updates: jax.Array, state: RoundUpdatesState, params: jax.Array) -> tuple[jax.Array, RoundUpdatesState]:
        old, count_key = params.astype(FP32), jax.random.fold_in(key, state.count)
        new = _round_rows(old + updates, dtype, rounding, count_key, 'weights', packing)
        return new.astype(FP32) - old, RoundUpdatesState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def apply_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """Adds fp32 updates to weights of any format and returns them in that format.

    `optax.apply_updates` cannot: under strict promotion it refuses 16 bits + fp32.
    """
    return jax.tree.map(lambda weight, update: (weight.astype(FP32) + update).astype(weight.dtype), params, updates)


class StoredState(NamedTuple):
    """Updates made so far, int32 [], and the wrapped transformation's state, 16-bit."""

    count: jax.Array
    inner: optax.OptState


def store_state_as(
    transform: optax.GradientTransformation,
    packing: StagedPacking,
    dtype: jax.typing.DTypeLike,
    rounding: str,
    key: jax.Array,
) -> optax.GradientTransformation:
    """Keeps a transformation's packed state in 16 bits between updates; its arithmetic stays fp32.

    The update itself sees the new state before it is rounded. Anything else, such as step counts, stays.

    Args:
        transform: What to wrap; its packed arrays are rounded under the names they have in its state.
        packing: Of the weights.
        dtype: Format to store; with float32 the transformation is returned as it is.
        rounding: 'stochastic' or 'nearest'.
        key: Typed PRNG key, the same on every replica and stage.

    Raises:
        ConfigError: Unknown rounding.
    """
    _check_rounding(rounding)
    if dtype == FP32:
        return transform

    def map_packed(function: Callable[[str, jax.Array], jax.Array], state: optax.OptState) -> optax.OptState:
        def mapped(path: tuple[jax.tree_util.KeyEntry, ...], x: jax.Array) -> jax.Array:
            is_packed = x.shape == packing.shape and jnp.issubdtype(x.dtype, jnp.floating)
            return function(jax.tree_util.keystr(path, simple=True, separator='/'), x) if is_packed else x

        return jax.tree_util.tree_map_with_path(mapped, state)

    def init(params: jax.Array) -> StoredState:
        inner = map_packed(lambda _, rows: rows.astype(dtype), transform.init(params))
        return StoredState(count=jnp.zeros((), jnp.int32), inner=inner)

    def update(
        updates: jax.Array, state: StoredState, params: jax.Array | None = None
    ) -> tuple[jax.Array, StoredState]:
        count_key = jax.random.fold_in(key, state.count)
        inner = map_packed(lambda _, rows: rows.astype(FP32), state.inner)
        updates, inner = transform.update(updates, inner, params)
        inner = map_packed(lambda name, rows: _round_rows(rows, dtype, rounding, count_key, name, packing), inner)
        return updates, StoredState(count=state.count + 1, inner=inner)

    return optax.GradientTransformation(init, update)


def _round_rows(
    rows: jax.Array, dtype: jax.typing.DTypeLike, rounding: str, key: jax.Array, name: str, packing: StagedPacking
) -> jax.Array:
    """Rounds a packed fp32 array, with the random bits of (key, name). Zeros, as in the padding, stay zero."""
    stochastic = rounding == 'stochastic'
    rounded = stochastic_round(rows, dtype, row_bits(key, name, packing)) if stochastic else rows.astype(dtype)
    # Written to memory for all that reads them: the new array, its norm, the check whether it is finite. Each would
    # round for itself otherwise, the norm in a loop that cannot be vectorised (16.16, 4.7 million weights, two cores of
    # an AMD EPYC: 9 ms an update more).
    return jax.lax.optimization_barrier(rounded)


def _checksum(name: str) -> int:
    """A number for a name; Python's hash() differs from process to process, a checksum is the same everywhere."""
    return zlib.crc32(name.encode())


def _check_rounding(rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise ConfigError(f'precision.rounding={rounding!r} is unknown; choose one of {", ".join(ROUNDINGS)}')
