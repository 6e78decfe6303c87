"""Grouped convolution as one dense convolution a group, shaped so that XLA on a CPU computes them fast.

XLA has two libraries for dense convolutions there, Eigen and YNN. Which one takes a convolution, how fast, and on how
many threads depends on the order of dimensions, the number of channels and of samples, and on how many operations are
ready at a time. The choices below are measured.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficientnet.model.conv_geometry import NO_PADS, Pads, image_gradient, kernel_gradient_pads, padded

Parts = Array | Sequence[Array]  # of the groups
LAYOUT = ('NHWC', 'HWIO', 'NHWC')

# Fewest groups in a turn of the loop: XLA shares what is ready between its threads only if that is more than nine
# operations. A weight update of B0 G16 (8x128x128), two cores with AVX-512, with one, four and ten or more, 10 groups
# written out, sums plain: 181, 168, 166 ms.
GROUPS_A_TURN = 10

# XLA gives convolutions with more than 16 channels on either side to a library (YNN) that is faster at 16 as well, but
# runs small ones on the thread that it is called on. With 4 channels of zeros beside 16, one core with AVX-512, us:
# 8x8x8 k5 92 against 55, 8x16x16 k5 326 against 171, 8x64x64 k3 1,746 against 1,140 (Eigen with two: 935).
SPARE_CHANNELS = 4

# Most samples for which the weight gradient has its image padded beforehand, since XLA's convolution is slow to pad
# one that has the few samples for channels. Inside it against beforehand: 4x80x80x48 k3 36 against 22; 4x20x20x160 k3
# 11 against 6.8; 12x8x8x128 k5 7.4 against 6.1; 20x8x8x128 k5 13.1 against 13.9.
FEW_SAMPLES = 12


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def conv_by_group(x: Array, kernel: Array, stride: int, groups: int, pads: Pads, loop: bool) -> Array:
    """One dense convolution a group, written out or in a loop; x [N, H, W, C], kernel [k, k, C/groups, O].

    XLA on CPU has a fast convolution for one order of dimensions, into which it brings others only outside of loops;
    a weight gradient in the order that autodiff gives it ran 4 times slower inside the loop over micro-batches. The
    gradients here are convolutions in that one order wherever they stand.

    What is cut into groups and what is put together from them is kept from being fused with its surroundings: XLA
    would otherwise compute the norm before the convolution anew in every group, and again, pixel by pixel, in the
    transposition that the weight gradient needs.
    """
    return _forward(x, kernel, stride, groups, pads, loop)[0]


def _forward(
    x: Array, kernel: Array, stride: int, groups: int, pads: Pads, loop: bool
) -> tuple[Array, tuple[Parts, Array]]:
    spare = _spare_channels(kernel.shape[2], kernel.shape[3] // groups, groups)
    x = lax.optimization_barrier(_widened(_cut(x, groups, loop), -1, spare))
    kernels = _widened(_cut(kernel, groups, loop), -2, spare)
    conv = partial(_conv, stride=stride, pads=pads, dilation=1)
    return _join(_each(conv, loop, x, kernels), loop), (x, kernel)


def _backward(
    stride: int, groups: int, pads: Pads, loop: bool, saved: tuple[Parts, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    inputs, outputs = kernel.shape[2], kernel.shape[3] // groups
    spare = _spare_channels(outputs, inputs * stride * stride, groups)

    def pull(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        dx = _image_gradient(dy, kernel, stride, pads, (*x.shape[:3], inputs))
        return dx, _kernel_gradient(x[..., :inputs], dy[..., :outputs], stride, pads, kernel.shape)

    dy = lax.optimization_barrier(_widened(_cut(dy, groups, loop), -1, spare))
    found = _each(pull, loop, x, _cut(kernel, groups, loop), dy)
    dx, dkernel = found if loop else zip(*found, strict=True)
    return _join(dx, loop), _join(dkernel, loop).transpose(1, 2, 0, 3)


conv_by_group.defvjp(_forward, _backward)


@partial(jax.jit, static_argnames=('stride', 'pads', 'dilation'))  # traced once a shape, as the gradients are
def _conv(x: Array, kernel: Array, stride: int, pads: Pads, dilation: int) -> Array:
    """Convolution without groups, x [N, H, W, C], kernel [k, k, C, O] with its taps `dilation` apart.

    XLA's fast convolution takes no kernel that is larger than the image: that one is padded before.
    """
    if any(tap > side for tap, side in zip(kernel.shape[:2], x.shape[1:3], strict=True)):
        x, pads = padded(x, pads), NO_PADS
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, rhs_dilation=(dilation, dilation), dimension_numbers=LAYOUT
    )


@partial(jax.jit, static_argnames=('stride', 'pads', 'shape'))
def _image_gradient(dy: Array, kernel: Array, stride: int, pads: Pads, shape: tuple[int, ...]) -> Array:
    """Pulls dy [N, H', W', O], or with spare channels, back to the image of a shape [N, H, W, C]."""
    spare = dy.shape[3] - kernel.shape[3]

    def convolve(dy: Array, kernel: Array, pads: Pads) -> Array:
        return _conv(dy, _widened(kernel, -2, spare), 1, pads, 1)

    return image_gradient(dy, kernel, stride, 1, pads, shape, convolve)


@partial(jax.jit, static_argnames=('stride', 'pads', 'shape'))
def _kernel_gradient(x: Array, dy: Array, stride: int, pads: Pads, shape: tuple[int, ...]) -> Array:
    """Pulls dy back to the kernel of a shape [k, k, C, O]: x convolved with dy, channels in the place of samples.

    Returns:
        [C, k, k, O].
    """
    reach = kernel_gradient_pads(x, dy, shape[:2], stride, pads)
    turned = x.transpose(3, 1, 2, 0)
    if x.shape[0] <= FEW_SAMPLES:
        turned, reach = padded(turned, reach), NO_PADS
    return _conv(turned, dy.transpose(1, 2, 0, 3), 1, reach, stride)


def _each(function: Callable, loop: bool, *parts: Parts) -> Any:
    """Applies a function to the parts of each group: a list of what it returns, for a loop one array of each."""
    if not loop:
        return [function(*group) for group in zip(*parts, strict=True)]
    groups = len(parts[0])
    at_once = next((n for n in range(GROUPS_A_TURN, 3 * GROUPS_A_TURN) if groups % n == 0), 1)

    def turn(given: list[Array]) -> list:
        return [function(*(lax.index_in_dim(part, i, keepdims=False) for part in given)) for i in range(at_once)]

    turns = lax.map(turn, [part.reshape(-1, at_once, *part.shape[1:]) for part in parts])
    # Put together here and not in every turn, which would copy them once more.
    return jax.tree.map(lambda *each: jnp.stack(each, 1).reshape(groups, *each[0].shape[1:]), *turns)


def _cut(x: Array, groups: int, loop: bool) -> Parts:
    """[…, C] -> a list of […, C/groups], or for a loop [groups, …, C/groups]."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], groups, -1), -2, 0) if loop else jnp.split(x, groups, axis=-1)


def _spare_channels(inputs: int, outputs: int, groups: int) -> int:
    """Channels of zeros to add to the inputs of each group's convolution, of which there are many or it gains none."""
    return SPARE_CHANNELS if inputs == 16 and outputs <= 16 and groups >= GROUPS_A_TURN else 0


def _widened(parts: Parts, axis: int, spare: int) -> Parts:
    """Lengthens parts by zeros along an axis, counted from the last."""
    if not spare:
        return parts
    return jax.tree.map(
        lambda part: jnp.pad(part, [(0, 0)] * (part.ndim + axis) + [(0, spare)] + [(0, 0)] * (-1 - axis)), parts
    )


def _join(parts: Parts, loop: bool) -> Array:
    """The reverse of `_cut`."""
    if loop:
        x = jnp.moveaxis(parts, 0, -2)
        x = x.reshape(*x.shape[:-2], -1)
    else:
        x = jnp.concatenate(parts, axis=-1)
    return lax.optimization_barrier(x)
