"""From a config to the parts of a run. All checks that need no computing happen here, before any starts."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

import input_pipeline
from efficientnet.errors import ConfigError
from efficientnet.loop.durations import to_interval, to_steps
from efficientnet.loop.settings import Fields, check_known, check_used
from efficientnet.model import scaling
from efficientnet.model.convolution import choose_library
from efficientnet.model.costs import block_costs
from efficientnet.model.network import EfficientNet
from efficientnet.numerics import freezing, random_keys
from efficientnet.numerics.augment import Mixing
from efficientnet.numerics.loss_scale import LossScale
from efficientnet.numerics.losses import SMOOTHED_OVER
from efficientnet.numerics.optimizers import make_optimizer
from efficientnet.numerics.precision import Policy
from efficientnet.numerics.precision import policy as policy_of
from efficientnet.numerics.schedules import warmup_schedule
from efficientnet.parallel.grid import Grid
from efficientnet.parallel.layout import AXIS, Layout, TooManyReplicasError, make_layout
from efficientnet.parallel.packing import Packings, make_packing
from efficientnet.parallel.stages import config_options, resolve_splits, stage_blocks
from efficientnet.parallel.train_state import TrainState, UpdateRule, init_state

Tree = Any
Sources = tuple[input_pipeline.Source, input_pipeline.Source]  # of training and of test examples


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything a run is made of, checked against each other; nothing has been computed yet."""

    config: ml_collections.ConfigDict  # as given, with replicas, stages and splits filled in
    train_source: input_pipeline.Source
    test_source: input_pipeline.Source
    grid: Grid
    model: EfficientNet
    packings: Packings
    make_optimizer: Callable[[int | jax.Array], optax.GradientTransformation]  # for a seed
    rule: UpdateRule
    total_steps: int
    evaluate_every: int  # steps; 0 = only at the end
    checkpoint_every: int
    log_every: int
    idle: frozenset[str] = frozenset()  # fields that nothing reads under the other settings
    damaged_train: dict[int, str] = dataclasses.field(default_factory=dict)  # what this process has met, by index
    damaged_test: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of this run's seed."""
        return self.make_optimizer(self.config.seed)

    def init_variables(self) -> Tree:
        """Draws the initial weights: plain {'params': …, 'batch_stats': …}, fp32, from the seed alone."""
        return jax.jit(functools.partial(_init_variables, self.model, self.config.image_size))(
            random_keys.purpose_key(self.config.seed, 'weights')
        )

    def init_state(self, start: Tree | None = None) -> TrainState:
        """Returns the packed state of all stages before the first update.

        Args:
            start: Variables to take instead of the seed's, as `initial_weights.fit_weights` returns them.
        """
        build = functools.partial(init_state, optimizer=self.optimizer, packings=self.packings, rule=self.rule)
        variables = self.init_variables()
        if start is not None:
            variables = {name: freezing.join(start[name], drawn) for name, drawn in variables.items()}
        return jax.jit(build)(variables, np.uint32(self.config.seed))

    def state_shapes(self) -> TrainState:
        """Returns the shapes and dtypes of the packed state of all stages without computing it."""
        shapes = {name: packing.unpacked_shapes() for name, packing in self.packings._asdict().items()}
        build = functools.partial(init_state, optimizer=self.optimizer, packings=self.packings, rule=self.rule)
        return jax.eval_shape(build, shapes, np.uint32(self.config.seed))

    def train_batches(self, position: int) -> Any:
        """Yields host batches from a position in the endless stream of training examples."""
        c = self.config
        return input_pipeline.train_batches(
            self.train_source,
            image_size=c.image_size,
            global_batch=c.global_batch,
            num_batches=self.total_steps,
            seed=c.seed,
            start_batch=position,
            process_index=jax.process_index(),
            process_count=self.grid.layout.processes,
            crop=c.augment.crop,
            crop_covered=c.augment.crop_covered,
            crop_aspect=c.augment.crop_aspect,
            crop_area=c.augment.crop_area,
            pad=c.augment.pad if c.augment.crop == 'pad' else 0,
            flip=c.augment.flip,
            resize=c.input.resize,
            crop_ratio=c.evaluation.crop_ratio,
            prefetch=c.input.prefetch,
            damaged_limit=c.input.damaged_limit,
            damaged=self.damaged_train,
        )

    def evaluation_batches(self) -> Any:
        """Yields host batches of the test split, padded and masked."""
        c = self.config
        return input_pipeline.evaluation_batches(
            self.test_source,
            image_size=c.image_size,
            batch=c.evaluation.batch * len(self.grid.devices),
            process_index=jax.process_index(),
            process_count=self.grid.layout.processes,
            resize=c.input.resize,
            crop_ratio=c.evaluation.crop_ratio,
            damaged_limit=c.input.damaged_limit,
            damaged=self.damaged_test,
        )


