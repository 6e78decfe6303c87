"""The claims as data: which settings are trained, at which scale, and which differences of their means are expected.

All settings of a scale are its recipe with its changes, and differ from each other in what their claim is about alone.
Numbers are 32.32 unless the claim is about numbers, so that a difference has one cause.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from configs import base

NEUTRAL = base.get_config()


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is."""

    recipe: str
    changes: Mapping[str, Any]  # of all settings
    margin: float  # accuracies that differ by less count as the same
    batches: tuple[int, int, int]  # global; the first is that of all other claims
    lars_rates: tuple[float, float]  # rate_per_example at the other two batches
    rmsprop_rates: tuple[float, float, float]  # rate_per_example of RMSProp, by batch
    small: int  # micro-batch that the norms are compared at, beside the recipe's
    layouts: Mapping[str, 'Setting']
    half: Mapping[str, Any]  # of the run at half resolution
    fine_tune: Mapping[str, Any]  # of the run that goes on from it at full resolution
    classes: int = 10  # of the data set
    seeds: int = 5


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, once a seed."""

    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cpu_devices: int = 0  # virtual ones; 0 = what the machine has
    starts_from: str = ''  # the setting whose weights, of the same seed, it starts with


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A difference of two means over seeds, and where it has to lie for the claim to hold."""

    a: str  # a setting
    b: str  # another, which is subtracted
    expected: tuple[float, float] | None = None  # bounds of the difference; None if the claim says nothing of it
    of_a: str = 'test_accuracy'  # which number of a run is compared
    of_b: str = 'test_accuracy'
    # Differences are taken seed by seed where both are one network that starts from the same weights and sees the same
    # images in the same order, so that a seed is good or bad luck for both. Others get Welch's interval.
    paired: bool = False


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the reference says, and the comparisons of which all have to come out as expected."""

    title: str
    comparisons: tuple[Comparison, ...]


# Averages reach back about a tenth of the run, as the reference's 0.97 an epoch does in 350 epochs.
_COMMON = {
    'precision.policy': '32.32',
    'model.expand_ratio': 4,
    'averaging.epoch_decay': 0.5,
    'checkpoint.every': '100 %',
    'checkpoint.keep': 1,
    'evaluation.every': '25 %',
}

SCALES = {
    'digits': Scale(
        recipe='configs/digits.py',
        # The rate is the best of a grid for the largest batch, where 28 updates have to do; the smallest has room.
        changes=_COMMON
        | {
            'epochs': 10.0,
            'model.depth': 0.1,
            'model.dropout': 0.0,
            'optimizer.rate_per_example': 2.0**-11,
            'optimizer.trust_coefficient': 0.03,
            'schedule.warmup': '10 %',
            'log_every': '5 %',
        },
        margin=0.02,
        batches=(64, 256, 512),
        lars_rates=(2.0**-11, 2.0**-11),
        rmsprop_rates=(2.0**-14, 2.0**-14, 2.0**-14),
        small=4,
        layouts={
            '2 replicas': Setting({'replicas': 2}, cpu_devices=2),
            '2 stages': Setting({'stages': 2, 'micro_batch': 8}, cpu_devices=2),
            '2 replicas × 2 stages': Setting({'replicas': 2, 'stages': 2, 'micro_batch': 8}, cpu_devices=4),
        },
        half={'image_size': 8, 'epochs': 8.0},
        fine_tune={'epochs': 3.0, 'optimizer.rate_per_example': 2.0**-10},
    ),
    'cpu': Scale(
        recipe='configs/cifar10.py',
        changes=_COMMON
        | {
            'input.train_split': 'train[:16000]',
            'input.test_split': 'test[:4000]',
            'epochs': 2.0,
            'global_batch': 32,
            'micro_batch': 32,
            'model.width': 0.5,
            'model.width_divisor': 8,
            'schedule.warmup': '15 %',
            'log_every': '5 %',
        },
        margin=0.02,
        batches=(32, 128, 512),
        # At the largest batch, 62 updates, the best of 2^-9 … 2^-13 for LARS; 2^-14 beat 2^-15 for RMSProp.
        lars_rates=(2.0**-11, 2.0**-12),
        rmsprop_rates=(2.0**-14, 2.0**-14, 2.0**-14),
        small=4,
        layouts={
            '2 replicas': Setting({'replicas': 2, 'micro_batch': 16}, cpu_devices=2),
            '2 stages': Setting({'stages': 2, 'micro_batch': 4}, cpu_devices=2),
            '2 replicas × 2 stages': Setting({'replicas': 2, 'stages': 2, 'micro_batch': 4}, cpu_devices=4),
        },
        half={'image_size': 16, 'epochs': 2.0},
        fine_tune={'epochs': 0.8, 'optimizer.rate_per_example': 2.0**-11},
    ),
    # One GPU has no second stage or replica to try, only another accumulation count.
    'gpu': Scale(
        recipe='configs/cifar10.py',
        changes=_COMMON
        | {
            'epochs': 30.0,
            'model.width': 1.0,
            'model.width_divisor': 8,
            'model.depth': 1.0,
            'model.stem_stride': 1,
            'model.strides': (1, 2, 2, 1, 1, 2, 1),
            'averaging.epoch_decay': 0.7,
            'global_batch': 256,
            'micro_batch': 256,
            'optimizer.rate_per_example': 2.0**-10,
            'optimizer.trust_coefficient': 0.005,
            'schedule.warmup': '10 %',
            'evaluation.every': '10 %',
            'evaluation.batch': 1000,
            'log_every': '2 %',
        },
        margin=0.005,
        batches=(256, 1024, 4096),
        lars_rates=(2.0**-10, 2.0**-10),
        rmsprop_rates=(2.0**-14, 2.0**-14, 2.0**-14),
        small=8,
        layouts={
            'accumulation 4': Setting({'micro_batch': 64}),
            'accumulation 16': Setting({'micro_batch': 16}),
        },
        half={'image_size': 16, 'epochs': 28.0},
        fine_tune={'epochs': 2.0, 'optimizer.rate_per_example': 2.0**-13},
    ),
}


def settings(scale: Scale) -> dict[str, Setting]:
    """Returns all settings of a scale by name."""
    rmsprop = {
        'optimizer.name': 'rmsprop',
        'optimizer.momentum': 0.9,
        'optimizer.weight_decay': 1e-5,
        'optimizer.epsilon': 1e-3,
        'optimizer.trust_coefficient': NEUTRAL.optimizer.trust_coefficient,  # nothing reads it here
    }

    def by_batch(optimizer: Mapping[str, Any], rates: Sequence[float]) -> list[Setting]:
        sizes = scale.batches[-len(rates) :]
        fields = (
            {'global_batch': size, 'optimizer.rate_per_example': rate} for size, rate in zip(sizes, rates, strict=True)
        )
        return [Setting(optimizer | each) for each in fields]

    lars, rmsprops = by_batch({}, scale.lars_rates), by_batch(rmsprop, scale.rmsprop_rates)
    small, batch, proxy = {'micro_batch': scale.small}, {'model.norm': 'batch'}, {'model.norm': 'layer_proxy'}
    return {
        'base': Setting(),
        '16.16 stochastic': Setting({'precision.policy': '16.16'}),
        '16.16 nearest': Setting({'precision.policy': '16.16', 'precision.rounding': 'nearest'}),
        'bf16.16 stochastic': Setting({'precision.policy': 'bf16.16'}),
        'bf16.16 nearest': Setting({'precision.policy': 'bf16.16', 'precision.rounding': 'nearest'}),
        'LARS, middle batch': lars[0],
        'LARS, largest batch': lars[1],
        'RMSProp, smallest batch': rmsprops[0],
        'RMSProp, middle batch': rmsprops[1],
        'RMSProp, largest batch': rmsprops[2],
        'G1': Setting({'model.group_size': 1, 'model.expand_ratio': 6}),
        'G4': Setting({'model.group_size': 4, 'model.expand_ratio': 5}),
        'group norm, small micro-batch': Setting(small),
        'batch norm': Setting(batch),
        'batch norm, small micro-batch': Setting(batch | small),
        'proxy norm': Setting(proxy),
        'proxy norm, small micro-batch': Setting(proxy | small),
        **scale.layouts,
        'half resolution': Setting(scale.half),
        'half resolution, fine-tuned': Setting(
            {'init_weights': 'raw', **scale.fine_tune}, starts_from='half resolution'
        ),
    }


def claims(scale: Scale) -> dict[str, Claim]:
    """Returns the claims by a short name, in the order of the table."""
    above, below = (0.0, math.inf), (-math.inf, 0.0)
    same, not_below = (-scale.margin, scale.margin), (-scale.margin, math.inf)

    def rounding(policy: str, title: str) -> Claim:
        stochastic, nearest = f'{policy} stochastic', f'{policy} nearest'
        comparisons = (
            Comparison(stochastic, 'base', not_below, paired=True),
            Comparison(nearest, 'base', below, paired=True),
            Comparison(stochastic, nearest, above, paired=True),
        )
        return Claim(title, comparisons)

    layouts = (Comparison(name, 'base', same, paired=True) for name in scale.layouts)
    return {
        'rounding': rounding(
            '16.16', '16.16 with stochastic rounding matches 32.32, with round-to-nearest it does not'
        ),
        # Not the reference's, but what its claim rests on: short runs lose little to fp16, whose steps are an eighth.
        'rounding_bf16': rounding('bf16.16', 'the same of bf16.16, whose weights are eight times as coarse'),
        'batch': Claim(
            'LARS keeps the accuracy at the largest batch, where RMSProp loses it',
            (
                Comparison('LARS, middle batch', 'base', paired=True),
                Comparison('LARS, largest batch', 'base', not_below, paired=True),
                Comparison('RMSProp, middle batch', 'RMSProp, smallest batch', paired=True),
                Comparison('RMSProp, largest batch', 'RMSProp, smallest batch', below, paired=True),
                Comparison('LARS, largest batch', 'RMSProp, largest batch', above, paired=True),
            ),
        ),
        'groups': Claim(
            'groups of 16 (expand ratio 4) are as good as of 4 (ratio 5) and of 1 (ratio 6), groups of 4 as of 1',
            (
                Comparison('base', 'G1', not_below),
                Comparison('base', 'G4', not_below),
                Comparison('G4', 'G1', not_below),
            ),
        ),
        'norms': Claim(
            'group norm and proxy norm are indifferent to the micro-batch, batch norm is not',
            (
                Comparison('group norm, small micro-batch', 'base', same, paired=True),
                Comparison('batch norm, small micro-batch', 'batch norm', below, paired=True),
                Comparison('proxy norm, small micro-batch', 'proxy norm', same, paired=True),
                Comparison('proxy norm', 'base'),
                Comparison('proxy norm', 'batch norm'),
            ),
        ),
        'layouts': Claim('replicas, stages and accumulation give the same accuracy', tuple(layouts)),
        'resolution': Claim(
            'half resolution and then fine-tuning costs less and loses nothing',
            (
                Comparison('half resolution, fine-tuned', 'base', not_below),
                Comparison('half resolution, fine-tuned', 'base', below, of_a='seconds', of_b='seconds'),
            ),
        ),
        'averaging': Claim(
            'weights averaged over epochs are better than the last',
            (Comparison('base', 'base', above, of_a='test_accuracy_averaged', paired=True),),
        ),
    }


def varied(scale: Scale, names: Sequence[str]) -> set[str]:
    """Returns the fields in which the runs of some settings differ from each other."""
    every = settings(scale)
    return {'seed', 'global_batch', 'init_from'}.union(*(every[name].changes for name in names))


def needed(scale: Scale, names: list[str]) -> list[str]:
    """Returns the settings that some claims compare, and those they start from, in the order of `settings`."""
    every, chosen = settings(scale), claims(scale)
    compared = {name for key in names for one in chosen[key].comparisons for name in (one.a, one.b)}
    return [name for name in every if name in compared | {every[other].starts_from for other in compared}]
