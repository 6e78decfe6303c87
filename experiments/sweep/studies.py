"""The studies as data: which fields of a config are searched, over which values, beside which fixed changes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_collections
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from configs import base
from efficientnet.errors import ConfigError
from efficientnet.loop.settings import flatten

NEUTRAL = base.get_config()


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, drawn evenly or, with `log`, by ratio; `grid` are those of a grid search."""

    low: float
    high: float
    grid: tuple[float, ...]
    log: bool = False
    of_recipe: bool = False  # numbers are multiples of the recipe's own value
    unit: str = ''  # of a duration, such as '%'


@dataclasses.dataclass(frozen=True)
class Choice:
    """A few values, all of them in a grid search too."""

    values: tuple[Any, ...]
    of_recipe: bool = False  # values are multiples of the recipe's own


@dataclasses.dataclass(frozen=True)
class Study:
    """Fields that are searched, by their dotted names, and what else differs from the recipe."""

    space: Mapping[str, Range | Choice]
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


STUDIES = {
    # What the reference swept to keep the accuracy of batch 768 at 6144.
    'lars': Study(
        changes={'optimizer.name': 'lars'},
        space={
            'optimizer.rate_per_example': Range(1 / 8, 8, (1 / 4, 1, 4), log=True, of_recipe=True),
            'schedule.warmup': Range(0, 40, (5, 20), unit='%'),
            'optimizer.momentum': Range(0.8, 0.98, (0.885, 0.95)),
            'optimizer.weight_decay': Range(1e-7, 1e-3, (2.5e-6, 1e-4), log=True),
            'global_batch': Choice((1, 2, 4), of_recipe=True),
        },
    ),
    # Around the reference's 2^-14 an example, which it used up to batch 768. LARS's own fields go back to what
    # they are in configs/base.py, since nothing reads them here.
    'rmsprop': Study(
        changes={
            'optimizer.name': 'rmsprop',
            'optimizer.epsilon': 1e-3,
            'optimizer.trust_coefficient': NEUTRAL.optimizer.trust_coefficient,
            'optimizer.nesterov': NEUTRAL.optimizer.nesterov,
        },
        space={
            'optimizer.rate_per_example': Range(2**-18, 2**-10, (2**-16, 2**-14, 2**-12), log=True),
            'schedule.warmup': Range(0, 40, (5, 20), unit='%'),
            'optimizer.momentum': Range(0.8, 0.98, (0.9,)),
            'optimizer.rms_decay': Range(0.8, 0.99, (0.9, 0.953125)),
            'optimizer.weight_decay': Range(1e-7, 1e-3, (1e-5,), log=True),
            'global_batch': Choice((1, 2, 4), of_recipe=True),
        },
    ),
}


def distributions(study: Study, recipe: ml_collections.ConfigDict) -> dict[str, BaseDistribution]:
    """Returns what Optuna draws from, by field, in the unit of the field.

    Raises:
        ConfigError: A field is searched around the recipe's value, which is not above zero.
    """
    return {field: _distribution(field, dimension, recipe) for field, dimension in study.space.items()}


def grid(study: Study, recipe: ml_collections.ConfigDict) -> dict[str, tuple[Any, ...]]:
    """Returns the values of a grid search, by field."""
    return {field: _grid(field, dimension, recipe) for field, dimension in study.space.items()}


def describe(study: Study, field: str, recipe: ml_collections.ConfigDict, *, grid: bool) -> str:
    """Returns the values of a field that are tried, for people: '0.8 … 0.98' or, in a grid, '0.885, 0.95'."""
    dimension = study.space[field]
    distribution = _distribution(field, dimension, recipe)
    unit = f' {dimension.unit}' if isinstance(dimension, Range) and dimension.unit else ''
    if grid or isinstance(distribution, CategoricalDistribution):
        values = _grid(field, dimension, recipe)
        return ', '.join(f'{value:.4g}' if isinstance(value, float) else str(value) for value in values) + unit
    return f'{distribution.low:.4g} … {distribution.high:.4g}{unit}' + (', by ratio' if distribution.log else '')


def own_fields(study: Study) -> set[str]:
    """Returns the fields that a study sets whatever they are in the recipe, those it searches around excepted."""
    return set(study.changes) | {field for field, dimension in study.space.items() if not dimension.of_recipe}


def changes(study: Study, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how a trial's config differs from the recipe: the study's changes, and what was drawn.

    Args:
        study: Whose trial it is.
        drawn: One value a searched field.
    """
    return {**study.changes, **{field: _setting(study.space[field], value) for field, value in drawn.items()}}


def _distribution(field: str, dimension: Range | Choice, recipe: ml_collections.ConfigDict) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(_grid(field, dimension, recipe))
    unit = _unit(field, dimension, recipe)
    return FloatDistribution(dimension.low * unit, dimension.high * unit, log=dimension.log)


def _grid(field: str, dimension: Range | Choice, recipe: ml_collections.ConfigDict) -> tuple[Any, ...]:
    values = dimension.values if isinstance(dimension, Choice) else dimension.grid
    unit = _unit(field, dimension, recipe)
    return tuple(value if unit is None else value * unit for value in values)


def _unit(field: str, dimension: Range | Choice, recipe: ml_collections.ConfigDict) -> Any:
    """What a dimension's numbers are multiples of; None if they need not be numbers."""
    if not dimension.of_recipe:
        return 1.0 if isinstance(dimension, Range) else None
    value = flatten(recipe)[field]
    if not 0 < value < math.inf:
        raise ConfigError(f'{field}={value} of the recipe must be above 0, since multiples of it are searched; set it')
    return value


def _setting(dimension: Range | Choice, value: Any) -> Any:
    """What a drawn value is in the config."""
    return f'{value:.6g} {dimension.unit}' if isinstance(dimension, Range) and dimension.unit else value