def assemble(config: ml_collections.ConfigDict, sources: Sources | None = None, *, stored: bool = False) -> Parts:
    """Builds and checks the parts of a run.

    Args:
        config: All fields of configs/base.py.
        sources: What stands in for the data set that the config names; None opens that.
        stored: Whether it is that of an earlier run, of which nobody expects that every field is read.

    Raises:
        ConfigError: A field is unknown, unused, out of range or at odds with another.
        DataError: A dataset is missing or unusable.
    """
    check_known(config)
    fields = Fields(config)
    _check_ranges(fields)
    policy = policy_of(fields.precision.policy)
    train_source, test_source = _open_sources(fields) if sources is None else _stand_ins(fields, sources)
    model = make_model(fields.model, len(train_source.classes), policy.compute)
    model = model.clone(conv_method=choose_library(model.conv_method, fields.image_size))
    layout = _make_layout(fields, model, policy)
    packings = _make_packings(model, fields.image_size, layout)
    frozen = freezing.frozen_names(fields.optimizer.trainable, packings.params.names, packings.batch_stats.names)
    frozen_statistics = frozen.intersection(packings.batch_stats.names)
    model = model.clone(frozen_norms=frozenset(name.rpartition('/')[0] for name in frozen_statistics))

    sizes = {'num_examples': train_source.num_examples, 'global_batch': layout.global_batch}
    total_steps = fields.steps or to_steps('epochs', f'{fields.epochs} epochs', **sizes, total_steps=None)
    if total_steps < 1:
        raise ConfigError(
            f'epochs={fields.epochs} of {train_source.num_examples} examples is less than one update of '
            f'global_batch={layout.global_batch}; raise epochs or lower global_batch'
        )
    sizes['total_steps'] = total_steps
    schedule = _make_schedule(fields, sizes)
    make_optimizer = _optimizer_maker(fields, schedule, policy, packings)
    rule = UpdateRule(
        policy=policy,
        loss_scale=LossScale(fields.precision.loss_scale, fields.precision.initial_loss_scale),
        learning_rate=schedule,
        mean=tuple(fields.augment.mean),
        std=tuple(fields.augment.std),
        label_smoothing=fields.augment.label_smoothing,
        smoothing_over=_smoothing_over(fields),
        mixing=_make_mixing(fields),
        batch_norm_decay=fields.model.batch_norm_decay if fields.model.norm == 'batch' else 0.0,
        update_decay=fields.averaging.update_decay,
        epoch_decay=fields.averaging.epoch_decay,
        frozen=frozen,
    )
    resolved = config.copy_and_resolve_references()
    with resolved.unlocked():
        resolved.replicas, resolved.stages = layout.replicas, layout.stages
        resolved.splits = ','.join(layout.splits) or 'auto'
    parts = Parts(
        config=resolved.lock(),
        train_source=train_source,
        test_source=test_source,
        grid=Grid(layout),
        model=model,
        packings=packings,
        make_optimizer=make_optimizer,
        rule=rule,
        total_steps=total_steps,
        evaluate_every=to_interval('evaluation.every', fields.evaluation.every, **sizes),
        checkpoint_every=to_interval('checkpoint.every', fields.checkpoint.every, **sizes),
        log_every=to_interval('log_every', fields.log_every, **sizes),
    )
    _check_input(fields, parts)
    if not stored:
        check_used(fields)
    return dataclasses.replace(parts, idle=frozenset(fields.unread()))


