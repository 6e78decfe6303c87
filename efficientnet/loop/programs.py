"""The compiled programs of a run, all known from shapes alone and therefore compiled side by side."""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

import input_pipeline
from efficientnet.loop.assemble import Parts
from efficientnet.loop.evaluation import make_evaluate, make_gather
from efficientnet.loop.host_memory import give_back_freed_memory
from efficientnet.numerics import random_keys
from efficientnet.parallel.train_state import TrainState
from efficientnet.parallel.update import make_epoch_average, make_update

Tree = Any
FLAG = jax.ShapeDtypeStruct((), np.float32)


class Programs(NamedTuple):
    """Compiled functions over the grid; what is not needed is None."""

    evaluate: Callable[[Tree, Tree, jax.Array], Tree]  # variables of `gather`, batch, stop -> sums
    gather: Callable[[Tree], Tree]  # each device's packed variables -> those of all stages, in the compute dtype
    update: Callable[[TrainState, Tree, jax.Array], tuple[TrainState, jax.Array]] | None  # the state is donated
    epoch_average: Callable[[TrainState], TrainState] | None  # likewise
    initial: TrainState | None  # not compiled but computed: the state before the first update, on the host
    temporaries: int  # bytes, see `largest_temporaries`


def compile_programs(parts: Parts, *, update: bool, initial: bool, start: Tree | None = None) -> Programs:
    """Compiles what a run needs.

    Args:
        parts: Of the run.
        update: Whether it will train.
        initial: Whether it starts from the beginning.
        start: Weights to start from, as of `Parts.init_state`.
    """
    grid, rule = parts.grid, parts.rule
    jobs: dict[Any, Callable] = {
        np.dtype(dtype): functools.partial(compile_gather, parts, dtype)
        for dtype in {rule.policy.master, rule.policy.average}
    }
    jobs['evaluate'] = functools.partial(compile_evaluate, parts)
    if update:
        jobs['update'] = functools.partial(compile_update, parts)
    if update and rule.epoch_decay:
        state = _on_device(parts.state_shapes())
        jobs['epoch_average'] = lambda: grid.compile(make_epoch_average(rule), state, donate_argnums=0)
    if initial:
        jobs['initial'] = lambda: jax.device_get(parts.init_state(start))
    # Tracing oneDNN's calls ends all writing to JAX's cache, so what has none of them is compiled before.
    first = [name for name in jobs if parts.model.conv_method != 'onednn' or name not in ('update', 'evaluate')]
    done: dict[Any, Any] = {}
    for names in (first, [name for name in jobs if name not in first]):
        with ThreadPoolExecutor() as pool:
            running = {name: pool.submit(jobs[name]) for name in names}
            done |= {name: job.result() for name, job in running.items()}
    temporaries = largest_temporaries(parts, [program for name, program in done.items() if name != 'initial'])
    give_back_freed_memory()
    return Programs(
        evaluate=done['evaluate'],
        gather=lambda variables: done[variables['params'].dtype](variables),
        update=done.get('update'),
        epoch_average=done.get('epoch_average'),
        initial=done.get('initial'),
        temporaries=temporaries,
    )


def largest_temporaries(parts: Parts, programs: Iterable[jax.stages.Compiled]) -> int:
    """Returns the most bytes that one of these takes from malloc for its temporaries, in the thread that calls it.

    None do on an accelerator, and for several devices other threads do. Asking takes tens of MiB for a moment, so ask
    before `give_back_freed_memory`.
    """
    (first, *others) = parts.grid.local_devices
    if first.platform != 'cpu' or others:
        return 0
    return max(program.memory_analysis().temp_size_in_bytes for program in programs)


def compile_update(parts: Parts) -> Callable[[TrainState, Tree, jax.Array], tuple[TrainState, jax.Array]]:
    """Compiles the weight update, which returns the new state and metrics for `read_metrics`."""
    layout = parts.grid.layout

    def update(state: TrainState, batch: Tree, stop: jax.Array) -> tuple[TrainState, jax.Array]:
        # The seed of the state, not of the config: runs that differ in nothing else share a cached program.
        optimizer, key = parts.make_optimizer(state.seed), random_keys.purpose_key(state.seed, 'samples')
        return make_update(parts.model, optimizer, parts.packings, layout, parts.rule, key)(state, batch, stop)

    state, batch = _on_device(parts.state_shapes()), _batch(parts, -(-layout.rows // layout.stages), parts.train_source)
    return parts.grid.compile(update, state, batch, FLAG, donate_argnums=0, out_axes=(0, None))


def compile_gather(parts: Parts, dtype: jax.typing.DTypeLike) -> Callable[[Tree], Tree]:
    """Compiles the gathering of variables whose parameters have a dtype."""
    return parts.grid.compile(make_gather(parts.grid.layout, parts.rule), _variables(parts, dtype))


def compile_evaluate(parts: Parts) -> Callable[[Tree, Tree, jax.Array], Tree]:
    """Compiles the evaluation of a batch."""
    stages, batch = parts.grid.layout.stages, _batch(parts, parts.config.evaluation.batch, parts.test_source)
    variables = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((stages, *leaf.shape), leaf.dtype),
        _variables(parts, parts.rule.policy.master),
    )
    return parts.grid.compile(
        make_evaluate(parts.model, parts.packings, parts.rule), variables, batch, FLAG, out_axes=None
    )


def _on_device(tree: Tree) -> Tree:
    """Shapes on one device of a host tree whose leaves are [stages, …]."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)


def _variables(parts: Parts, dtype: jax.typing.DTypeLike) -> Tree:
    """Shapes of one stage's packed variables with parameters of a dtype."""
    dtypes = {'params': dtype, 'batch_stats': np.float32}
    return {
        name: jax.ShapeDtypeStruct(packing.shape, dtypes[name]) for name, packing in parts.packings._asdict().items()
    }


def _batch(parts: Parts, rows: int, source: input_pipeline.Source) -> dict[str, jax.ShapeDtypeStruct]:
    size = parts.config.image_size
    sets = len(source.classes) if source.label_sets else 0
    return {
        'image': jax.ShapeDtypeStruct((rows, size, size, 3), np.uint8),
        'label': jax.ShapeDtypeStruct(*((rows, sets), np.uint8) if sets else ((rows,), np.int32)),
        'mask': jax.ShapeDtypeStruct((rows,), np.float32),
    }
