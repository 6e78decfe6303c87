"""Stochastic rounding of 16-bit weights and optimizer state: why training without an fp32 copy works.

A weight of 1.0 in fp16 cannot move by less than 0.0005 (downwards) or 0.001 (upwards), and LARS steps are
far smaller: rounded to nearest, they are lost one and all. Rounded up with a probability equal to the
fraction of the step, they arrive on average (evidence: Zamirai et al., https://arxiv.org/abs/2010.06192).

The rounding itself works on the bits of the number as integers. Adding random low bits to an fp32 number
and masking, which is exact for bf16, is wrong for fp16 below 2^-14, where fp16 spacing stops shrinking; and
floating point cannot be used there for bf16, since XLA on CPU flushes fp32 subnormals, which bf16's are, to
zero.

Random bits depend on (key, update count, name of the array) and on nothing else, so that every replica's
copy of a weight stays bit-identical, and a pipeline stage that holds some of the weights rounds them as the
whole would.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficientnet.errors import ConfigError
from efficientnet.precision import BF16, FP16, FP32, cast_floating

ROUNDINGS = ('stochastic', 'nearest')
BLOCK = 256  # numbers whose random bits share a key; changing it changes the bits


def stochastic_round(x: jax.Array, dtype: jax.typing.DTypeLike, bits: jax.Array) -> jax.Array:
    """Rounds x to one of its two 16-bit neighbours, up with the probability that keeps the mean.

    With neighbours lo <= |x| < hi, |result| = hi where bits / 2^32 < (|x| - lo) / (hi - lo), else lo.
    A number that the format has is returned unchanged, as are the sign of zero and infinities; NaN stays NaN.

    - bf16: the fraction has 16 bits, so the upper half of `bits` decides and the mean over its 65,536
      values is exactly x, subnormals included.
    - fp16: the fraction has 13 bits for normals and more below 2^-14. Under 2^-33 it outgrows the 32 random
      bits and is cut off to them: a bias of less than 2^-32 of a step, which is 2^-24 there.
    - Overflow: infinity counts as the neighbour after the largest finite number (65504 in fp16), at its
      usual distance; from there on the result is infinity, never the largest number, so that a finite check
      sees it. (The reference's hardware gives NaN, which the same check sees.)

    Args:
        x: fp32, any shape.
        dtype: float16 or bfloat16.
        bits: uint32, uniform, of x's shape.

    Returns:
        An array of x's shape in `dtype`.

    Raises:
        TypeError: Another format.
    """
    word = jax.lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = word & 0x7FFFFFFF
    # A 16-bit float's pattern, read as an integer, counts steps from zero. How many is |x|: whole ones, and a
    # fraction in units of 2^-32?
    if dtype == BF16:
        largest = 0x7F80
        whole, fraction = magnitude >> 16, magnitude << 16
    elif dtype == FP16:
        largest = 0x7C00
        exponent = magnitude >> 23
        normal = exponent >= 127 - 14
        pattern = jnp.where(normal, magnitude - ((127 - 15) << 23), (magnitude & 0x7FFFFF) | 0x800000)
        shift = jnp.where(normal, jnp.uint32(13), 126 - exponent)
        # The clips keep shifts inside the word; where they bite, the 24-bit pattern is shifted out anyway.
        whole = pattern >> jnp.minimum(shift, 31)
        within = pattern << (32 - jnp.minimum(shift, 32))
        fraction = jnp.where(shift <= 32, within, pattern >> (jnp.clip(shift, 32, 63) - 32))
    else:
        raise TypeError(f'stochastic_round has no {jnp.dtype(dtype).name}; it rounds to float16 and bfloat16')
    rounded = jnp.minimum(whole + (bits < fraction).astype(jnp.uint32), largest)
    rounded = jnp.where(magnitude > 0x7F800000, 0x7FFF, rounded)
    sign = (word >> 16) & 0x8000
    return jax.lax.bitcast_convert_type((sign | rounded).astype(jnp.uint16), dtype)


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf from its path in a tree, such as 'block1a/expand/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


class RoundUpdatesState(NamedTuple):
    """Updates made so far, int32 []."""

    count: jax.Array


def round_updates(dtype: jax.typing.DTypeLike, rounding: str, key: jax.Array) -> optax.GradientTransformation:
    """Makes updates, at the end of a chain, land 16-bit weights on 16-bit numbers.

    update -> round(weight + update) - weight, in fp32. The difference is exact wherever it matters:
    `apply_updates` lands on the rounded number. (Not where it would be an fp32 subnormal, on a device that
    flushes those: bf16 weights below 2^-118 may stay put there.)

    Args:
        dtype: Format of the weights; with float32 updates pass through.
        rounding: 'stochastic' or 'nearest'.
        key: Typed PRNG key, the same on every replica and stage.

    Returns:
        A transformation from fp32 updates to fp32 updates that needs the weights.

    Raises:
        ConfigError: Unknown rounding.
    """
    _check_rounding(rounding)
    if dtype == FP32:
        return optax.identity()

    def init(params: optax.Params) -> RoundUpdatesState:
        del params
        return RoundUpdatesState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates, state: RoundUpdatesState, params: optax.Params
    ) -> tuple[optax.Updates, RoundUpdatesState]:
        old = cast_floating(params, FP32)
        new = _round_tree(jax.tree.map(jnp.add, old, updates), dtype, rounding, key, state.count)
        landing = jax.tree.map(lambda rounded, weight: rounded.astype(FP32) - weight, new, old)
        return landing, RoundUpdatesState(count=state.count + 1)

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
    transform: optax.GradientTransformation, dtype: jax.typing.DTypeLike, rounding: str, key: jax.Array
) -> optax.GradientTransformation:
    """Keeps a transformation's floating-point state in 16 bits between updates; its arithmetic stays fp32.

    The update itself sees the new state before it is rounded. Integers, such as step counts, stay.

    Args:
        transform: What to wrap; its state's leaves are rounded under their paths, 'momentum/block1a/…'.
        dtype: Format to store; with float32 the transformation is returned as it is.
        rounding: 'stochastic' or 'nearest'.
        key: Typed PRNG key, the same on every replica and stage.

    Raises:
        ConfigError: Unknown rounding.
    """
    _check_rounding(rounding)
    if dtype == FP32:
        return transform

    def init(params: optax.Params) -> StoredState:
        return StoredState(count=jnp.zeros((), jnp.int32), inner=cast_floating(transform.init(params), dtype))

    def update(
        updates: optax.Updates, state: StoredState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, StoredState]:
        updates, inner = transform.update(updates, cast_floating(state.inner, FP32), params)
        inner = _round_tree(inner, dtype, rounding, key, state.count)
        return updates, StoredState(count=state.count + 1, inner=inner)

    return optax.GradientTransformation(init, update)


def _round_tree(tree: Any, dtype: jax.typing.DTypeLike, rounding: str, key: jax.Array, count: jax.Array) -> Any:
    """Rounds the floating-point leaves of a tree, each with the random bits of (key, count, its name)."""
    if rounding == 'nearest':
        return cast_floating(tree, dtype)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    is_floating = [jnp.issubdtype(x.dtype, jnp.floating) for _, x in leaves]
    named = [(path_name(path), x) for (path, x), chosen in zip(leaves, is_floating, strict=True) if chosen]
    if not named:
        return tree
    # All leaves are rounded as one array of blocks: a generator a leaf would take XLA minutes to compile.
    blocks = [-(-x.size // BLOCK) for _, x in named]
    padded = [jnp.pad(x.ravel(), (0, n * BLOCK - x.size)) for (_, x), n in zip(named, blocks, strict=True)]
    bits = _named_bits(jax.random.fold_in(key, count), [name for name, _ in named], blocks)
    rounded = stochastic_round(jnp.concatenate(padded).reshape(-1, BLOCK), dtype, bits)
    # Without the barrier XLA may fuse the rounding into each of the slices, and compile it as often.
    rounded = jax.lax.optimization_barrier(rounded).ravel()
    starts = np.cumsum([0, *blocks]) * BLOCK
    unpacked = iter(
        rounded[start : start + x.size].reshape(x.shape) for (_, x), start in zip(named, starts[:-1], strict=True)
    )
    return structure.unflatten(
        next(unpacked) if chosen else x for (_, x), chosen in zip(leaves, is_floating, strict=True)
    )


def _named_bits(key: jax.Array, names: list[str], blocks: list[int]) -> jax.Array:
    """Draws blocks of random bits, each by (key, name, its index under that name).

    Args:
        key: Typed PRNG key.
        names: Of the arrays.
        blocks: How many each takes.

    Returns:
        uint32 [sum(blocks), BLOCK].
    """
    # Python's hash() differs from process to process; a checksum is the same everywhere.
    checksums = np.array([zlib.crc32(name.encode()) for name in names], np.uint32)
    indices = np.concatenate([np.arange(n, dtype=np.uint32) for n in blocks])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.repeat(checksums, blocks))
    keys = jax.vmap(jax.random.fold_in)(keys, indices)
    return jax.vmap(lambda block_key: jax.random.bits(block_key, (BLOCK,), jnp.uint32))(keys)


def _check_rounding(rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise ConfigError(f'precision.rounding={rounding!r} is unknown; choose one of {", ".join(ROUNDINGS)}')
