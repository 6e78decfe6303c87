"""Grouped convolution behind one function, in several interchangeable formulations.

On a CPU, XLA's own weight gradient of a grouped convolution is 30 to 270 times slower than it has to be, and no single
replacement wins at every shape. Where oneDNN can be called (onednn.py), it is the fastest of all, but its programs
cannot be cached. Otherwise a dense convolution a group is fastest on large images, one after the other in the program
or, where that would make it large, in a loop (conv_by_group.py); a batched matrix product is fastest on small ones,
and depthwise kernels want plain shifted multiply-adds (depthwise.py). A GPU has good kernels of its own, for groups of
16 channels once some are merged. All of them compute the same numbers of finite ones; `choose_method` and
`choose_library` are the only places that know which one to take.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficientnet.errors import ConfigError
from efficientnet.model import onednn
from efficientnet.model.conv_by_group import LAYOUT, conv_by_group
from efficientnet.model.conv_geometry import Padding, Pads, live_taps, pad_amounts, shifted_views
from efficientnet.model.depthwise import depthwise

# Largest side, in output pixels, of an image that is small to a CPU. fp32, groups of 16, stride 1, two cores with
# AVX2, loop against patches, forward + backward in ms: 8x4x4x768 k5 14 against 25, k3 6.5 against 5.9; 64x4x4x288 k5
# 22 against 53; 32x2x2x192 k5 2.1 against 1.5; 32x1x1x384 k3 0.5 against 0.3.
SMALL_SIDE = 2

# Most groups that are written out one by one, in place of a loop. A weight update of B0 G16 (8x128x128), two cores with
# AVX-512, with 20, 28 and all (48): 148, 145, 148 ms, compiling in 23, 26, 33 s; with 10, while sums over pixels were
# still plain, 166 ms where it took 156 with 20.
FEW_GROUPS = 20

# On a GPU groups of 16 channels are made into one up to so many channels in all, and beyond into groups of so many.
# H200, bfloat16, batch 128, forward and both gradients, ms, as they are, in groups of 32, in one: 112x112x32 k3 1.01,
# -, 0.67; 56x56x96 k5 stride 2 0.79, 0.70, 0.61; 28x28x160 k5 0.55, 0.50, 0.91; 7x7x768 k5 0.29, 0.22, 0.87. Groups of
# 48 and 80 take 1.8 to 2.5 times as long as they are. Other sizes than 16 were not measured.
MERGED_FROM = 16
DENSE_CHANNELS = 96
MERGED_CHANNELS = 32

# Largest side, in pixels, of images for which a network's programs are worth caching more than its convolutions are
# worth taking from oneDNN.
CACHED_SIDE = 32


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
    height = pad_amounts(x.shape[1], kernel.shape[0], stride, padding)
    width = pad_amounts(x.shape[2], kernel.shape[1], stride, padding)
    rows, height = live_taps(x.shape[1], kernel.shape[0], stride, height)
    columns, width = live_taps(x.shape[2], kernel.shape[1], stride, width)
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
    backend = jax.default_backend()
    if groups == 1:
        return 'matmul' if height == width == 1 else ('dense' if backend == 'cpu' else 'native')
    if backend != 'cpu':
        return 'merged' if backend == 'gpu' and inputs == MERGED_FROM else 'native'
    if inputs == 1 and outputs == groups:
        return 'taps'
    shorter_side = -(-min(x_shape[1:3]) // stride)
    if shorter_side <= SMALL_SIDE:
        return 'patches'
    return 'split' if groups <= FEW_GROUPS else 'loop'


def check_method(method: str) -> None:
    """Raises ConfigError unless it is 'auto' or a key of METHODS."""
    if method not in ('auto', *METHODS):
        raise ConfigError(f'conv_method={method!r} must be auto, {", ".join(METHODS)}')


def choose_library(method: str, image_size: int) -> str:
    """Decides whether a network's convolutions are oneDNN's, where nobody has.

    Args:
        method: what was asked for: a key of METHODS or 'auto'.
        image_size: side of the network's images in pixels.

    Returns:
        'onednn' in place of 'auto' if it can be had and gains more than its programs, never cached, take to compile.

    Raises:
        ConfigError: It was asked for and can't be had, or there is no such method.
    """
    check_method(method)
    if method == 'onednn':
        onednn.check_available()
    return 'onednn' if method == 'auto' and image_size > CACHED_SIDE and onednn.available() else method


def _native(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """XLA's convolution with a group count."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=LAYOUT, feature_group_count=groups
    )


