"""Two epochs at native resolution after a run of configs/imagenet_rmsprop.py at half, training the last layers only.

python main.py --config=configs/finetune.py:b2,g16,group,head --workdir=runs/b2-g16-group-fine

It starts from the averaged weights of runs/b2-g16-group-half, or of what --config.init_from names. The argument is
b0 … b5, g1 | g4 | g16 and group | batch | layer_proxy as that run had them, and head | block7 | block6: what is
trained, from there to the end. Images are seen as in evaluation (central, not mirrored), but mixed as before. Devices:
as many as there are, one copy each; micro-batch 8 fits one, for little goes backward.

The reference's command asks for 2^-11 × batch 512 with a cosine, and leaves its warm-up at the usual 5 epochs, which
a run of 2 epochs never completes: the rate there is (n / 2.5 T) (1 + cos(π n / T)) / 2 of that, which peaks at 0.105
after 0.83 epochs. This recipe makes that curve to within an eighth of its peak, with a warm-up that ends. For other
data set --config.dataset and the model's fields, and say how long with --config.epochs.

No accuracy of it has been measured on ImageNet here.
"""

import ml_collections

from configs import arguments, imagenet_rmsprop
from configs.imagenet import SIZES, imagenet_config

TRAINABLE = {'head': 'head', 'block7': 'head,block7*', 'block6': 'head,block7*,block6*'}


def get_config(argument: str = '') -> ml_collections.ConfigDict:
    """Returns the recipe.

    Args:
        argument: Such as 'b2,g16,group,block7', see above.
    """
    variant, group, norm, part = arguments.parse(
        argument, tuple(SIZES), ('g16', 'g4', 'g1'), imagenet_rmsprop.NORMS, tuple(TRAINABLE)
    )
    config = imagenet_config(variant)
    config.init_from = f'runs/{variant}-{group}-{norm}-half'
    config.init_weights = 'averaged'
    config.epochs = 2.0
    config.micro_batch = 8
    imagenet_rmsprop.set_model(config, group, norm)
    imagenet_rmsprop.set_rmsprop(config, global_batch=512)
    config.optimizer.trainable = TRAINABLE[part]
    config.optimizer.rate_per_example = 0.105 * 2.0**-11
    config.schedule.kind = 'cosine'
    config.schedule.end_ratio = 0.0
    config.schedule.warmup = '35 %'
    config.augment.crop = 'none'
    config.augment.flip = False
    config.averaging.epoch_decay = 0.97
    return config
