"""The RMSProp recipe of "Making EfficientNet More Efficient" (arXiv 2106.03640): 350 epochs, batch 768, 16.32.

python main.py --config=configs/imagenet_rmsprop.py:b2,g16,group,half --workdir=runs/b2-g16-group-half

The argument is b0 … b5, g1 | g4 | g16 (channels a group), group | batch | layer_proxy (norm) and native | half
(resolution), in any order; what is left out is b0, g16, group, native. After half resolution comes configs/finetune.py.

Devices: 16, as published: 8 copies over two devices each, or 4 over four. Micro-batches and splits are the
published ones for g1 at native and g16 at either resolution. The others are ours: g4, and g1 at half resolution,
take g1's at native, which need the most memory. Batch norm wants large batches to take statistics over: it runs one
copy a device, micro-batch 6, statistics over all replicas (of 96 images), every block computed again in the
backward. For other systems set --config.replicas, --config.micro_batch and --config.splits (or --config.stages).

No accuracy of these has been measured here.
"""

import ml_collections

from configs import arguments
from configs.imagenet import SIZES, imagenet_config

GROUPS = {'g1': (1, 6), 'g4': (4, 5), 'g16': (16, 4)}  # channels a group, expand ratio
NORMS = ('group', 'batch', 'layer_proxy')
RESOLUTIONS = ('native', 'half')
DEVICES = 16

# Micro-batch and splits of 16 devices.
PUBLISHED = {
    ('g1', 'native'): {
        'b0': (12, 'block3b'),
        'b1': (12, 'block2b,block4a,block5c'),
        'b2': (12, 'block2b,block4a,block5d'),
        'b3': (6, 'block2b,block4a,block5d'),
        'b4': (3, 'block2b,block4b,block6c'),
        'b5': (2, 'block2c,block4a,block5g'),
    },
    ('g16', 'native'): {
        'b0': (12, 'block3b'),
        'b1': (8, 'block4b'),
        'b2': (12, 'block2b,block4a,block5d'),
        'b3': (8, 'block2b,block4b,block5e'),
        'b4': (4, 'block2c,block4c,block6a'),
        'b5': (2, 'block2e,block4f,block6e'),
    },
    ('g16', 'half'): {
        'b0': (24, 'block4b'),
        'b1': (24, 'block2b,block4a,block5d'),
        'b2': (24, 'block2b,block4a,block5d'),
        'b3': (12, 'block2b,block4b,block5e'),
        'b4': (8, 'block2c,block4c,block6a'),
        'b5': (3, 'block2e,block4e,block6c'),
    },
}


def get_config(argument: str = '') -> ml_collections.ConfigDict:
    """Returns the recipe.

    Args:
        argument: Such as 'b2,g16,group,half', see above.
    """
    variant, group, norm, resolution = arguments.parse(argument, tuple(SIZES), ('g16', 'g4', 'g1'), NORMS, RESOLUTIONS)
    config = imagenet_config(variant, resolution)
    config.epochs = 350.0
    set_model(config, group, norm)
    set_rmsprop(config, global_batch=768)
    config.optimizer.rate_per_example = 2.0**-14
    config.schedule.kind = 'exponential'
    config.schedule.decay_rate = 0.97
    config.schedule.decay_every = f'{350 / 146} epochs'  # 146 equal drops
    config.schedule.warmup = '5 epochs'
    config.averaging.epoch_decay = 0.97
    if norm == 'batch':
        config.replicas, config.micro_batch = DEVICES, 6
        config.model.batch_norm_sync = True
        config.recompute = 'block'
    else:
        layouts = PUBLISHED.get((group, resolution), PUBLISHED['g1', 'native'])
        config.micro_batch, config.splits = layouts[variant]
        config.replicas = DEVICES // (len(config.splits.split(',')) + 1)
    return config


def set_model(config: ml_collections.ConfigDict, group: str, norm: str) -> None:
    """Chooses channels a group and norm."""
    config.model.group_size, config.model.expand_ratio = GROUPS[group]
    config.model.norm = norm


def set_rmsprop(config: ml_collections.ConfigDict, global_batch: int) -> None:
    """Sets what the reference's RMSProp has at any rate, and its number formats."""
    config.global_batch = global_batch
    config.precision.policy = '16.32'  # nothing is rounded to 16 bits, so no rounding is chosen
    config.optimizer.name = 'rmsprop'
    config.optimizer.rms_decay = 1 - global_batch * 2.0**-14
    config.optimizer.momentum = 0.9
    config.optimizer.epsilon = 1e-3
    config.optimizer.weight_decay = 1e-5
