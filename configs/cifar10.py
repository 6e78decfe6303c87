"""CIFAR-10 (through TFDS) on a laptop or one GPU: a narrow G16 EfficientNet in 16.16 with stochastic rounding.

python main.py --config=configs/cifar10.py --workdir=runs/cifar10
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Returns a starting point for two CPU cores, ten epochs at about 300 images/s; its accuracy is not known yet."""
    config = base.get_config()
    config.dataset = 'cifar10'
    config.image_size = 32
    config.epochs = 10.0
    config.global_batch = 128
    config.micro_batch = 32
    config.replicas = 1
    config.model.width = 0.5
    config.model.depth = 0.5
    config.model.stem_stride = 1
    config.model.dropout = 0.1
    config.model.survival = 1.0
    # At a batch this small biases and norms, which take the rate as it is, want far less than the reference's
    # rate; kernels, whose step LARS scales, get it back through the trust coefficient.
    config.optimizer.rate_per_example = 2.0**-9
    config.optimizer.trust_coefficient = 0.02
    config.schedule.warmup = '1 epochs'
    config.augment.crop = 'pad'
    config.augment.pad = 4
    config.averaging.epoch_decay = 0.5
    config.evaluation.every = '2 epochs'
    config.log_every = '50 steps'
    return config