def _merged(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """XLA's convolution with fewer, wider groups, whose kernels are zero between what were different groups."""
    taps_h, taps_w, inputs, outputs = kernel.shape
    merged = _merged_groups(inputs, groups)
    kernel = kernel.reshape(taps_h, taps_w, 1, inputs, groups // merged, merged, outputs // groups)
    own = jnp.eye(merged, dtype=bool)[:, None, None, :, None]
    kernel = jnp.where(own, kernel, 0).reshape(taps_h, taps_w, merged * inputs, outputs)
    return _native(x, kernel, stride, groups // merged, pads)


def _merged_groups(inputs: int, groups: int) -> int:
    """How many groups of so many input channels each are merged into one."""
    if inputs * groups <= DENSE_CHANNELS:
        return groups
    return max((n for n in range(1, groups + 1) if groups % n == 0 and n * inputs <= MERGED_CHANNELS), default=1)


def _split(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """One dense convolution a group, concatenated."""
    return conv_by_group(x, kernel, stride, groups, pads, False)


def _loop(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """One dense convolution in a loop over groups: slower than `split` by some percent, but a small program."""
    return conv_by_group(x, kernel, stride, groups, pads, True)


def _dense(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """XLA's convolution without groups, with gradients that are fast inside loops too."""
    if groups != 1:
        raise ConfigError(f'conv_method=dense must have 1 group, got {groups}')
    return conv_by_group(x, kernel, stride, 1, pads, False)


def _patches(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """All taps of a pixel side by side, then one matrix product batched over groups.

    Groups become the leading axis before the taps are gathered: XLA would otherwise transpose the k*k times
    larger patches.
    """
    n, h, w, channels = x.shape
    taps_h, taps_w, inputs, outputs = kernel.shape
    x = x.reshape(n, h, w, groups, channels // groups).transpose(3, 0, 1, 2, 4)
    views = shifted_views(x.reshape(groups * n, h, w, inputs), taps_h, taps_w, stride, pads)
    _, h, w, _ = views[0].shape
    patches = jnp.concatenate(views, axis=3).reshape(groups, n * h * w, taps_h * taps_w * inputs)
    weights = kernel.reshape(taps_h * taps_w * inputs, groups, outputs // groups).transpose(1, 0, 2)
    y = jnp.matmul(patches, weights).reshape(groups, n, h, w, outputs // groups)
    return y.transpose(1, 2, 3, 0, 4).reshape(n, h, w, outputs)


def _taps(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """Depthwise: one multiply-add a tap over shifted views."""
    if kernel.shape[2] != 1 or kernel.shape[3] != groups:
        raise ConfigError(f'conv_method=taps must have 1 input and output channel a group, got {kernel.shape}')
    return depthwise(x, kernel, stride, pads)


def _matmul(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """A 1x1 kernel is a matrix product over channels."""
    if kernel.shape[:2] != (1, 1) or groups != 1:
        raise ConfigError(f'conv_method=matmul must have a 1x1 kernel and 1 group, got {kernel.shape}, {groups}')
    (view,) = shifted_views(x, 1, 1, stride, pads)
    return jnp.matmul(view.reshape(-1, x.shape[3]), kernel[0, 0]).reshape(*view.shape[:3], kernel.shape[3])


def _onednn(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """oneDNN's."""
    onednn.check_available()
    return onednn.conv(x, kernel, stride, groups, pads)


METHODS: dict[str, Callable[[Array, Array, int, int, Pads], Array]] = {
    'native': _native,
    'merged': _merged,
    'dense': _dense,
    'split': _split,
    'loop': _loop,
    'patches': _patches,
    'taps': _taps,
    'matmul': _matmul,
    'onednn': _onednn,
}


def _check_shapes(x: Array, kernel: Array, stride: int, groups: int) -> None:
    if stride < 1 or x.ndim != 4 or kernel.ndim != 4 or min(x.shape[1:3]) < 1:
        raise ConfigError(
            f'stride={stride} must be at least 1, x {x.shape} be [N, H, W, C], '
            f'kernel {kernel.shape} [k, k, C/groups, O]'
        )
    inputs, outputs = kernel.shape[2:]
    if x.shape[3] != inputs * groups or outputs % groups:
        raise ConfigError(f'groups={groups} must divide x {x.shape} into kernel {kernel.shape}')
