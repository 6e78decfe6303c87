"""What each block of a network costs: parameters, multiply-adds, the tensor that enters it, what its backward needs.

Counted from the `ModelSpec` alone, layer by layer in the order of network.py, so that splitting a network into stages
needs neither weights nor an array library. What the backward needs is what automatic differentiation keeps of a
forward pass, tensors with pixels only:

| layer                        | keeps                                              | stored as     |
| ---------------------------- | -------------------------------------------------- | ------------- |
| convolution                  | its input                                          | compute dtype |
| group, batch norm, their swish | its input                                          | compute dtype |
| proxy norm's own norm        | its input, and its input minus the mean            | fp32          |
| swish after it               | its input, the sigmoid, the slope                  | fp32          |
| gate, proxy norm's factor    | what it multiplies                                 | compute dtype |

Under layer_proxy what follows the projection is a group norm. A tensor that two layers
keep counts once. Not counted is what has no pixels: weights, vectors of one number a channel, proxy norm's 200
quantiles a channel. A compiler that fuses well keeps less, by computing cheap tensors twice.
"""

import dataclasses
from typing import NamedTuple

from efficientnet.errors import ConfigError
from efficientnet.model.scaling import BlockSpec, ModelSpec, block_names, boundary_shape

NORM_KEEPS, SWISH_KEEPS = 2, 3  # tensors, see above
FP32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """One block; everything but the parameters is of one image.

    Attributes:
        name: As in `block_names`.
        parameters: Trained numbers.
        macs: Multiply-adds of the forward pass in convolutions, squeeze-and-excite and classifier.
        boundary: Elements of the activation that enters the block.
        kept: Elements kept for the backward in the compute dtype if nothing is computed again, the input included.
        kept_fp32: Elements kept in fp32 whatever the compute dtype.
    """

    name: str
    parameters: int
    macs: int
    boundary: int
    kept: int
    kept_fp32: int

    def kept_bytes(self, itemsize: int) -> int:
        """Returns the bytes kept for the backward of one image, with a compute dtype of `itemsize` bytes."""
        return self.kept * itemsize + self.kept_fp32 * FP32_BYTES


class _Norm(NamedTuple):
    """Parameters a channel of a norm before an activation, and of the one after a projection."""

    activated: int
    project: int


_NORMS = {'group': _Norm(2, 2), 'batch': _Norm(2, 2), 'layer_proxy': _Norm(4, 1)}


class _Layer(NamedTuple):
    """One layer's share of a `BlockCost`."""

    parameters: int
    macs: int = 0
    kept: int = 0
    kept_fp32: int = 0


def block_costs(spec: ModelSpec, image_size: int, *, norm: str = 'group') -> tuple[BlockCost, ...]:
    """Returns the costs of all blocks in order, from 'stem' to 'head'.

    Args:
        spec: The network.
        image_size: Side of the square image in pixels.
        norm: 'group', 'batch' or 'layer_proxy'.

    Raises:
        ConfigError: Unknown norm, or an image without pixels.

    Example:
        sum(block.macs for block in block_costs(model_spec('b0', group_size=1), 224)) is 385,814,752.
    """
    if norm not in _NORMS:
        raise ConfigError(f'norm={norm!r} must be one of {", ".join(_NORMS)}')
    if image_size < 1:
        raise ConfigError(f'image_size={image_size} must be at least 1')
    names = block_names(spec)
    shapes = [boundary_shape(spec, name, image_size) for name in names]
    pixels = [height * width for height, width, _ in shapes]
    layers = [_stem(spec, pixels[0], pixels[1], norm)]
    for block, before, after in zip(spec.blocks, pixels[1:-1], pixels[2:], strict=True):
        layers.append(_mbconv(block, before, after, norm))
    layers.append(_head(spec, shapes[-1][2], pixels[-1], norm))
    costs = []
    for name, own, count, shape in zip(names, layers, pixels, shapes, strict=True):
        parameters, macs, kept, kept_fp32 = map(sum, zip(*own, strict=True))
        costs.append(BlockCost(name, parameters, macs, count * shape[2], kept, kept_fp32))
    return tuple(costs)


def _stem(spec: ModelSpec, before: int, after: int, norm: str) -> list[_Layer]:
    return [
        _conv(3, spec.stem_channels, before, after, kernel=3),
        *_norm_swish(spec.stem_channels, after, norm, divided=True),
    ]


def _mbconv(block: BlockSpec, before: int, after: int, norm: str) -> list[_Layer]:
    expand, gate, mid = [], [], block.mid_channels
    if mid != block.in_channels:
        expand = [_conv(block.in_channels, mid, before, before), *_norm_swish(mid, before, norm, divided=True)]
    if block.se_channels:
        gate = [_dense(mid, block.se_channels), _dense(block.se_channels, mid)]
    return [
        *expand,
        _conv(mid, mid, before, after, kernel=block.kernel, groups=block.groups),
        *_norm_swish(mid, after, norm),
        *gate,
        _conv(mid, block.out_channels, after, after),
        _project_norm(block.out_channels, after, norm),
    ]


def _head(spec: ModelSpec, inputs: int, pixels: int, norm: str) -> list[_Layer]:
    return [
        _conv(inputs, spec.head_channels, pixels, pixels),
        *_norm_swish(spec.head_channels, pixels, norm),
        _dense(spec.head_channels, spec.classes),
    ]


def _conv(inputs: int, outputs: int, before: int, after: int, *, kernel: int = 1, groups: int = 1) -> _Layer:
    weights = kernel**2 * (inputs // groups) * outputs
    return _Layer(weights, weights * after, kept=inputs * before)


def _dense(inputs: int, outputs: int) -> _Layer:
    return _Layer(inputs * outputs + outputs, inputs * outputs)


def _project_norm(channels: int, pixels: int, norm: str) -> _Layer:
    return _Layer(_NORMS[norm].project * channels, kept=channels * pixels)


def _norm_swish(channels: int, pixels: int, norm: str, *, divided: bool = False) -> list[_Layer]:
    """A norm and its activation; `divided` where proxy norm's factor is multiplied into every element at once."""
    parameters, tensor = _NORMS[norm].activated * channels, channels * pixels
    if norm != 'layer_proxy':
        return [_Layer(parameters, kept=tensor)]
    swish = _Layer(0, kept=tensor if divided else 0, kept_fp32=SWISH_KEEPS * tensor)
    return [_Layer(parameters, kept_fp32=NORM_KEEPS * tensor), swish]
