"""The scaling rules: from a variant's multipliers to a list of blocks, as pure data.

Everything that needs the shape of the network without running it (the modules, the partition into
pipeline stages, the planner, the parameter-count tests) reads the same `ModelSpec`, so the rules are
stated once and no array library is needed to apply them.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Callable
from typing import Any, NamedTuple

from efficientnet.errors import ConfigError


class Variant(NamedTuple):
    """One row of the tables below.

    Attributes:
        width: multiplier of channels.
        depth: multiplier of repeats.
        dropout: rate before the classifier.
        resolution: native image side in pixels.
        lite: whether it is made for phones: stem, head and the repeats of the first and the last stage are not
            scaled, there is no squeeze-and-excite, and the activation is ReLU6.
    """

    width: float
    depth: float
    dropout: float
    resolution: int
    lite: bool = False


VARIANTS = {
    'b0': Variant(1.0, 1.0, 0.2, 224),
    'b1': Variant(1.0, 1.1, 0.2, 240),
    'b2': Variant(1.1, 1.2, 0.3, 260),
    'b3': Variant(1.2, 1.4, 0.3, 300),
    'b4': Variant(1.4, 1.8, 0.4, 380),
    'b5': Variant(1.6, 2.2, 0.4, 456),
    'b6': Variant(1.8, 2.6, 0.5, 528),
    'b7': Variant(2.0, 3.1, 0.5, 600),
    'lite0': Variant(1.0, 1.0, 0.2, 224, lite=True),
    'lite1': Variant(1.0, 1.1, 0.2, 240, lite=True),
    'lite2': Variant(1.1, 1.2, 0.3, 260, lite=True),
    'lite3': Variant(1.2, 1.4, 0.3, 280, lite=True),
    'lite4': Variant(1.4, 1.8, 0.3, 300, lite=True),
}

# One row a stage of the B0 network: kernel, repeats, input channels, output channels, stride of the first
# block, and whether the blocks expand (the first stage never does).
BASE_STAGES = (
    (3, 1, 32, 16, 1, False),
    (3, 2, 16, 24, 2, True),
    (5, 2, 24, 40, 2, True),
    (3, 3, 40, 80, 2, True),
    (5, 3, 80, 112, 1, True),
    (5, 4, 112, 192, 2, True),
    (3, 1, 192, 320, 1, True),
)
BASE_STRIDES = tuple(stage[4] for stage in BASE_STAGES)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
SE_RATIO = 0.25
ACTIVATIONS = ('swish', 'relu6')

# Expand ratios that keep the parameter count about equal while the spatial convolution grows denser.
EXPAND_RATIOS = {1: 6, 4: 5, 16: 4}


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One MBConv block.

    Attributes:
        name: stage number and letter, e.g. 'block1a'.
        kernel: side of the spatial kernel in pixels.
        stride: stride of the spatial convolution.
        in_channels: channels that enter the block.
        mid_channels: channels of the spatial convolution; equal to `in_channels` when there is no expansion.
        out_channels: channels that leave the block.
        groups: groups of the spatial convolution.
        se_channels: squeezed channels of squeeze-and-excite; 0 = there is none.
        survival: probability that stochastic depth keeps the block's residual branch.
    """

    name: str
    kernel: int
    stride: int
    in_channels: int
    mid_channels: int
    out_channels: int
    groups: int
    se_channels: int
    survival: float

    @property
    def residual(self) -> bool:
        """Whether input and output have the same shape, so that the input is added to the output."""
        return self.stride == 1 and self.in_channels == self.out_channels


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A whole network: stem, blocks in order, head.

    Attributes:
        variant: the name the multipliers came from, 'b0' to 'b7' or 'lite0' to 'lite4'.
        stem_channels: output channels of the stem's 3x3 convolution.
        stem_stride: its stride, 2 (reference) or 1 (small images).
        blocks: the MBConv blocks in order.
        head_channels: output channels of the head's 1x1 convolution.
        classes: number of logits.
        dropout: dropout rate before the classifier.
        activation: 'swish' or 'relu6', throughout.
    """

    variant: str
    stem_channels: int
    stem_stride: int
    blocks: tuple[BlockSpec, ...]
    head_channels: int
    classes: int
    dropout: float
    activation: str = 'swish'


def round_width(channels: int, multiplier: float, divisor: int = 8) -> int:
    """Scales a channel count to the nearest multiple of `divisor` that is not below 90 % of the exact value."""
    exact = channels * multiplier
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * exact else rounded


def model_spec(
    variant: str = 'b0',
    *,
    group_size: int = 16,
    expand_ratio: int | None = None,
    width: float | None = None,
    depth: float | None = None,
    classes: int = 1000,
    stem_stride: int = 2,
    strides: tuple[int, ...] = BASE_STRIDES,
    dropout: float | None = None,
    survival: float = 0.8,
    width_divisor: int = 8,
    se_ratio: float | None = None,
    activation: str | None = None,
) -> ModelSpec:
    """Applies the compound scaling rules.

    Channels are `round_width(base, width)`, repeats `ceil(depth * base)`. A block's spatial convolution has
    `max(mid // group_size, 1)` groups. Block b of B survives with probability `1 - (1 - survival) * b / B`.

    Args:
        variant: 'b0' to 'b7' or 'lite0' to 'lite4'.
        group_size: channels a group of the spatial convolution; 1 is depthwise.
        expand_ratio: expansion of all stages but the first; None takes 6, 5, 4 for group sizes 1, 4, 16.
        width: channel multiplier; None takes the variant's.
        depth: repeat multiplier; None takes the variant's.
        classes: number of logits.
        stem_stride: 1 or 2.
        strides: of the first block of every stage, 1 or 2 each.
        dropout: rate before the classifier, in [0, 1); None takes the variant's.
        survival: survival probability that the last blocks tend to, in (0, 1].
        width_divisor: what all scaled channel counts are multiples of.
        se_ratio: squeezed channels ÷ input channels of a block, 0 for no squeeze-and-excite; None takes the variant's.
        activation: 'swish' or 'relu6'; None takes the variant's.

    Returns:
        The network as data.

    Raises:
        ConfigError: an argument is out of range, or a block's channels do not divide into the groups.

    Source: Tan and Le, EfficientNet (arXiv 1905.11946); Masters et al., Making EfficientNet More Efficient
    (arXiv 2106.03640) for group sizes.
    """
    if variant not in VARIANTS:
        raise ConfigError(f'variant={variant!r} must be one of {", ".join(VARIANTS)}')
    base = VARIANTS[variant]
    width = base.width if width is None else width
    depth = base.depth if depth is None else depth
    dropout = base.dropout if dropout is None else dropout
    se_ratio = (0.0 if base.lite else SE_RATIO) if se_ratio is None else se_ratio
    activation = ('relu6' if base.lite else 'swish') if activation is None else activation
    _require(isinstance(group_size, int) and group_size >= 1, 'group_size', group_size, 'an integer >= 1')
    if expand_ratio is None:
        if group_size not in EXPAND_RATIOS:
            known = ', '.join(map(str, EXPAND_RATIOS))
            raise ConfigError(f'expand_ratio must be given for group_size={group_size}; only {known} have a default')
        expand_ratio = EXPAND_RATIOS[group_size]
    integer_ratio = isinstance(expand_ratio, int) and expand_ratio >= 1
    _require(integer_ratio, 'expand_ratio', expand_ratio, 'an integer >= 1')
    _require(0 < width < math.inf, 'width', width, 'positive')
    _require(0 < depth < math.inf, 'depth', depth, 'positive')
    _require(isinstance(classes, int) and classes >= 1, 'classes', classes, 'an integer >= 1')
    _require(stem_stride in (1, 2) and type(stem_stride) is int, 'stem_stride', stem_stride, '1 or 2')
    strides = tuple(strides)
    fits = len(strides) == len(BASE_STAGES) and all(stride in (1, 2) and type(stride) is int for stride in strides)
    _require(fits, 'strides', strides, f'{len(BASE_STAGES)} numbers, each 1 or 2')
    _require(0 <= dropout < 1, 'dropout', dropout, 'in [0, 1)')
    _require(0 < survival <= 1, 'survival', survival, 'in (0, 1]')
    _require(isinstance(width_divisor, int) and width_divisor >= 1, 'width_divisor', width_divisor, 'an integer >= 1')
    _require(0 <= se_ratio <= 1, 'se_ratio', se_ratio, 'in [0, 1]')
    _require(activation in ACTIVATIONS, 'activation', activation, f'one of {", ".join(ACTIVATIONS)}')

    rounded = functools.partial(round_width, multiplier=width, divisor=width_divisor)
    blocks = _blocks(rounded, depth, group_size, expand_ratio, strides, survival, se_ratio, base.lite)
    _check_groups(variant, blocks, group_size)
    return ModelSpec(
        variant=variant,
        stem_channels=STEM_CHANNELS if base.lite else rounded(STEM_CHANNELS),
        stem_stride=stem_stride,
        blocks=blocks,
        head_channels=HEAD_CHANNELS if base.lite else rounded(HEAD_CHANNELS),
        classes=classes,
        dropout=dropout,
        activation=activation,
    )


def configured_spec(fields: Any, classes: int) -> ModelSpec:
    """Returns what a config's `model` section asks for.

    Args:
        fields: `config.model` of configs/base.py.
        classes: number of logits.
    """
    return model_spec(
        fields.variant,
        group_size=fields.group_size,
        expand_ratio=fields.expand_ratio or None,
        width=fields.width or None,
        depth=fields.depth or None,
        classes=classes,
        stem_stride=fields.stem_stride,
        strides=fields.strides,
        dropout=None if fields.dropout == -1 else fields.dropout,
        survival=fields.survival,
        width_divisor=fields.width_divisor,
        se_ratio=None if fields.se_ratio == -1 else fields.se_ratio,
        activation=fields.activation or None,
    )


def block_names(spec: ModelSpec) -> tuple[str, ...]:
    """Names in execution order: 'stem', 'block1a', ..., 'head'."""
    return ('stem', *(block.name for block in spec.blocks), 'head')


def boundary_shape(spec: ModelSpec, name: str, image_size: int) -> tuple[int, int, int]:
    """Shape of the activation that enters a named block; either kind of padding gives the same.

    Args:
        spec: the network.
        name: one of `block_names(spec)`; 'stem' takes the RGB image itself.
        image_size: side of the square image in pixels.

    Returns:
        (H, W, C).
    """
    _require(name in block_names(spec), 'block', name, f'one of {", ".join(block_names(spec))}')
    if name == 'stem':
        return image_size, image_size, 3
    side, channels = -(-image_size // spec.stem_stride), spec.stem_channels
    for block in spec.blocks:
        if block.name == name:
            break
        side, channels = -(-side // block.stride), block.out_channels
    return side, side, channels


def _require(holds: bool, field: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f'{field}={value!r} must be {wanted}')


def _blocks(
    rounded: Callable[[int], int],
    depth: float,
    group_size: int,
    expand_ratio: int,
    strides: tuple[int, ...],
    survival: float,
    se_ratio: float,
    lite: bool,
) -> tuple[BlockSpec, ...]:
    repeats = [math.ceil(depth * stage[1]) for stage in BASE_STAGES]
    if lite:
        repeats[0], repeats[-1] = BASE_STAGES[0][1], BASE_STAGES[-1][1]
    _require(max(repeats) <= 26, 'depth', depth, 'at most 6.5, so that 26 letters name the blocks of a stage')
    blocks = []
    for number, (kernel, _, inputs, outputs, _, expands) in enumerate(BASE_STAGES, start=1):
        for index in range(repeats[number - 1]):
            fixed = lite and number == 1 and index == 0  # what leaves the stem
            channels = inputs if fixed else rounded(inputs if index == 0 else outputs)
            mid = channels * expand_ratio if expands else channels
            blocks.append(
                BlockSpec(
                    name=f'block{number}{string.ascii_lowercase[index]}',
                    kernel=kernel,
                    stride=strides[number - 1] if index == 0 else 1,
                    in_channels=channels,
                    mid_channels=mid,
                    out_channels=rounded(outputs),
                    groups=max(mid // group_size, 1),
                    se_channels=max(1, int(se_ratio * channels)) if se_ratio else 0,
                    survival=1 - (1 - survival) * len(blocks) / sum(repeats),
                )
            )
    return tuple(blocks)


def _check_groups(variant: str, blocks: tuple[BlockSpec, ...], group_size: int) -> None:
    for block in blocks:
        if block.mid_channels % block.groups:
            mids = {b.mid_channels for b in blocks}
            fits = [size for size in range(1, 33) if all(mid % max(mid // size, 1) == 0 for mid in mids)]
            raise ConfigError(
                f'group_size={group_size} must divide the channels of every block: {block.name} of {variant} '
                f'has {block.mid_channels}, not a multiple of {block.groups} groups; these fit: {fits}'
            )
