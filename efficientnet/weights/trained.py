"""The weights of a run apart from its training: what prediction and export read and what conversion writes."""

import json
import os
import pathlib
import shutil
import sys
from typing import Any, NamedTuple

import flax
import jax
import ml_collections
import numpy as np

from configs import base
from efficientnet.errors import ConfigError
from efficientnet.loop.assemble import assemble, make_model
from efficientnet.loop.checkpoints import Checkpoints
from efficientnet.loop.files import CHECKPOINTS, CONFIG, disk_problem, write_json
from efficientnet.loop.settings import config_of
from efficientnet.model.network import EfficientNet
from efficientnet.numerics.precision import policy as policy_of
from efficientnet.parallel.train_state import init_state, unpack_state
from efficientnet.weights.dataset_facts import DatasetFacts, read_facts, write_facts
from efficientnet.weights.initial import read_weights
from input_pipeline.folder import FolderSource
from input_pipeline.sources import ArraySource, Source

Tree = Any

CARD = 'model_card'  # name of what an exported file says about itself in its metadata
COLUMNS = {  # of metrics.csv: test accuracy by kind of weights
    'raw': 'test_accuracy',
    'averaged': 'test_accuracy_averaged',
    'update_average': 'test_accuracy_update_average',
}


class Trained(NamedTuple):
    """A trained model as plain data.

    Attributes:
        config: All fields of configs/base.py.
        dataset: Of the data set it was trained on.
        variables: {'params': …, 'batch_stats': … under batch norm}, host arrays in the formats they were stored in.
        kind: Of `COLUMNS`.
        step: Weight updates they have seen.
        evaluation: {'test_accuracy': …} of these weights and perhaps more; empty if they were not evaluated.
    """

    config: ml_collections.ConfigDict
    dataset: DatasetFacts
    variables: Tree
    kind: str
    step: int
    evaluation: dict[str, float]

    def model(self) -> EfficientNet:
        """Returns the network the variables belong to."""
        compute = policy_of(self.config.precision.policy).compute
        model = make_model(self.config.model, len(self.dataset.classes), compute)
        return model.clone(conv_method='auto')  # the run's is of the machine it was trained on


def read_run(workdir: pathlib.Path, kind: str = 'raw', *, field: str = '--workdir') -> Trained:
    """Reads the newest whole checkpoint of a run; the data set is not needed.

    Newer checkpoints that are damaged are named on standard error.

    Args:
        workdir: Of the run.
        kind: 'raw', 'averaged' (over epochs), 'update_average', or 'auto': an average if it has one.
        field: What a message calls the folder.

    Raises:
        ConfigError: There is no run or no checkpoint, it has no such weights, or they don't fit its config.
    """
    found = read_weights(workdir, kind, field=field, kind_field='--weights')
    config = config_of(found.config, str(workdir / CONFIG))
    for complaint in found.complaints:
        print(f'{complaint}; taking that of step {found.step}', file=sys.stderr)
    facts = found.facts
    known = facts['evaluation'] if facts['evaluated_at'] == facts['position'] else {}
    column = COLUMNS[found.kind]
    columns = (column, *(('test_loss', 'test_top5') if found.kind == 'raw' else ()))
    trained = Trained(
        config=config,
        dataset=read_facts(workdir),
        variables={
            name: flax.traverse_util.unflatten_dict(arrays, sep='/')
            for name, arrays in found.variables.items()
            if arrays
        },
        kind=found.kind,
        step=found.step,
        evaluation={name.replace(column, 'test_accuracy'): known[name] for name in columns if name in known},
    )
    check_shapes(trained, str(workdir))
    return trained