def _check_ranges(fields: Fields) -> None:
    """Raises ConfigError for numbers that no part further on would name by their field."""
    s = fields.schedule
    for name, value, low, high in (
        ('epochs', fields.epochs, 0.0, math.inf),
        ('steps', fields.steps, 0, math.inf),
        ('image_size', fields.image_size, 1, math.inf),
        ('evaluation.batch', fields.evaluation.batch, 1, math.inf),
        ('checkpoint.keep', fields.checkpoint.keep, 1, math.inf),
        ('input.prefetch', fields.input.prefetch, 1, math.inf),
        ('precision.max_skipped', fields.precision.max_skipped, 1, math.inf),
        (
            'model.batch_norm_decay',
            fields.model.batch_norm_decay if fields.model.norm == 'batch' else 0,
            0,
            1,
        ),
        ('augment.label_smoothing', fields.augment.label_smoothing, 0, 1),
        ('averaging.epoch_decay', fields.averaging.epoch_decay, 0, 1),
        ('averaging.update_decay', fields.averaging.update_decay, 0, 1),
        ('optimizer.rate_per_example', fields.optimizer.rate_per_example, 0, math.inf),
        ('optimizer.momentum', fields.optimizer.momentum, 0, 1),
        ('optimizer.rms_decay', fields.optimizer.rms_decay if fields.optimizer.name == 'rmsprop' else 0, 0, 1),
        ('optimizer.weight_decay', fields.optimizer.weight_decay, 0, math.inf),
        ('optimizer.epsilon', fields.optimizer.epsilon if fields.optimizer.name != 'sgd' else 0, 0, math.inf),
        (
            'optimizer.trust_coefficient',
            fields.optimizer.trust_coefficient if fields.optimizer.name == 'lars' else 0,
            0,
            math.inf,
        ),
        ('schedule.end_ratio', s.end_ratio if s.kind in ('polynomial', 'cosine') else 0, 0, math.inf),
        ('schedule.power', s.power if s.kind == 'polynomial' else 0, 0, math.inf),
        ('schedule.decay_rate', s.decay_rate if s.kind == 'exponential' else 0, 0, math.inf),
        ('model.norm_group_size', fields.model.norm_group_size if fields.model.norm == 'group' else 0, 0, math.inf),
        ('model.norm_epsilon', fields.model.norm_epsilon, 0, math.inf),
        ('model.width', fields.model.width, 0, 100),
        ('seed', fields.seed, 0, 2**32),
    ):
        if not low <= value < high:
            raise ConfigError(f'{name}={value} is not in [{low}, {high})')
    for name, values in (('augment.mean', fields.augment.mean), ('augment.std', fields.augment.std)):
        numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        if len(values) != 3 or not numbers or (name == 'augment.std' and min(values) <= 0):
            raise ConfigError(f'{name}={tuple(values)} must be three numbers, R, G and B, those of std above 0')


def _make_layout(fields: Fields, model: EfficientNet, policy: Policy) -> Layout:
    """Resolves the splits and checks the sizes."""
    costs = block_costs(model.spec, fields.image_size, norm=model.norm)
    options = config_options(fields, policy, pipelined=fields.stages > 1)
    splits = resolve_splits(fields.splits, fields.stages, model.spec, costs, **options)
    if splits and model.norm_axis:
        raise ConfigError(
            'model.batch_norm_sync=True needs stages=1: under pipelining the stages of a replica work on different '
            'micro-batches at a time, and statistics over replicas would make all wait for all at every norm'
        )
    try:
        return make_layout(
            global_batch=fields.global_batch,
            micro_batch=fields.micro_batch,
            replicas=fields.replicas,
            splits=splits,
            devices=jax.device_count(),
            processes=jax.process_count(),
            schedule=fields.pipeline if splits else 'grouped',
            recompute=fields.recompute,
        )
    except TooManyReplicasError as error:
        if jax.process_count() > 1:
            raise
        raise ConfigError(f'{error}, or try on a CPU with --cpu_devices={error.devices}') from None


