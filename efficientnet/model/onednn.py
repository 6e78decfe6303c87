"""oneDNN's convolutions, which XLA for x86 contains but gives no convolution to by itself.

PyTorch convolves with the same library. A grouped convolution is one call of it in each direction and need not be cut
into groups: forward it takes 0.2 to 0.6 of the time of a dense convolution a group (conv_by_group.py), and there is
hardly anything to compile. The call is not documented: it is used for versions of XLA that it was tried with, and for
no others.

XLA cannot write a program with such calls to JAX's cache of compiled programs, and does not notice: it takes the call
for one of another kind. Tracing one therefore ends all writing to that cache for the rest of the process.
"""

import functools
import json
import math
import platform
import sys

import jax
import jax.numpy as jnp
import jaxlib
from jax import Array, lax

from efficientnet.errors import ConfigError
from efficientnet.model import depthwise
from efficientnet.model.conv_geometry import Pads, image_gradient, kernel_gradient_pads, padded

VERSIONS = ('0.10.2',)  # of jaxlib

REGISTER = 16  # fp32 numbers in a register of 512 bits: what the library computes at once, where there are as many

# Fewest rows of images that are worth cutting into strips: 4x80x80x48 k3 5.8 against 3.8 ms, 4x40x40x128 k3 5.5 against
# 3.0, 4x20x20x224 k5 1.8 against 1.6; with two strips 8x32x32x96 k3 3.0 against 2.6, 8x16x16x160 k5 1.4 against 1.8.
FEW_ROWS = 20


def available() -> bool:
    """Tells whether programs of the default backend can call oneDNN."""
    here = sys.platform == 'linux' and platform.machine() == 'x86_64'
    return here and jaxlib.__version__ in VERSIONS and jax.default_backend() == 'cpu'


def check_available() -> None:
    """Raises ConfigError where programs cannot call oneDNN."""
    if not available():
        raise ConfigError(
            f'conv_method=onednn needs an x86 CPU under Linux and jaxlib {" or ".join(VERSIONS)}; '
            f'this is {jax.default_backend()} and {jaxlib.__version__}'
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """Grouped convolution in fp32, x [N, H, W, C], kernel [k, k, C/groups, O]."""
    return _forward(x, kernel, stride, groups, pads)[0]


def _forward(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    # What comes before would otherwise be computed anew in the transposition that the kernel's gradient needs.
    x = lax.optimization_barrier(x)
    return _convolve(x, kernel, 'HWIO', groups, pads, strides=(stride, stride)), (x, kernel)


def _backward(stride: int, groups: int, pads: Pads, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    x, dy = lax.optimization_barrier((x, dy))  # as the transposition of x would be made in the forward, and kept

    def convolve(dy: Array, kernel: Array, pads: Pads) -> Array:
        return _convolve(dy, kernel, 'HWIO', groups, pads)

    dx = image_gradient(dy, kernel, stride, groups, pads, x.shape, convolve)
    if kernel.shape[2] == 1 and kernel.shape[3] == groups:
        return dx, depthwise.kernel_gradient(x, dy, kernel, stride, pads)
    return dx, _kernel_gradient(x, dy, kernel.shape, stride, groups, pads)


conv.defvjp(_forward, _backward)


def _kernel_gradient(x: Array, dy: Array, shape: tuple[int, ...], stride: int, groups: int, pads: Pads) -> Array:
    """Pulls dy back to the kernel of a shape [k, k, C/groups, O]: x convolved with dy, samples for channels.

    The channels of a group become a third dimension of the image, of which the kernel covers one: a row of results in
    it, for 16 times as many numbers, is what the library keeps in registers.
    """
    around = kernel_gradient_pads(x, dy, shape[:2], stride, pads)
    strips = _strips(*dy.shape[:2])
    if strips > 1:
        x, around = padded(x, (around[0], (0, 0))), ((0, 0), around[1])
        rows = dy.shape[1] // strips
        firsts = range(0, dy.shape[1] * stride, rows * stride)
        x = jnp.stack([x[:, first : first + (rows - 1) * stride + shape[0]] for first in firsts], 1)
        x, dy = x.reshape(-1, *x.shape[2:]), dy.reshape(-1, rows, *dy.shape[2:])
    n, height, width, channels = x.shape
    turned = x.reshape(n, height, width, groups, channels // groups).transpose(1, 2, 4, 3, 0)
    turned = turned.reshape(1, height, width, channels // groups, groups * n)
    (dkernel,) = _convolve(turned, dy[:, :, :, None], 'IHWDO', groups, (*around, (0, 0)), dilations=(stride, stride, 1))
    return dkernel


def _strips(samples: int, rows: int) -> int:
    """Strips into which to cut large images, each for a sample, where there are fewer samples than fill a register."""
    strips = REGISTER // samples if rows >= FEW_ROWS else 1
    while strips > 1 and (rows % strips or rows // strips < FEW_ROWS // 4):
        strips //= 2
    return strips


def _convolve(
    x: Array,
    kernel: Array,
    layout: str,
    groups: int,
    pads: tuple[tuple[int, int], ...],
    strides: tuple[int, ...] | None = None,
    dilations: tuple[int, ...] | None = None,
) -> Array:
    """Calls the library.

    Args:
        x: Images [N, …, C] in fp32, of two or three dimensions.
        kernel: In fp32.
        layout: Of the kernel: a letter a dimension, I for C/groups, O for outputs, others in the order of x's.
        groups: Number of groups.
        pads: Zeros before and after, of each dimension of the image; a negative number cuts pixels off.
        strides: Steps; by default 1.
        dilations: How far the kernel's pixels are apart; by default 1.

    Returns:
        [N, …, O].
    """
    jax.config.update('jax_persistent_cache_min_compile_time_secs', math.inf)  # see above
    kept = [
        slice(max(-before, 0), side - max(-after, 0)) for side, (before, after) in zip(x.shape[1:-1], pads, strict=True)
    ]
    x, pads = x[:, *kept], [(max(before, 0), max(after, 0)) for before, after in pads]
    places = [place for place, letter in enumerate(layout) if letter not in 'IO']
    window = [kernel.shape[place] for place in places]
    strides, dilations = strides or (1,) * len(window), dilations or (1,) * len(window)
    sides = [
        (side + sum(pad) - (taps - 1) * dilation - 1) // stride + 1
        for side, pad, taps, stride, dilation in zip(x.shape[1:-1], pads, window, strides, dilations, strict=True)
    ]
    image = {
        'dims': x.ndim,
        'data': {'batch_dim': 0, 'feature_dim': x.ndim - 1, 'spatial_dims': list(range(1, x.ndim - 1))},
    }
    weights = {
        'input_feature_dim': layout.index('I'),
        'output_feature_dim': layout.index('O'),
        'spatial_dims': places,
    }
    config = {
        'dims': x.ndim,
        'input': image,
        'kernel': {'dims': x.ndim, 'filter': weights},
        'output': image,
        'window': {
            'size': window,
            'pad_left': [before for before, _ in pads],
            'pad_right': [after for _, after in pads],
            'strides': list(strides),
            'window_dilations': list(dilations),
        },
        'feature_groups': groups,
    }
    call = jax.ffi.ffi_call(
        '__onednn$convolution',
        jax.ShapeDtypeStruct((x.shape[0], *sides, kernel.shape[layout.index('O')]), jnp.float32),
        vmap_method='sequential',
        custom_call_api_version=2,
        legacy_backend_config=json.dumps({'onednn_conv_config': config}),
    )
    return call(x, kernel)
