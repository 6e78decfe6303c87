"""Starting from the weights of another run: fine-tuning, another resolution, other classes, another number format.

A run is a folder with config.json and checkpoints, whether it was trained here or converted from elsewhere. What
is taken from its newest checkpoint are weights alone: steps, optimizer state and averages start anew.
"""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import base
from efficientnet.errors import ConfigError
from efficientnet.loop.checkpoints import Checkpoints
from efficientnet.loop.files import CHECKPOINTS, CONFIG, read_stored
from efficientnet.loop.settings import flatten
from efficientnet.parallel.packing import Packings

Tree = Any
KINDS = {'averaged': 'epoch_average', 'update_average': 'update_average', 'raw': ''}  # and where a checkpoint has them
CLASSIFIER = 'head/classifier/'

# Fields of a model that don't change what given weights compute in evaluation; the strides do, but go with the size
# of the images.
FREE = ('dropout', 'survival', 'conv_method', 'batch_norm_decay', 'batch_norm_sync', 'stem_stride', 'strides')
SHAPING = (
    'variant',
    'width',
    'width_divisor',
    'depth',
    'group_size',
    'expand_ratio',
    'se_ratio',
)  # fields that only change shapes


class RunWeights(NamedTuple):
    """Weights of another run."""

    path: pathlib.Path
    step: int  # of the checkpoint
    kind: str  # of `KINDS`
    variables: dict[str, dict[str, np.ndarray]]  # {'params', 'batch_stats'}: {'block1a/expand/kernel': array, …}
    config: dict[str, Any]  # flat, of that run
    facts: dict[str, Any]  # saved beside the weights
    complaints: list[str]  # about newer checkpoints that are damaged


def read_weights(
    path: pathlib.Path, kind: str = 'auto', field: str = 'init_from', kind_field: str = 'init_weights'
) -> RunWeights:
    """Reads the weights of a run's newest whole checkpoint.

    Args:
        path: The run's folder.
        kind: One of `KINDS`, or 'auto' for the first of them that the run has.
        field: What to call the folder in a message.
        kind_field: What to call the kind.

    Raises:
        ConfigError: There is no run, no whole checkpoint, or no average of that kind.
    """
    if kind not in ('auto', *KINDS):
        raise ConfigError(f'{kind_field}={kind!r} is unknown; choose one of auto, {", ".join(KINDS)}')
    if os.path.isfile(path):  # a Path's own would raise at a name that is too long
        raise ConfigError(f'{field}={path} is a file; make a run of it: python -m efficientnet.convert {path} RUN')
    if not os.path.isfile(path / CONFIG):
        raise ConfigError(f'{field}={path} holds no run: there is no {CONFIG} in it')
    config = flatten(read_stored(path))
    found = None
    if (path / CHECKPOINTS).is_dir():
        checkpoints = Checkpoints(path / CHECKPOINTS, keep=1, owner=False)
        try:
            found = checkpoints.restore_newest()
        finally:
            checkpoints.close()
    if found is None:
        raise ConfigError(f'{field}={path} holds no checkpoint; train that run first')
    arrays, facts, complaints = found
    state = unflatten_dict(arrays, sep='.')
    trees = {name: state.get(place) if place else state for name, place in KINDS.items()}
    if not state['epochs_averaged']:  # before an epoch has ended that average is not one
        trees['averaged'] = None
    chosen = next(name for name, tree in trees.items() if tree) if kind == 'auto' else kind
    if not trees[chosen]:
        raise ConfigError(f'{kind_field}={kind!r}: {path} has no such average at step {facts["position"]}; take raw')
    variables = {name: flatten_dict(trees[chosen].get(name, {}), sep='/') for name in ('params', 'batch_stats')}
    return RunWeights(path, facts['position'], chosen, variables, config, facts, complaints)


def fit_weights(
    found: RunWeights, packings: Packings, config: ml_collections.ConfigDict, dtype: np.dtype
) -> tuple[Tree, str]:
    """Checks the weights of another run against the model that is to start from them.

    Args:
        found: Of the other run.
        packings: Of the model's variables.
        config: Of the run that starts.
        dtype: Of its master weights.

    Returns:
        Plain {'params', 'batch_stats'} of host arrays, with None in the place of a classifier for another number of
        classes; and a line for a person.

    Raises:
        ConfigError: Names or shapes differ, the same weights would compute something else, or `dtype` cannot hold them.
    """
    wanted = {name: packing.array_shapes for name, packing in packings._asdict().items()}
    given = {name: {own: array.shape for own, array in arrays.items()} for name, arrays in found.variables.items()}
    same_classes = given['params'].get(f'{CLASSIFIER}bias') == wanted['params'][f'{CLASSIFIER}bias']
    problems = [text for name in wanted for text in _misfits(given[name], wanted[name], same_classes)]
    if problems:
        more = f' and {len(problems) - 3} more' if len(problems) > 3 else ''
        fields = _differences(config, found.config, FREE)
        raise ConfigError(
            f'init_from={found.path} is of another model: {"; ".join(problems[:3])}{more}'
            + (f' ({fields})' if fields else '')
        )
    fields = _differences(config, found.config, FREE + SHAPING)
    if fields:
        raise ConfigError(f'init_from={found.path} would compute something else here ({fields}); set these as there')
    for name, array in found.variables['params'].items():
        if not (np.abs(array.astype(np.float32)) <= float(jnp.finfo(dtype).max)).all():
            raise ConfigError(f'init_from={found.path}: {name} has numbers that {dtype} cannot hold')
    variables = {
        name: unflatten_dict(
            {own: array if same_classes or not own.startswith(CLASSIFIER) else None for own, array in arrays.items()},
            sep='/',
        )
        for name, arrays in found.variables.items()
    }
    kept = 'the classifier too' if same_classes else 'a new classifier'
    line = f'start    {found.path}, step {found.step}, weights {found.kind.replace("_", " ")}, {kept}'
    scaling = _scaling(config, found.config)
    return variables, f'{line}; pixels are scaled otherwise: {scaling}' if scaling else line


def _misfits(
    given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], same_classes: bool
) -> Iterator[str]:
    """Says of each array that is on one side only, or of another shape, what is wrong with it."""
    for name in sorted(given.keys() | wanted.keys()):
        end = None if same_classes or not name.startswith(CLASSIFIER) else -1  # the last axis is that of classes
        if name not in wanted:
            yield f'{name} {given[name]} is only there'
        elif name not in given:
            yield f'{name} {wanted[name]} is only here'
        elif given[name][:end] != wanted[name][:end]:
            yield f'{name} is {given[name]} there, {wanted[name]} here'


def _scaling(config: ml_collections.ConfigDict, there: Mapping[str, Any]) -> str:
    """Lists how the scaling of pixels differs: other data may want another, but the weights are used to theirs."""
    here, there = flatten(config), flatten(base.get_config()) | there
    names = [name for name in ('augment.mean', 'augment.std') if tuple(here[name]) != tuple(there[name])]
    return ', '.join(f'{name}={tuple(there[name])} there, {tuple(here[name])} here' for name in names)


def _differences(config: ml_collections.ConfigDict, there: Mapping[str, Any], but: tuple[str, ...]) -> str:
    """Lists the fields of the model that differ, apart from some; what an older run lacks is as in configs/base.py."""
    here, there = flatten(config), flatten(base.get_config()) | there
    names = [name for name in here if name.startswith('model.') and name.removeprefix('model.') not in but]
    changed = [name for name in names if here[name] != there[name]]
    return ', '.join(f'{name}={there[name]!r} there, {here[name]!r} here' for name in changed)
