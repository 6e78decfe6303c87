"""The smallest run that still has every part: two MBConv blocks on 8×8 digits."""

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import flax
import jax
import ml_collections
import numpy as np

from configs import base
from efficientnet.loop.assemble import Parts, assemble
from efficientnet.loop.programs import compile_update
from efficientnet.model import scaling
from efficientnet.numerics.precision import policy as policy_of
from efficientnet.parallel.train_state import TrainState
from efficientnet.parallel.update import read_metrics
from efficientnet.weights.dataset_facts import DatasetFacts
from efficientnet.weights.trained import Trained, variable_shapes


def tiny_config(**changes: object) -> ml_collections.ConfigDict:
    """Returns a config for the digits in seconds; `changes` are dotted names with _ _ for the dot."""
    config = base.get_config()
    config.dataset = 'digits'
    config.image_size = 8
    config.steps = 6
    config.global_batch = 16
    config.micro_batch = 8
    config.replicas = 1
    config.model.width = 0.25
    config.model.depth = 0.1
    config.model.stem_stride = 1
    config.model.dropout = 0.2
    config.precision.policy = '32.32'
    config.optimizer.rate_per_example = 2.0**-6
    config.augment.crop = 'pad'
    config.augment.pad = 1
    config.augment.flip = False
    config.evaluation.every = '3 steps'
    config.evaluation.batch = 60
    config.checkpoint.every = '3 steps'
    config.log_every = '2 steps'
    for name, value in changes.items():
        *path, last = name.split('__')
        target = config
        for part in path:
            target = target[part]
        target[last] = value
    return config


@contextlib.contextmanager
def few_blocks(blocks: int = 2) -> Iterator[None]:
    """Every network that is assembled meanwhile has only its first few MBConv blocks; no config can say so."""

    def cut(*args: object, **options: object) -> scaling.ModelSpec:
        spec = model_spec(*args, **options)
        return dataclasses.replace(spec, blocks=spec.blocks[:blocks], head_channels=32)

    model_spec = scaling.model_spec
    with mock.patch.object(scaling, 'model_spec', cut):
        yield


def tiny_parts(blocks: int = 2, **changes: object) -> Parts:
    """Assembles a tiny run whose network has only the first few MBConv blocks."""
    with few_blocks(blocks):
        return assemble(tiny_config(**changes))


def run_updates(parts: Parts, count: int, state: TrainState | None = None) -> tuple[TrainState, list[dict]]:
    """Makes updates from the start of the data; returns the packed host state of all stages and the metrics of each."""
    program, stop = compile_update(parts), parts.grid.flag(False)
    state = parts.grid.place(jax.device_get(parts.init_state() if state is None else state))
    metrics = []
    for _, batch in zip(range(count), parts.grid.prefetch(parts.train_batches(0), 1), strict=False):
        state, found = program(state, batch, stop)
        metrics.append(read_metrics(found))
    return parts.grid.fetch(state), metrics


def tiny_trained(classes: int = 10, image_shape: tuple[int, ...] | None = (8, 8, 3), **changes: object) -> Trained:
    """Returns a model with weights drawn by numpy, none of them 0 or 1, in the master format of its policy."""
    config = tiny_config(**{'model__conv_method': 'native'} | changes)
    names = tuple(f'class {number}' for number in range(classes))
    trained = Trained(config, DatasetFacts(names, image_shape), {}, 'raw', 7, {'test_accuracy': 0.5})
    rng, flat = np.random.default_rng(0), {}
    for name, shape in variable_shapes(trained).items():
        dtype = policy_of(config.precision.policy).master if name.startswith('params') else np.float32
        spread = (2 / np.prod(shape[:-1])) ** 0.5 if len(shape) > 1 else 0.3
        values = rng.uniform(0.5, 1.5, shape) if name.endswith(('scale', 'var')) else rng.normal(0, spread, shape)
        flat[name] = values.astype(dtype)
    return trained._replace(variables=flax.traverse_util.unflatten_dict(flat, sep='.'))