def _open_sources(fields: Fields) -> Sources:
    given = fields.input
    own, other = fields.dataset, given.test_dataset
    folder = '' if own in input_pipeline.EMBEDDED else given.dir
    train = input_pipeline.open_source(own, given.train_split, folder or None, train_split=given.train_split)
    if other:
        folder = '' if other in input_pipeline.EMBEDDED else given.test_dir
    elif given.test_dir:  # evaluation of a run would not miss what reads it
        raise ConfigError(f'input.test_dir={given.test_dir!r} is read with input.test_dataset only; give both or none')
    test = input_pipeline.open_source(
        other or own,
        given.test_split,
        folder or None,
        train_split=given.train_split,
        classes=train.classes if other else None,
        fields=input_pipeline.OTHER_TEST if other else None,
    )
    if test.classes != train.classes:
        raise ConfigError(
            f'input.test_dataset={other!r} has other classes than dataset={fields.dataset!r}: {len(test.classes)} '
            f'({", ".join(test.classes[:3])} …), not {len(train.classes)} ({", ".join(train.classes[:3])} …)'
        )
    if train.image_shape is None and given.cache:  # images in memory need none: then nothing reads the field
        train = input_pipeline.CachedSource(train, int(given.cache * 2**30))
    return train, test


def _stand_ins(fields: Fields, sources: Sources) -> Sources:
    """The sources given; the fields that name others are still true of the run, and so are read."""
    given = fields.input
    given.dir, given.train_split, given.test_split, given.test_dataset, given.test_dir, fields.dataset  # noqa: B018
    if sources[0].image_shape is None:
        given.cache  # noqa: B018
    return sources


def make_model(fields: Any, classes: int, compute: Any) -> EfficientNet:
    """Returns the network that a config's `model` section asks for.

    Args:
        fields: `config.model` of configs/base.py.
        classes: Number of logits.
        compute: Dtype of activations.
    """
    options: dict[str, Any] = {
        'group': lambda: {'norm_layout': fields.norm_layout, **_norm_groups(fields)},
        'batch': lambda: {'norm_axis': AXIS if fields.batch_norm_sync else None},
    }
    return EfficientNet(
        spec=scaling.configured_spec(fields, classes),
        norm=fields.norm,
        epsilon=fields.norm_epsilon,
        padding=fields.padding,
        conv_method=fields.conv_method,
        dtype=compute,
        **options.get(fields.norm, dict)(),
    )


def _norm_groups(fields: Any) -> dict[str, int]:
    """What says how many groups a group norm has: their number, unless their size is given."""
    size = fields.norm_group_size
    return {'norm_group_size': size} if size else {'norm_groups': fields.norm_groups}


def _init_variables(model: EfficientNet, image_size: int, key: jax.Array) -> Tree:
    # The formulation makes no difference to them. oneDNN's, once traced, ends the caching of programs; others take
    # minutes to compile, as XLA computes beforehand what loops make of these zeros.
    model = model.clone(conv_method='native')
    return model.init(key, jax.numpy.zeros((1, image_size, image_size, 3), model.dtype), train=False)


def _make_packings(model: EfficientNet, image_size: int, layout: Layout) -> Packings:
    """Traces the model once for the names and shapes of its variables; what cannot be built is found here."""
    key = random_keys.purpose_key(0, 'weights')
    variables = jax.eval_shape(functools.partial(_init_variables, model, image_size), key)
    stages = stage_blocks(model.spec, layout.splits)
    return Packings(make_packing(variables['params'], stages), make_packing(variables.get('batch_stats', {}), stages))