def write_run(dest: pathlib.Path, trained: Trained) -> None:
    """Writes weights as a finished run of which nothing is known but what describes the model and its input.

    Args:
        dest: Folder to make. It appears when all is written.
        trained: Every array of its network.

    Raises:
        ConfigError: The folder exists or cannot be written, the variables are not those of the config, or a field
            of it is out of range.
    """
    if os.path.exists(dest):
        raise ConfigError(f'{dest} exists; give a folder that does not')
    check_shapes(trained, str(dest))
    trained = trained._replace(config=deployed_config(trained.config, max(trained.step, 1)))
    parts = assemble(trained.config, (_placeholder(trained.dataset),) * 2, stored=True)
    packed = init_state(trained.variables, np.uint32(0), parts.optimizer, parts.packings, parts.rule)
    state = unpack_state(jax.device_get(packed), parts.packings)._replace(step=np.int32(trained.step))
    facts = {
        'evaluation': trained.evaluation,
        'evaluated_at': parts.total_steps if trained.evaluation else 0,
        'best': {'accuracy': -1.0, 'step': 0},
        'clock': {},
    }
    draft = dest.with_name(f'.{dest.name}.{os.getpid()}')
    try:
        draft.mkdir(parents=True)
        needed, free = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(draft).free
        if free < needed:
            raise ConfigError(f'{dest} needs {needed / 1e6:.0f} MB, but there are {free / 1e6:.0f} MB free')
        write_json(draft / CONFIG, json.loads(json.dumps(parts.config.to_dict())))
        write_facts(draft, trained.dataset)
        checkpoints = Checkpoints(draft / CHECKPOINTS, keep=1)
        checkpoints.save(parts.total_steps, state, facts, None)
        checkpoints.close()
        draft.rename(dest)
    except Exception as error:
        reason = disk_problem(error)
        if reason is None:
            raise
        raise ConfigError(f'{dest} cannot be written: {reason}') from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def deployed_config(config: ml_collections.ConfigDict, steps: int) -> ml_collections.ConfigDict:
    """Returns neutral fields but for those that describe the model, its input and its numbers; `steps` updates."""
    kept = base.get_config()
    kept.dataset, kept.image_size, kept.steps = config.dataset, config.image_size, steps
    kept.replicas = 1  # as many as there are devices for would depend on the machine
    kept.precision.policy, kept.evaluation.batch = config.precision.policy, config.evaluation.batch
    kept.augment.mean, kept.augment.std = tuple(config.augment.mean), tuple(config.augment.std)
    kept.evaluation.crop_ratio, kept.averaging.epoch_decay = config.evaluation.crop_ratio, 0.0
    kept.model.update(config.model)
    kept.input.update(config.input)
    return kept


def _placeholder(dataset: DatasetFacts) -> Source:
    """A source with the classes of a data set and one example that nothing reads."""
    label = np.zeros(1, np.int32)
    if dataset.image_shape is None:
        return FolderSource('nothing', dataset.classes, ('',), label)
    return ArraySource('nothing', dataset.classes, np.zeros((1, *dataset.image_shape), np.uint8), label)


def check_shapes(trained: Trained, where: str) -> None:
    """Raises ConfigError, naming variables and shapes, if they are not those of the network in the config."""
    wanted, got = variable_shapes(trained), shapes_of(trained.variables)
    wrong = [
        f'{name} {got.get(name, "missing")} instead of {shape}'
        for name, shape in wanted.items()
        if got.get(name) != shape
    ] + [f'{name} {got[name]} unexpected' for name in got.keys() - wanted.keys()]
    if wrong:
        more = f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''
        raise ConfigError(f'{where}: the weights are not those of its config: {"; ".join(wrong[:5])}{more}')


def variable_shapes(trained: Trained) -> dict[str, tuple[int, ...]]:
    """Returns {'params.stem.conv.kernel': (3, 3, 3, 32), …}, what the network in the config needs.

    Raises:
        ConfigError: A field of the model, or image_size, is out of range.
    """
    size = trained.config.image_size
    if size < 1:
        raise ConfigError(f'image_size={size} must be at least 1 pixel')
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    return shapes_of(dict(jax.eval_shape(trained.model().init, jax.random.key(0), image)))


def shapes_of(variables: Tree) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of variables by dotted name."""
    flat = flax.traverse_util.flatten_dict(variables, sep='.')
    return {name: tuple(leaf.shape) for name, leaf in flat.items()}
