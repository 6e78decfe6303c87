"""Every field of a run, once, with its unit and meaning. A recipe changes a few of them and says why.

A duration is a string with its unit: '70 epochs', '500 steps' (weight updates), '50000 examples' or '20 %'
(of the whole run). A field that the chosen options never read (say, optimizer.rms_decay under LARS) must keep
its value from here: changing it is an error, because it would change nothing.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the full set of fields with neutral values, locked: a mistyped field is an error."""
    config = ml_collections.ConfigDict()

    config.seed = 0  # of initial weights, order of examples, augmentation, dropout and rounding

    # What training starts from: the seed's weights, or those of another run, with a new classifier where the number
    # of classes differs. Only a run's very start reads that run; going on from a checkpoint does not.
    config.init_from = ''  # folder of a run; '' = none
    config.init_weights = 'auto'  # of it: 'raw', 'averaged' (over epochs), 'update_average'; 'auto' = an average if any

    # What is trained on.
    # 'digits', 'sample_photos' (both embedded), 'folder', 'imagenet_tfrecords', or a TFDS name: 'cifar10', …
    config.dataset = 'digits'
    config.image_size = 224  # pixels a side, after cropping and resizing
    config.input = ml_collections.ConfigDict()
    config.input.dir = ''  # TFDS folder ('' = ~/tensorflow_datasets), or that of the images or TFRecord shards
    config.input.train_split = 'train'  # TFDS split syntax works: 'train[:90%]'
    config.input.test_split = 'test'
    config.input.test_dataset = ''  # tested on in place of `dataset`: 'imagenet_v2'; it must have the same classes
    config.input.test_dir = ''  # where that lies, as `dir`; for test_dataset only
    config.input.resize = 'bilinear'  # or 'bicubic' or 'area' (antialiased)
    config.input.cache = 0.0  # GiB of encoded training images that a process keeps in memory, the first it reads
    config.input.prefetch = 3  # batches fetched ahead, on the host and again on the device
    config.input.damaged_limit = 100  # damaged images that are named and skipped before the run stops

    # How long, and in which portions. global_batch = micro_batch × replicas × accumulation count (derived).
    config.epochs = 350.0  # passes over the training split; updates = floor(examples · epochs / global_batch)
    config.steps = 0  # weight updates; above 0 it takes the place of `epochs`
    config.global_batch = 768  # examples a weight update
    config.micro_batch = 32  # examples a replica computes at once
    config.replicas = 0  # copies of the model, one a device; 0 = as many as there are devices
    config.stages = 1  # devices one copy of the model is pipelined over
    config.splits = 'auto'  # first block of every stage but the first: 'block4a,block6a'; 'auto' balances `stages`
    config.pipeline = 'grouped'  # schedule: 'grouped' (all stages busy) or 'sequential' (one micro-batch at a time)
    config.recompute = 'stage'  # in the backward: 'none', each 'block', or each 'stage' but the last; see the README

    config.model = ml_collections.ConfigDict()
    config.model.variant = 'b0'  # b0 … b7, lite0 … lite4: width, depth and dropout
    config.model.width = 0.0  # channel multiplier; 0 = the variant's
    config.model.depth = 0.0  # repeat multiplier; 0 = the variant's
    config.model.width_divisor = 8  # channels are rounded to multiples of it
    config.model.stem_stride = 2  # 1 keeps small images (32 pixels and less) from vanishing
    config.model.strides = (1, 2, 2, 2, 1, 2, 1)  # of the first block of each of the seven stages: 1 or 2
    config.model.group_size = 16  # channels a group in the spatial convolutions: 1 (depthwise), 4, 16
    config.model.expand_ratio = 0  # of MBConv; 0 = 6, 5, 4 for group sizes 1, 4, 16
    config.model.se_ratio = -1.0  # squeeze-and-excite's channels ÷ the block's input's; 0 = none, -1 = the variant's
    config.model.activation = ''  # 'swish', 'relu6'; '' = the variant's
    config.model.norm = 'group'  # 'group', 'batch', or 'layer_proxy' (layer norm + proxy norm)
    config.model.norm_groups = 4  # groups of 'group'
    config.model.norm_group_size = 0  # of 'group', instead of norm_groups: channels a group, a divisor of all widths
    config.model.norm_layout = 'strided'  # of 'group': channel c in group c mod groups; or 'contiguous'
    config.model.norm_epsilon = 1e-3  # added to the variance
    config.model.batch_norm_decay = 0.97  # of the running statistics, applied once a weight update
    config.model.batch_norm_sync = False  # each micro-batch's statistics over all replicas; needs stages=1
    config.model.padding = 'same'  # TensorFlow's; 'symmetric' is PyTorch's
    config.model.dropout = -1.0  # before the classifier; -1 = the variant's
    config.model.survival = 0.8  # of the last block under stochastic depth; the first always survives
    config.model.conv_method = 'auto'  # formulation of the grouped convolution, see efficientnet/model/convolution.py

    config.precision = ml_collections.ConfigDict()
    config.precision.policy = '16.16'  # compute.master: 32.32, bf16.32, 16.32, 16.16, bf16.16
    config.precision.rounding = 'stochastic'  # of 16-bit weights and optimizer state; or 'nearest'
    config.precision.loss_scale = 'static'  # or 'dynamic': halved on overflow, doubled every 2000 good updates
    config.precision.initial_loss_scale = 128.0  # a power of two
    config.precision.max_skipped = 20  # non-finite updates in a row that stop the run

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = 'lars'  # 'lars', 'rmsprop', 'sgd'
    config.optimizer.rate_per_example = 2.0**-9.5  # peak learning rate = this × global_batch
    config.optimizer.momentum = 0.885
    config.optimizer.nesterov = False  # 'lars', 'sgd'
    config.optimizer.weight_decay = 2.5e-6  # not applied to norms and biases
    config.optimizer.trust_coefficient = 0.001  # 'lars': η
    config.optimizer.epsilon = 0.0  # 'lars': in the trust ratio; 'rmsprop': inside the square root
    config.optimizer.rms_decay = 0.953125  # 'rmsprop'
    # The rest is frozen: parameters, their optimizer state and, where a whole batch norm is, its statistics stay as
    # they are, to the bit; such a norm goes by its running statistics in training too.
    config.optimizer.trainable = ''  # 'head,block7*': blocks or parameters, such as '*/bias'; '' = everything

    config.schedule = ml_collections.ConfigDict()
    config.schedule.kind = 'polynomial'  # 'polynomial', 'exponential', 'cosine', 'constant'
    config.schedule.warmup = '0 epochs'  # linear, from zero
    config.schedule.end_ratio = 1e-5  # 'polynomial', 'cosine': last rate ÷ peak
    config.schedule.power = 2.0  # 'polynomial'
    config.schedule.decay_rate = 0.97  # 'exponential': factor of one drop
    config.schedule.decay_every = '2.4 epochs'  # 'exponential': between two drops

    config.augment = ml_collections.ConfigDict()
    config.augment.crop = 'distorted'  # 'distorted' (Inception's, for photographs), 'pad' (small images), 'none'
    config.augment.crop_covered = 0.1  # 'distorted': least part of an annotated box, or else of the image, kept
    config.augment.crop_aspect = (0.75, 1.33)  # 'distorted': least and greatest width ÷ height
    config.augment.crop_area = (0.05, 1.0)  # 'distorted': least and greatest part of the image's area
    config.augment.pad = 4  # pixels each side under 'pad'
    config.augment.flip = True  # left-right, half the time
    config.augment.mean = (123.68, 116.78, 103.94)  # RGB, subtracted on the device
    config.augment.std = (1.0, 1.0, 1.0)  # RGB, divided by on the device; the reference doesn't
    config.augment.label_smoothing = 0.1  # ε
    config.augment.smoothing_over = 'others'  # ε goes to the 'others' (the reference), or to 'all' classes
    config.augment.mixup_alpha = 0.0  # of Beta(α, α); 0 = no mixup; the reference: 0.1 for B0-B2, 0.2 from B3 on
    config.augment.cutmix_probability = 0.0  # of a micro-batch; the reference: 0.6425 for B4

    # Averages of the weights are evaluated beside the weights, never instead of them.
    config.averaging = ml_collections.ConfigDict()
    config.averaging.epoch_decay = 0.97  # of the average over epochs' ends, as the reference; 0 = none
    config.averaging.update_decay = 0.0  # of the exponential average over updates, such as 0.9999; 0 = none

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = '1 epochs'
    config.checkpoint.keep = 2  # newest checkpoints kept, besides the best by test accuracy

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.every = '1 epochs'
    config.evaluation.batch = 100  # examples a device
    config.evaluation.crop_ratio = 0.875  # of photographs: short side to floor(image_size / this), central square

    config.log_every = '20 steps'  # between two progress lines and rows of metrics.csv

    return config.lock()
