"""What the reference's ImageNet recipes have in common; no recipe by itself.

Sources: "Large scale EfficientNet on IPU hardware" (2022) and its configurations in graphcore/examples; Masters et
al., Making EfficientNet More Efficient (arXiv 2106.03640) and its configurations in graphcore/graphcore-research.
"""

from typing import NamedTuple

import ml_collections

from configs import base


class Size(NamedTuple):
    """What goes with a variant."""

    native: int  # pixels
    half: int  # pixels, with about half the area; equal to `native` modulo 32, so that windows fall alike
    mixup_alpha: float
    cutmix_lambda: float  # 1 = no cutmix


SIZES = {
    'b0': Size(224, 160, 0.1, 1.0),
    'b1': Size(240, 176, 0.1, 0.95),
    'b2': Size(260, 196, 0.1, 0.90),
    'b3': Size(300, 204, 0.2, 0.90),
    'b4': Size(380, 252, 0.2, 0.85),
    'b5': Size(456, 328, 0.2, 0.80),
}


def imagenet_config(variant: str, resolution: str = 'native') -> ml_collections.ConfigDict:
    """Returns configs/base.py with a variant's data and augmentation.

    Args:
        variant: A key of `SIZES`.
        resolution: 'native' or 'half'.
    """
    size = SIZES[variant]
    config = base.get_config()
    config.dataset = 'imagenet2012'
    config.input.test_split = 'validation'
    config.image_size = getattr(size, resolution)
    config.model.variant = variant
    config.augment.mixup_alpha = size.mixup_alpha
    # The reference writes L = 0.85 and leaves a micro-batch alone with probability 1.55 L − 0.96.
    config.augment.cutmix_probability = round(1.96 - 1.55 * size.cutmix_lambda, 4) if size.cutmix_lambda < 1 else 0.0
    return config
