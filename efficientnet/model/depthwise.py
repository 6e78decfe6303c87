"""Depthwise convolution as shifted multiply-adds, the fastest that XLA itself computes on a CPU."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficientnet.model.conv_geometry import NO_PADS, Pads, shifted_views

SAMPLES = 8  # whose products one loop over pixels adds up


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Sum over taps of shifted view times weight, in fp32; x [N, H, W, C], kernel [k, k, 1, C]."""
    taps_h, taps_w, _, channels = kernel.shape
    weights = kernel.astype(jnp.float32).reshape(taps_h * taps_w, 1, 1, 1, channels)
    views = shifted_views(x, taps_h, taps_w, stride, pads)
    total = sum(view.astype(jnp.float32) * weight for view, weight in zip(views, weights, strict=True))
    return total.astype(x.dtype)


def kernel_gradient(x: Array, dy: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Pulls dy [N, H', W', C] back to the kernel [k, k, 1, C].

    On a CPU a few samples at a time: of many, XLA would copy every shifted view before it multiplies, and compile long.
    """

    def pull(x: Array, dy: Array) -> Array:
        return jnp.stack([_sum_of_products(view, dy) for view in shifted_views(x, *kernel.shape[:2], stride, pads)])

    samples, taps = len(x), kernel.shape[0] * kernel.shape[1]
    looped = samples // SAMPLES * SAMPLES if jax.default_backend() == 'cpu' and samples > SAMPLES else 0
    total = jnp.zeros((taps, kernel.shape[3]), jnp.float32)
    if looped:
        parts = jax.tree.map(lambda rows: rows[:looped].reshape(-1, SAMPLES, *rows.shape[1:]), (x, dy))
        total, _ = lax.scan(lambda total, part: (total + pull(*part), None), total, parts)
    if looped < samples:
        total = total + pull(x[looped:], dy[looped:])
    return total.reshape(kernel.shape).astype(kernel.dtype)


def _sum_of_products(x: Array, y: Array) -> Array:
    """Sum of x · y over all but the channels, [N, H, W, C] -> [C], in fp32.

    Samples are added up one by one as one loop over pixels, which reads both where they lie. A plain sum over all
    three dimensions would have XLA on a CPU copy every shifted view first.
    """
    if jax.default_backend() != 'cpu':
        return (x.astype(jnp.float32) * y.astype(jnp.float32)).sum((0, 1, 2))
    pairs = zip(x.astype(jnp.float32), y.astype(jnp.float32), strict=True)
    return lax.optimization_barrier(sum(a * b for a, b in pairs)).sum((0, 1))


def _forward(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return depthwise(x, kernel, stride, pads), (x, kernel)


def _backward(stride: int, pads: Pads, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    # The input gradient is the same convolution with the kernel turned by 180 degrees, over the output
    # gradient spread out by the stride and padded so that the size of x comes out.
    spread = [(low, high, stride - 1) for low, high in _gradient_pads(x, kernel, dy, stride, pads)]
    apart = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *spread, (0, 0, 0)))
    dx = depthwise(apart, kernel[::-1, ::-1], 1, NO_PADS)
    return dx.astype(x.dtype), kernel_gradient(x, dy, kernel, stride, pads)


depthwise.defvjp(_forward, _backward)


def _gradient_pads(x: Array, kernel: Array, dy: Array, stride: int, pads: Pads) -> Pads:
    """Zeros around the spread-out output gradient with which a full convolution gives back the size of x."""
    return tuple(
        (kernel.shape[axis] - 1 - before, x.shape[axis + 1] + before - (dy.shape[axis + 1] - 1) * stride - 1)
        for axis, (before, _) in enumerate(pads)
    )
