"""Grouped convolution behind one function, in several interchangeable formulations.

On a CPU, XLA's own weight gradient of a grouped convolution is 30 to 270 times slower than it has to be,
and no single replacement wins at every shape: a dense convolution a group is fastest on large images, one
after the other in the program or, where that would make it large, in a loop; a batched matrix product is
fastest on small ones, and depthwise kernels want plain shifted multiply-adds. Accelerators have a native
kernel. All of them compute the same numbers; `choose_method` is the only place that knows which one to take.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficientnet.errors import ConfigError

Padding = Literal['same', 'symmetric']
Pads = tuple[tuple[int, int], tuple[int, int]]  # (before, after) of height and of width, in pixels
Parts = Array | Sequence[Array]  # of the groups
LAYOUT = ('NHWC', 'HWIO', 'NHWC')
NO_PADS = ((0, 0), (0, 0))

# Largest side, in output pixels, of an image that is small to a CPU. fp32, groups of 16, stride 1, two cores with
# AVX2, loop against patches, forward + backward in ms: 8x4x4x768 k5 14 against 25, k3 6.5 against 5.9; 64x4x4x288 k5
# 22 against 53; 32x2x2x192 k5 2.1 against 1.5; 32x1x1x384 k3 0.5 against 0.3.
SMALL_SIDE = 2

# Most groups that are written out one by one, in place of a loop. A weight update of B0 G16 (8x128x128), two cores with
# AVX-512, with 20, 28 and all (48): 148, 145, 148 ms, compiling in 23, 26, 33 s; with 10, while sums over pixels were
# still plain, 166 ms where it took 156 with 20.
FEW_GROUPS = 20

# Fewest groups in a turn of the loop: XLA shares what is ready between its threads only if that is more than nine
# operations. The same update with one, four and ten or more, 10 groups written out, sums plain: 181, 168, 166 ms.
GROUPS_A_TURN = 10

# XLA gives convolutions with more than 16 channels on either side to a library (YNN) that is faster at 16 as well, but
# runs small ones on the thread that it is called on. With 4 channels of zeros beside 16, one core with AVX-512, us:
# 8x8x8 k5 92 against 55, 8x16x16 k5 326 against 171, 8x64x64 k3 1,746 against 1,140 (Eigen with two: 935).
SPARE_CHANNELS = 4

# Most samples for which the weight gradient has its image padded beforehand, since XLA's convolution is slow to pad
# one that has the few samples for channels. Inside it against beforehand: 4x80x80x48 k3 36 against 22; 4x20x20x160 k3
# 11 against 6.8; 12x8x8x128 k5 7.4 against 6.1; 20x8x8x128 k5 13.1 against 13.9.
FEW_SAMPLES = 12


def grouped_conv(
    x: Array,
    kernel: Array,
    *,
    stride: int = 1,
    groups: int = 1,
    padding: Padding = 'same',
    method: str = 'auto',
) -> Array:
    """Two-dimensional convolution in which group g of the outputs sees only group g of the inputs.

    y[n, h, w, o] = sum over i, j, c of x[n, h*stride + i - before, w*stride + j - before, g*C/G + c]
    * kernel[i, j, c, o], with g = o // (O/G) and zeros outside the image. Products of 16-bit inputs are
    accumulated in fp32, in the gradients too; differentiable in both arguments.

    Args:
        x: images [N, H, W, C].
        kernel: [k, k, C/groups, O].
        stride: step in pixels, the same in both directions.
        groups: number of groups G; contiguous channels form a group.
        padding: 'same' pads as TensorFlow does, so that ceil(H/stride) rows come out, the odd pixel below
            and to the right; 'symmetric' pads k // 2 on every side, as PyTorch models do.
        method: a key of METHODS, or 'auto' for `choose_method`.

    Returns:
        [N, H', W', O] in the dtype of x.

    Raises:
        ConfigError: shapes, padding or method do not fit together.
    """
    _check_shapes(x, kernel, stride, groups)
    height = _pad_amounts(x.shape[1], kernel.shape[0], stride, padding)
    width = _pad_amounts(x.shape[2], kernel.shape[1], stride, padding)
    rows, height = _live_taps(x.shape[1], kernel.shape[0], stride, height)
    columns, width = _live_taps(x.shape[2], kernel.shape[1], stride, width)
    kernel, pads = kernel[rows, columns], (height, width)
    if method == 'auto':
        method = choose_method(x.shape, kernel.shape, stride, groups)
    if method not in METHODS:
        raise ConfigError(f'conv_method={method!r} must be auto, {", ".join(METHODS)}')
    # Matrix units keep their partial sums in fp32; on a CPU nothing promises it, so the inputs are widened.
    compute = jnp.float32 if jax.default_backend() == 'cpu' else x.dtype
    y = METHODS[method](x.astype(compute), kernel.astype(compute), stride, groups, pads)
    return y.astype(x.dtype)


def choose_method(x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], stride: int, groups: int) -> str:
    """Picks the fastest formulation for a shape on the default backend.

    Args:
        x_shape: shape of the images, [N, H, W, C].
        kernel_shape: shape of the kernel, [k, k, C/groups, O].
        stride: step in pixels.
        groups: number of groups.

    Returns:
        A key of METHODS.
    """
    height, width, inputs, outputs = kernel_shape
    on_cpu = jax.default_backend() == 'cpu'
    if groups == 1:
        return 'matmul' if height == width == 1 else ('dense' if on_cpu else 'native')
    if not on_cpu:
        return 'native'
    if inputs == 1 and outputs == groups:
        return 'taps'
    shorter_side = -(-min(x_shape[1:3]) // stride)
    if shorter_side <= SMALL_SIDE:
        return 'patches'
    return 'split' if groups <= FEW_GROUPS else 'loop'


def _native(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """XLA's convolution with a group count."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=LAYOUT, feature_group_count=groups
    )


