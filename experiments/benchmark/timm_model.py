"""timm's EfficientNet of the same architecture: group size, expand ratio and norm as the flags say."""

import functools
from collections.abc import Mapping
from typing import Any
from unittest import mock

from efficientnet.errors import ConfigError
from efficientnet.model.scaling import BASE_STAGES, EXPAND_RATIOS, HEAD_CHANNELS, SE_RATIO, VARIANTS
from experiments.timm_import import import_timm

EPSILON = 1e-3
CLASSES = 10  # of the data set in configs/base.py


def make_model(args: Mapping[str, Any]) -> Any:
    """Builds the network in PyTorch, in training mode.

    timm refuses group sizes that do not divide a block's channels; its rule is replaced by max(channels ÷ size, 1)
    groups, ours and the reference's, where channels divide.

    Args:
        args: The flags of the benchmark.

    Raises:
        ConfigError: A norm that timm does not have.
    """
    import_timm()
    import torch
    from timm.layers import GroupNormAct
    from timm.models import _efficientnet_blocks
    from timm.models._efficientnet_builder import decode_arch_def, round_channels
    from timm.models.efficientnet import EfficientNet

    norms = {
        'group': functools.partial(GroupNormAct, num_groups=4, eps=EPSILON),
        'batch': functools.partial(torch.nn.BatchNorm2d, eps=EPSILON, momentum=0.03),
    }
    if args['norm'] not in norms:
        raise ConfigError(f'--norm={args["norm"]!r} must be one of {", ".join(norms)} to be compared with timm')
    size, variant = args['group_size'], VARIANTS[args['model']]
    expand = EXPAND_RATIOS[size]
    stages = []
    for kernel, repeats, _, outputs, stride, expands in BASE_STAGES:
        kind = f'ir_r{repeats}_k{kernel}_s{stride}_e{expand}' if expands else f'ds_r{repeats}_k{kernel}_s{stride}_e1'
        stages.append([f'{kind}_c{outputs}_se{SE_RATIO}'])
    rounding = functools.partial(round_channels, multiplier=args['width'] or variant.width)
    rule = mock.patch.object(_efficientnet_blocks, 'num_groups', lambda size, channels: max(channels // size, 1))
    with rule:
        return EfficientNet(
            decode_arch_def(stages, args['depth'] or variant.depth, group_size=size),
            num_features=rounding(HEAD_CHANNELS),
            round_chs_fn=rounding,
            norm_layer=norms[args['norm']],
            act_layer=torch.nn.SiLU,
            num_classes=CLASSES,
            drop_rate=variant.dropout,
            drop_path_rate=0.2,
        )
