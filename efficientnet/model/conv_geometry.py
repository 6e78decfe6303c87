"""What the formulations of a convolution share: padding, shifted views, and the way back through a stride."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from efficientnet.errors import ConfigError

Padding = Literal['same', 'symmetric']
Pads = tuple[tuple[int, int], tuple[int, int]]  # (before, after) of height and of width, in pixels
NO_PADS = ((0, 0), (0, 0))


def pad_amounts(size: int, taps: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Zeros (before, after) one dimension of `size` pixels.

    Raises:
        ConfigError: Unknown padding.
    """
    if padding == 'symmetric':
        return taps // 2, taps // 2
    if padding != 'same':
        raise ConfigError(f'padding={padding!r} must be same or symmetric')
    total = max((-(-size // stride) - 1) * stride + taps - size, 0)
    return total // 2, total - total // 2


def live_taps(size: int, taps: int, stride: int, pad: tuple[int, int]) -> tuple[slice, tuple[int, int]]:
    """The taps of one dimension that ever meet the image, and the padding that is left without the others.

    On images smaller than the kernel most taps only ever see zeros: of 5x5 taps a 2x2 image meets 3x3.
    """
    before, after = pad
    count = (size + before + after - taps) // stride + 1
    live = [tap for tap in range(taps) if any(0 <= i * stride + tap - before < size for i in range(count))]
    first, last = live[0], live[-1]
    return slice(first, last + 1), (before - first, after - (taps - 1 - last))


def padded(x: Array, pads: Pads) -> Array:
    """Puts zeros around the pixels of x [N, H, W, C], or cuts off what is negative, before whatever follows."""
    return lax.optimization_barrier(
        lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)))
    )


def shifted_views(x: Array, taps_h: int, taps_w: int, stride: int, pads: Pads) -> list[Array]:
    """The padded image as each tap of the kernel sees it, row by row: taps_h * taps_w of [N, H', W', C]."""
    if pads != NO_PADS:
        # Computed once: XLA would fuse padding, and the norm before it, into the loop of every tap.
        x = padded(x, pads)
    span_h, span_w = x.shape[1] - taps_h + 1, x.shape[2] - taps_w + 1
    offsets = [(i, j) for i in range(taps_h) for j in range(taps_w)]
    return [x[:, i : i + span_h : stride, j : j + span_w : stride] for i, j in offsets]


def image_gradient(
    dy: Array,
    kernel: Array,
    stride: int,
    groups: int,
    pads: Pads,
    shape: tuple[int, ...],
    convolve: Callable[[Array, Array, Pads], Array],
) -> Array:
    """Pulls dy [N, H', W', O] back to the image of a shape [N, H, W, C], by one convolution without a stride.

    Pixel s·a + p of the padded image meets only taps p, p + s, p + 2·s, … of the kernel. Each of the s phases p, in
    both directions, is therefore a convolution of dy with a part of the kernel, and together they are one, with s·s
    times the channels; spreading dy out by the stride instead would multiply mostly zeros.

    Args:
        dy: What is pulled back; it may have more channels than the kernel has outputs, if `convolve` can take them.
        kernel: [k, k, C/groups, O].
        stride: s, of the convolution whose gradient this is, as are the next two.
        groups: Number of groups.
        pads: Of its image.
        shape: Of its image.
        convolve: Convolves dy with a kernel [k', k', O/groups, groups·s·s·C/groups] and pads, in as many groups.
    """
    rows, columns, inputs, outputs = kernel.shape
    kernel = jnp.pad(kernel, ((0, -rows % stride), (0, -columns % stride), (0, 0), (0, 0)))
    down, across = -(-rows // stride), -(-columns // stride)
    phases = kernel.reshape(down, stride, across, stride, inputs, groups, outputs // groups)
    turned = phases[::-1, :, ::-1].transpose(0, 2, 6, 5, 1, 3, 4).reshape(down, across, outputs // groups, -1)
    around = tuple(
        # In the padded image the first pixel has a = before ÷ s, the last a = (size + before − 1) ÷ s.
        (turned.shape[axis] - 1 - before // stride, (shape[axis + 1] + before - 1) // stride + 1 - dy.shape[axis + 1])
        for axis, (before, _) in enumerate(pads)
    )
    dx = convolve(dy, turned, around)
    n, height, width, _ = dx.shape
    dx = dx.reshape(n, height, width, groups, stride, stride, inputs).transpose(0, 1, 4, 2, 5, 3, 6)
    dx = dx.reshape(n, height * stride, width * stride, groups * inputs)
    top, left = (before % stride for before, _ in pads)
    return dx[:, top : top + shape[1], left : left + shape[2]]


def kernel_gradient_pads(x: Array, dy: Array, taps: tuple[int, int], stride: int, pads: Pads) -> Pads:
    """Zeros around x with which as many positions as there are taps come out when it is convolved with dy.

    Args:
        x: Images [N, H, W, C].
        dy: [N, H', W', O]; its pixels are taken `stride` apart.
        taps: Rows and columns of the kernel.
        stride: Of the convolution whose gradient this is.
        pads: Of its image.
    """
    return tuple(
        (before, taps[axis] + (dy.shape[axis + 1] - 1) * stride - x.shape[axis + 1] - before)
        for axis, (before, _) in enumerate(pads)
    )
