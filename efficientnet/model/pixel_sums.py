"""Sums over the pixels of each image and channel, of which norms and pools are made.

On a CPU, XLA gives a plain sum to a library. What is summed has then to be computed and written before, and small sums
go to a pool of threads that takes longer to wake than they take. Sums of a few equal parts, again and again until one
pixel is left, are loops like any other to it: they are fused with what computes their input, and shared by its
threads. They are also more exact. Accelerators have a reduction of their own.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

# Most parts that one loop adds up. Group norm with swish, there and back, two cores with AVX-512, fp32, with 8, 16, 32:
# 8x64x64x64 2.8, 3.0, 3.3 ms (plain sums: 4.4), 8x8x8x448 0.32, 0.35, 0.33 (0.51), 8x4x4x768 0.22, 0.29, 0.27 (0.32).
PARTS = 8


def pixel_sum(x: Array) -> Array:
    """Adds up x [N, H, W, C] over pixels, [N, C] in fp32."""
    if jax.default_backend() != 'cpu':
        return x.sum((1, 2), dtype=jnp.float32)
    return _sum_of_parts(x, jax.ShapeDtypeStruct(x.shape, x.dtype))


def pixel_sums(x: Array, y: Array) -> tuple[Array, Array]:
    """Sums two fp32 arrays [N, H, W, C] over pixels, each to [N, C].

    On a GPU they are the real and imaginary part of one sum: of two, XLA assumes that an exponential which they share
    would be computed twice, and writes what they share to memory in fp32 instead (update of B0 G16, 256x224x224,
    bfloat16, H200: 26.0 ms against 23.3).
    """
    if jax.default_backend() != 'gpu':
        return pixel_sum(x), pixel_sum(y)
    both = lax.complex(x, y).sum((1, 2))
    return both.real, both.imag


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_of_parts(x: Array, like: jax.ShapeDtypeStruct) -> Array:
    del like  # only the gradient needs it
    return _add_up(x)


def _forward(x: Array, like: jax.ShapeDtypeStruct) -> tuple[Array, None]:
    del like
    return _add_up(x), None


def _backward(like: jax.ShapeDtypeStruct, _: None, dsum: Array) -> tuple[Array]:
    return (jnp.broadcast_to(dsum.astype(like.dtype)[:, None, None, :], like.shape),)


_sum_of_parts.defvjp(_forward, _backward)


def _add_up(x: Array) -> Array:
    n, height, width, channels = x.shape
    pixels = height * width
    x = x.astype(jnp.float32).reshape(n, pixels, channels)
    while pixels > 1:
        parts = _parts(pixels)
        pixels //= parts
        x = x.reshape(n, parts, pixels, channels)
        pieces = [lax.index_in_dim(x, part, axis=1, keepdims=False) for part in range(parts)]
        # Without a barrier the next loop would compute these sums anew for each of its parts.
        x = lax.optimization_barrier(_pairwise_sum(pieces))
    return x[:, 0]


def _parts(pixels: int) -> int:
    """The most equal parts, up to PARTS, that a number of pixels falls into; else its smallest prime factor."""
    divisors = (parts for parts in range(2, pixels + 1) if pixels % parts == 0)
    smallest = next(divisors)
    return max([smallest, *(parts for parts in range(smallest, PARTS + 1) if pixels % parts == 0)])


def _pairwise_sum(terms: list[Array]) -> Array:
    """Adds up neighbours until one term is left."""
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[2 * len(pairs) :]
    return terms[0]
