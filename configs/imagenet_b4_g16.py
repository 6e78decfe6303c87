"""The headline run: EfficientNet-B4 G16 on ImageNet, 350 epochs at 380 pixels, 16.16, LARS, global batch 6144.

python main.py --config=configs/imagenet_b4_g16.py:pod256 --workdir=runs/b4

| argument | devices | replicas × stages | micro-batch × accumulation |
| --- | --- | --- | --- |
| pod16 | 16 | 8 × 2 | 3 × 256 |
| pod32 | 32 | 16 × 2 | 3 × 128 |
| pod64 | 64 | 32 × 2 | 3 × 64 |
| pod128 | 128 | 64 × 2 | 3 × 32 |
| pod256 | 256 | 128 × 2 | 3 × 16 |
| gpu8 | 8 | 8 × 1 | 32 × 24 |
| runlocal | 2 | 1 × 2 | 3 × 8 |

Published by the reference for the first five: 82.54 ± 0.13 % in under two hours on 256 devices. Here only runlocal
has been run to its end: a narrow, shallow B4 at 96 pixels on the two photographs that come with scikit-learn.

python main.py --config=configs/imagenet_b4_g16.py:runlocal --cpu_devices=2 --workdir=runs/local

ImageNet is read through TFDS, which has to have prepared it; --config.dataset=imagenet_tfrecords
--config.input.dir=DIR reads the original 1024 + 128 TFRecord shards, with runlocal too. Any other layout:
--config.replicas=R --config.micro_batch=M --config.splits=… with 6144 = M × R × a whole number.
"""

import ml_collections

from configs import arguments
from configs.imagenet import imagenet_config

REPLICAS = {'pod16': 8, 'pod32': 16, 'pod64': 32, 'pod128': 64, 'pod256': 128}


def get_config(argument: str = '') -> ml_collections.ConfigDict:
    """Returns the recipe.

    Args:
        argument: A system, see above; pod16 if left out.
    """
    (system,) = arguments.parse(argument, (*REPLICAS, 'gpu8', 'runlocal'))
    config = imagenet_config('b4')
    config.epochs = 350.0
    config.global_batch = 6144
    config.model.group_size = 16
    config.model.expand_ratio = 4
    config.model.norm = 'group'
    config.model.survival = 0.8
    config.precision.policy = '16.16'
    config.precision.initial_loss_scale = 128.0
    config.optimizer.name = 'lars'
    config.optimizer.rate_per_example = 2.0**-9.5
    config.optimizer.momentum = 0.885
    config.optimizer.weight_decay = 2.5e-6
    config.optimizer.trust_coefficient = 0.001
    config.schedule.kind = 'polynomial'
    config.schedule.power = 2.0
    config.schedule.end_ratio = 1e-5
    config.schedule.warmup = '70 epochs'
    config.averaging.epoch_decay = 0.97
    config.micro_batch = 3
    config.splits = 'block4a'
    if system in REPLICAS:
        config.replicas = REPLICAS[system]
    elif system == 'gpu8':
        config.replicas, config.micro_batch, config.splits = 8, 32, 'auto'
    else:
        _make_local(config)
    return config


def _make_local(config: ml_collections.ConfigDict) -> None:
    """Shrinks the run to minutes on two cores, with every part of the big one in use."""
    config.dataset = 'sample_photos'
    config.steps = 20
    config.global_batch = 24
    config.replicas = 1
    config.image_size = 96
    config.model.width = 0.5
    config.model.depth = 0.25
    config.schedule.warmup = '20 %'
    config.checkpoint.every = '5 steps'
    config.evaluation.every = '10 steps'
    config.evaluation.batch = 4
    config.log_every = '1 steps'
