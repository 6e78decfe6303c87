"""The compiled programs of a run, all known from shapes alone and therefore compiled side by side."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from efficientnet import random_keys
from efficientnet.assemble import Parts
from efficientnet.evaluation import make_evaluate, make_gather
from efficientnet.train_state import TrainState
from efficientnet.update import make_epoch_average, make_update

Tree = Any


class Programs(NamedTuple):
    """Compiled functions over the grid; what is not needed is None."""

    evaluate: Callable[[Tree, Tree], Tree]  # variables of `gather`, batch -> sums
    gather: Callable[[Tree], Tree]  # each device's packed variables -> those of all stages, in the compute dtype
    update: Callable[[TrainState, Tree], tuple[TrainState, Tree]] | None  # the state is donated
    epoch_average: Callable[[TrainState], TrainState] | None  # likewise
    initial: TrainState | None  # not compiled but computed: the state before the first update, on the host


def compile_programs(parts: Parts, *, update: bool, initial: bool) -> Programs:
    """Compiles what a run needs.

    Args:
        parts: Of the run.
        update: Whether it will train.
        initial: Whether it starts from the beginning.
    """
    grid, rule = parts.grid, parts.rule
    state = _on_grid(parts, parts.state_shapes())
    gather = grid.pmap(make_gather(grid.layout, rule))
    variables = jax.eval_shape(gather, {'params': state.params, 'batch_stats': state.batch_stats})
    evaluate = grid.pmap(make_evaluate(parts.model, parts.packings, rule), out_axes=None)
    jobs = {'evaluate': lambda: _compile(evaluate, variables, _batch(parts, evaluation=True))}
    if update:
        key = random_keys.purpose_key(parts.config.seed, 'samples')
        function = make_update(parts.model, parts.optimizer, parts.packings, grid.layout, rule, key)
        program = grid.pmap(function, donate_argnums=0, out_axes=(0, None))
        jobs['update'] = lambda: _compile(program, state, _batch(parts, evaluation=False))
    if initial:
        jobs['initial'] = lambda: jax.device_get(parts.init_state())
    with ThreadPoolExecutor() as pool:
        running = {name: pool.submit(job) for name, job in jobs.items()}
        done = {name: job.result() for name, job in running.items()}
    return Programs(
        evaluate=done['evaluate'],
        gather=gather,
        update=done.get('update'),
        epoch_average=grid.pmap(make_epoch_average(rule), donate_argnums=0) if update and rule.epoch_decay else None,
        initial=done.get('initial'),
    )


def _compile(program: Any, *shapes: Tree) -> Callable:
    return program.lower(*shapes).compile()


def _on_grid(parts: Parts, tree: Tree) -> Tree:
    """Shapes on the grid of a host tree whose leaves are [stages, …]."""
    devices = parts.grid.layout.devices
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((devices, *leaf.shape[1:]), leaf.dtype), tree)


def _batch(parts: Parts, *, evaluation: bool) -> dict[str, jax.ShapeDtypeStruct]:
    layout, size = parts.grid.layout, parts.config.image_size
    rows = parts.config.evaluation.batch if evaluation else -(-layout.rows // layout.stages)
    return {
        'image': jax.ShapeDtypeStruct((layout.devices, rows, size, size, 3), np.uint8),
        'label': jax.ShapeDtypeStruct((layout.devices, rows), np.int32),
        'mask': jax.ShapeDtypeStruct((layout.devices, rows), np.float32),
    }