def _split(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """One dense convolution a group, concatenated."""
    return _conv_by_group(x, kernel, stride, groups, pads, False)


def _loop(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """One dense convolution in a loop over groups: slower than `split` by some percent, but a small program."""
    return _conv_by_group(x, kernel, stride, groups, pads, True)


def _dense(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """XLA's convolution without groups, with gradients that are fast inside loops too."""
    if groups != 1:
        raise ConfigError(f'conv_method=dense must have 1 group, got {groups}')
    return _conv_by_group(x, kernel, stride, 1, pads, False)


def _patches(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """All taps of a pixel side by side, then one matrix product batched over groups.

    Groups become the leading axis before the taps are gathered: XLA would otherwise transpose the k*k times
    larger patches.
    """
    n, h, w, channels = x.shape
    taps_h, taps_w, inputs, outputs = kernel.shape
    x = x.reshape(n, h, w, groups, channels // groups).transpose(3, 0, 1, 2, 4)
    views = _shifted_views(x.reshape(groups * n, h, w, inputs), taps_h, taps_w, stride, pads)
    _, h, w, _ = views[0].shape
    patches = jnp.concatenate(views, axis=3).reshape(groups, n * h * w, taps_h * taps_w * inputs)
    weights = kernel.reshape(taps_h * taps_w * inputs, groups, outputs // groups).transpose(1, 0, 2)
    y = jnp.matmul(patches, weights).reshape(groups, n, h, w, outputs // groups)
    return y.transpose(1, 2, 3, 0, 4).reshape(n, h, w, outputs)


def _taps(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """Depthwise: one multiply-add a tap over shifted views."""
    if kernel.shape[2] != 1 or kernel.shape[3] != groups:
        raise ConfigError(f'conv_method=taps must have 1 input and output channel a group, got {kernel.shape}')
    return _depthwise(x, kernel, stride, pads)


def _matmul(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """A 1x1 kernel is a matrix product over channels."""
    if kernel.shape[:2] != (1, 1) or groups != 1:
        raise ConfigError(f'conv_method=matmul must have a 1x1 kernel and 1 group, got {kernel.shape}, {groups}')
    (view,) = _shifted_views(x, 1, 1, stride, pads)
    return jnp.matmul(view.reshape(-1, x.shape[3]), kernel[0, 0]).reshape(*view.shape[:3], kernel.shape[3])


METHODS: dict[str, Callable[[Array, Array, int, int, Pads], Array]] = {
    'native': _native,
    'dense': _dense,
    'split': _split,
    'loop': _loop,
    'patches': _patches,
    'taps': _taps,
    'matmul': _matmul,
}


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Sum over taps of shifted view times weight, in fp32; x [N, H, W, C], kernel [k, k, 1, C]."""
    taps_h, taps_w, _, channels = kernel.shape
    weights = kernel.astype(jnp.float32).reshape(taps_h * taps_w, 1, 1, 1, channels)
    views = _shifted_views(x, taps_h, taps_w, stride, pads)
    total = sum(view.astype(jnp.float32) * weight for view, weight in zip(views, weights, strict=True))
    return total.astype(x.dtype)


def _sum_of_products(x: Array, y: Array) -> Array:
    """Sum of x · y over all but the channels, [N, H, W, C] -> [C], in fp32.

    Samples are added up one by one as one loop over pixels, which reads both where they lie. A plain sum over all
    three dimensions would have XLA on a CPU copy every shifted view first.
    """
    if jax.default_backend() != 'cpu':
        return (x.astype(jnp.float32) * y.astype(jnp.float32)).sum((0, 1, 2))
    pairs = zip(x.astype(jnp.float32), y.astype(jnp.float32), strict=True)
    return lax.optimization_barrier(sum(a * b for a, b in pairs)).sum((0, 1))


def _depthwise_forward(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return _depthwise(x, kernel, stride, pads), (x, kernel)


def _depthwise_backward(stride: int, pads: Pads, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    taps = kernel.shape[:2]
    views = _shifted_views(x, *taps, stride, pads)
    dkernel = jnp.stack([_sum_of_products(view, dy) for view in views])

    # The input gradient is the same convolution with the kernel turned by 180 degrees, over the output
    # gradient spread out by the stride and padded so that the size of x comes out.
    spread = [(low, high, stride - 1) for low, high in _gradient_pads(x, kernel, dy, stride, pads)]
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *spread, (0, 0, 0)))
    dx = _depthwise(dy, kernel[::-1, ::-1], 1, NO_PADS)
    return dx.astype(x.dtype), dkernel.reshape(kernel.shape).astype(kernel.dtype)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _conv_by_group(x: Array, kernel: Array, stride: int, groups: int, pads: Pads, loop: bool) -> Array:
    """One dense convolution a group, x [N, H, W, C], kernel [k, k, C/groups, O].

    XLA on CPU has a fast convolution for one order of dimensions, into which it brings others only outside of loops;
    a weight gradient in the order that autodiff gives it ran 4 times slower inside the loop over micro-batches. The
    gradients here are convolutions in that one order wherever they stand.

    What is cut into groups and what is put together from them is kept from being fused with its surroundings: XLA
    would otherwise compute the norm before the convolution anew in every group, and again, pixel by pixel, in the
    transposition that the weight gradient needs.
    """
    return _by_group_forward(x, kernel, stride, groups, pads, loop)[0]


def _by_group_forward(
    x: Array, kernel: Array, stride: int, groups: int, pads: Pads, loop: bool
) -> tuple[Array, tuple[Parts, Array]]:
    spare = _spare_channels(kernel.shape[2], kernel.shape[3] // groups, groups)
    x = lax.optimization_barrier(_widened(_cut(x, groups, loop), -1, spare))
    kernels = _widened(_cut(kernel, groups, loop), -2, spare)
    conv = partial(_conv, stride=stride, pads=pads, dilation=1)
    return _join(_each(conv, loop, x, kernels), loop), (x, kernel)


def _by_group_backward(
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


_conv_by_group.defvjp(_by_group_forward, _by_group_backward)


@partial(jax.jit, static_argnames=('stride', 'pads', 'dilation'))  # traced once a shape, as the gradients are
def _conv(x: Array, kernel: Array, stride: int, pads: Pads, dilation: int) -> Array:
    """Convolution without groups, x [N, H, W, C], kernel [k, k, C, O] with its taps `dilation` apart.

    XLA's fast convolution takes no kernel that is larger than the image: that one is padded before.
    """
    if any(tap > side for tap, side in zip(kernel.shape[:2], x.shape[1:3], strict=True)):
        x, pads = _padded(x, pads), NO_PADS
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, rhs_dilation=(dilation, dilation), dimension_numbers=LAYOUT
    )


@partial(jax.jit, static_argnames=('stride', 'pads', 'shape'))
def _image_gradient(dy: Array, kernel: Array, stride: int, pads: Pads, shape: tuple[int, ...]) -> Array:
    """Pulls dy [N, H', W', O], or with spare channels, back to the image of a shape [N, H, W, C].

    Pixel s·a + p of the padded image meets only taps p, p + s, p + 2·s, … of the kernel. Each of the s phases p, in
    both directions, is therefore a convolution of dy with a part of the kernel, and together they are one, with s·s
    times the channels; spreading dy out by the stride instead would multiply mostly zeros.
    """
    rows, columns, inputs, outputs = kernel.shape
    kernel = jnp.pad(kernel, ((0, -rows % stride), (0, -columns % stride), (0, 0), (0, 0)))
    phases = kernel.reshape(-(-rows // stride), stride, -(-columns // stride), stride, inputs, outputs)
    turned = phases[::-1, :, ::-1].transpose(0, 2, 5, 1, 3, 4)
    turned = turned.reshape(*turned.shape[:3], stride * stride * inputs)
    around = tuple(
        # In the padded image the first pixel has a = before ÷ s, the last a = (size + before − 1) ÷ s.
        (turned.shape[axis] - 1 - before // stride, (shape[axis + 1] + before - 1) // stride + 1 - dy.shape[axis + 1])
        for axis, (before, _) in enumerate(pads)
    )
    dx = _conv(dy, _widened(turned, -2, dy.shape[3] - outputs), 1, around, 1)
    n, height, width, _ = dx.shape
    dx = dx.reshape(n, height, width, stride, stride, inputs).transpose(0, 1, 3, 2, 4, 5)
    dx = dx.reshape(n, height * stride, width * stride, inputs)
    top, left = (before % stride for before, _ in pads)
    return dx[:, top : top + shape[1], left : left + shape[2]]


@partial(jax.jit, static_argnames=('stride', 'pads', 'shape'))
def _kernel_gradient(x: Array, dy: Array, stride: int, pads: Pads, shape: tuple[int, ...]) -> Array:
    """Pulls dy back to the kernel of a shape [k, k, C, O]: x convolved with dy, channels in the place of samples.

    Returns:
        [C, k, k, O].
    """
    reach = tuple(
        (before, shape[axis] + (dy.shape[axis + 1] - 1) * stride - x.shape[axis + 1] - before)
        for axis, (before, _) in enumerate(pads)
    )
    turned = x.transpose(3, 1, 2, 0)
    if x.shape[0] <= FEW_SAMPLES:
        turned, reach = _padded(turned, reach), NO_PADS
    return _conv(turned, dy.transpose(1, 2, 0, 3), 1, reach, stride)


def _padded(x: Array, pads: Pads) -> Array:
    """Puts zeros around the pixels of x [N, H, W, C], or cuts off what is negative, before whatever follows."""
    return lax.optimization_barrier(
        lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)))
    )


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


def _gradient_pads(x: Array, kernel: Array, dy: Array, stride: int, pads: Pads) -> Pads:
    """Zeros around the spread-out output gradient with which a full convolution gives back the size of x."""
    return tuple(
        (kernel.shape[axis] - 1 - before, x.shape[axis + 1] + before - (dy.shape[axis + 1] - 1) * stride - 1)
        for axis, (before, _) in enumerate(pads)
    )


def _shifted_views(x: Array, taps_h: int, taps_w: int, stride: int, pads: Pads) -> list[Array]:
    """The padded image as each tap of the kernel sees it, row by row: taps_h * taps_w of [N, H', W', C]."""
    if pads != NO_PADS:
        # Computed once: XLA would fuse padding, and the norm before it, into the loop of every tap.
        x = _padded(x, pads)
    span_h, span_w = x.shape[1] - taps_h + 1, x.shape[2] - taps_w + 1
    offsets = [(i, j) for i in range(taps_h) for j in range(taps_w)]
    return [x[:, i : i + span_h : stride, j : j + span_w : stride] for i, j in offsets]


def _pad_amounts(size: int, taps: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Zeros (before, after) one dimension of `size` pixels."""
    if padding == 'symmetric':
        return taps // 2, taps // 2
    if padding != 'same':
        raise ConfigError(f'padding={padding!r} must be same or symmetric')
    total = max((-(-size // stride) - 1) * stride + taps - size, 0)
    return total // 2, total - total // 2


def _live_taps(size: int, taps: int, stride: int, pad: tuple[int, int]) -> tuple[slice, tuple[int, int]]:
    """The taps of one dimension that ever meet the image, and the padding that is left without the others.

    On images smaller than the kernel most taps only ever see zeros: of 5x5 taps a 2x2 image meets 3x3.
    """
    before, after = pad
    count = (size + before + after - taps) // stride + 1
    live = [tap for tap in range(taps) if any(0 <= i * stride + tap - before < size for i in range(count))]
    first, last = live[0], live[-1]
    return slice(first, last + 1), (before - first, after - (taps - 1 - last))


def _check_shapes(x: Array, kernel: Array, stride: int, groups: int) -> None:
    if stride < 1 or x.ndim != 4 or kernel.ndim != 4 or min(x.shape[1:3]) < 1:
        raise ConfigError(
            f'stride={stride} must be at least 1, x {x.shape} be [N, H, W, C], '
            f'kernel {kernel.shape} [k, k, C/groups, O]'
        )
    inputs, outputs = kernel.shape[2:]
    if x.shape[3] != inputs * groups or outputs % groups:
        raise ConfigError(f'groups={groups} must divide x {x.shape} into kernel {kernel.shape}')