def _make_schedule(fields: Fields, sizes: dict[str, int]) -> optax.Schedule:
    s, total_steps = fields.schedule, sizes['total_steps']
    warmup_steps = to_steps('schedule.warmup', s.warmup, **sizes)
    if warmup_steps > total_steps:
        raise ConfigError(
            f"schedule.warmup={s.warmup!r} is {warmup_steps:,} steps, more than the run's {total_steps:,}; "
            f'shorten it or raise {"steps" if fields.steps else "epochs"}'
        )
    options: dict[str, Any] = {
        'polynomial': lambda: {'end_ratio': s.end_ratio, 'power': s.power},
        'cosine': lambda: {'end_ratio': s.end_ratio},
        'exponential': lambda: {
            'decay_rate': s.decay_rate,
            'decay_steps': to_interval('schedule.decay_every', s.decay_every, **sizes),
        },
    }
    return warmup_schedule(
        s.kind,
        peak=fields.optimizer.rate_per_example * fields.global_batch,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        **options.get(s.kind, dict)(),
    )


def _optimizer_maker(
    fields: Fields, schedule: optax.Schedule, policy: Any, packings: Packings
) -> Callable[[int | jax.Array], optax.GradientTransformation]:
    o = fields.optimizer
    options: dict[str, Any] = {
        'lars': lambda: {
            'nesterov': o.nesterov,
            'trust_coefficient': o.trust_coefficient,
            'eps': o.epsilon,
        },
        'rmsprop': lambda: {'decay': o.rms_decay, 'eps': o.epsilon},
        'sgd': lambda: {'nesterov': o.nesterov},
    }
    build = functools.partial(
        make_optimizer,
        o.name,
        learning_rate=schedule,
        policy=policy,
        rounding=fields.precision.rounding if policy.rounds else 'nearest',
        packing=packings.params,
        momentum=o.momentum,
        weight_decay=o.weight_decay,
        **options.get(o.name, dict)(),
    )

    def of_seed(seed: int | jax.Array) -> optax.GradientTransformation:
        return build(key=random_keys.purpose_key(seed, 'rounding'))

    of_seed(fields.seed)  # what is wrong with its options shows here
    return of_seed


def _smoothing_over(fields: Fields) -> str:
    if not fields.augment.label_smoothing:
        return SMOOTHED_OVER[0]
    over = fields.augment.smoothing_over
    if over not in SMOOTHED_OVER:
        raise ConfigError(f'augment.smoothing_over={over!r} is unknown; choose one of {", ".join(SMOOTHED_OVER)}')
    return over


def _make_mixing(fields: Fields) -> Mixing:
    mixing = Mixing(fields.augment.mixup_alpha, fields.augment.cutmix_probability)
    if (mixing.mixup_alpha or mixing.cutmix_probability) and fields.micro_batch == 1:
        raise ConfigError(
            'micro_batch=1 leaves no second image for augment.mixup_alpha and augment.cutmix_probability to mix with; '
            'raise it, or set both to 0'
        )
    return mixing


def _check_input(fields: Fields, parts: Parts) -> None:
    """Opens both pipelines far enough that they check their arguments, and notes which fields they use."""
    parts.train_batches(0)
    parts.evaluation_batches()
    # Read by the pipelines through `Parts`.
    fields.augment.crop, fields.augment.flip  # noqa: B018
    shapes = (parts.train_source.image_shape, parts.test_source.image_shape)
    if None in shapes:
        fields.input.damaged_limit, fields.evaluation.crop_ratio  # noqa: B018
    if set(shapes) != {(fields.image_size, fields.image_size, 3)} or fields.augment.crop == 'distorted':
        fields.input.resize  # noqa: B018
    if fields.init_from:  # read where a run starts
        fields.init_weights  # noqa: B018
    if fields.augment.crop == 'pad':
        fields.augment.pad  # noqa: B018
    if fields.augment.crop == 'distorted':
        fields.augment.crop_covered, fields.augment.crop_aspect, fields.augment.crop_area  # noqa: B018
