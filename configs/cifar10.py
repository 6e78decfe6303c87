"""CIFAR-10 (through TFDS): a small G16 EfficientNet in 16.16 with stochastic rounding.

python main.py --config=configs/cifar10.py --workdir=runs/cifar10

Two cores of an AMD EPYC: 83.8 % of the 10,000 test images (seed 0; averaged weights 83.5 %) after 12.5 epochs, 11
minutes at 1,029 images/s; of an Intel Xeon, a version before, 83.4 % after 23 minutes.

python main.py --config=configs/cifar10.py:large --config.model.conv_method=onednn --workdir=runs/cifar10

That Xeon: 92.86 % (averaged weights 92.97 %) after 60 epochs, 3.2 hours at the 260 images/s that it makes alone.
The network has 80 million multiply-adds an image; oneDNN's programs, which can't be cached, run a quarter faster.
Another 30 epochs from there, with half the rate and more of cutmix: 93.48 % (averaged weights 93.50 %), 1.6 hours more.

python main.py --config=configs/cifar10.py:large --config.model.conv_method=onednn --config.init_from=runs/cifar10
    --config.epochs=30.0 --config.optimizer.rate_per_example=0.00048828125 --config.augment.cutmix_probability=0.6425
    --workdir=runs/cifar10_more
"""

import ml_collections

from configs import arguments, base


def get_config(argument: str = '') -> ml_collections.ConfigDict:
    """Returns the recipe.

    Args:
        argument: 'small', for half an hour on two cores, if left out; or 'large', for hours there.
    """
    (size,) = arguments.parse(argument, ('small', 'large'))
    config = base.get_config()
    config.dataset = 'cifar10'
    config.image_size = 32
    config.epochs = 12.5
    config.global_batch = 64
    config.micro_batch = 64
    config.replicas = 1
    # Sixteen pixels a side from the stem on, eight from stage 3 and four from stage 6. A block a stage leaves no
    # residual connection, and what is plain trains faster if it is shallow: without expansion a block has two
    # convolutions and not three, and the width pays for what they lose.
    config.model.width = 1.5
    config.model.width_divisor = 16
    config.model.depth = 0.25
    config.model.strides = (1, 1, 2, 1, 1, 2, 1)
    config.model.expand_ratio = 1
    config.model.dropout = 0.0
    config.model.survival = 1.0
    # Biases and norms take the rate as it is, 2^-4 at its peak, kernels that times the trust coefficient.
    config.optimizer.rate_per_example = 2.0**-10
    config.optimizer.trust_coefficient = 0.04
    config.schedule.warmup = '0.5 epochs'
    config.schedule.power = 1.0
    config.augment.crop = 'pad'
    config.augment.pad = 2
    config.augment.mean = (125.0, 123.0, 114.0)
    config.augment.std = (63.0, 62.0, 67.0)
    config.averaging.epoch_decay = 0.5
    config.evaluation.every = '5 epochs'
    config.log_every = '200 steps'
    if size == 'large':
        _enlarge(config)
    return config


def _enlarge(config: ml_collections.ConfigDict) -> None:
    """More pixels, up to two blocks a stage, batch norm, stronger augmentation, and 60 epochs."""
    config.epochs = 60.0
    config.model.norm = 'batch'
    config.model.depth = 0.5
    config.model.stem_stride = 1
    config.model.strides = (1, 2, 1, 1, 2, 1, 2)
    config.model.dropout = 0.2
    config.schedule.warmup = '1 epochs'
    config.augment.pad = 4
    config.augment.cutmix_probability = 0.25
    config.averaging.epoch_decay = 0.8
