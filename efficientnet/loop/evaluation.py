"""Evaluation on all devices: padded and masked, so that every example counts exactly once."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficientnet.model.network import EfficientNet
from efficientnet.numerics import losses
from efficientnet.parallel.accumulation import Batch, normalise
from efficientnet.parallel.grid import Grid
from efficientnet.parallel.layout import AXIS, Layout
from efficientnet.parallel.packing import Packings
from efficientnet.parallel.train_state import UpdateRule

Tree = Any


def make_gather(layout: Layout, rule: UpdateRule) -> Callable[[Tree], Tree]:
    """Returns the per-device function that brings all stages' variables to every device.

    It takes the device's packed {'params', 'batch_stats'}, [rows, ROW] each, and returns those of all stages,
    [stages, rows, ROW], parameters in the master dtype. Evaluation is not pipelined: every device computes.
    """

    def gather(variables: Tree) -> Tree:
        variables = variables | {'params': variables['params'].astype(rule.policy.master)}
        if layout.stages == 1:
            return jax.tree.map(lambda rows: rows[None], variables)
        return jax.lax.all_gather(variables, AXIS, axis_index_groups=layout.replica_groups)

    return gather


def make_evaluate(
    model: EfficientNet, packings: Packings, rule: UpdateRule
) -> Callable[[Tree, Batch, jax.Array], dict[str, jax.Array]]:
    """Returns the per-device function that sums loss and hits over a batch and over the axis `AXIS`.

    It takes the packed variables of all stages, as `make_gather` gives them, the device's rows of a batch, and
    whether its process was asked to leave, fp32 []; the sums are 'loss', 'top1', 'top5', 'count' and 'stop', fp32
    and equal on all devices.
    """

    def evaluate(variables: Tree, batch: Batch, stop: jax.Array) -> dict[str, jax.Array]:
        images = normalise(batch['image'], rule.mean, rule.std, rule.policy.compute)
        logits = model.apply(packings.unpack(variables), images, train=False)
        label, counted = batch['label'], batch['mask'] > 0
        # A masked row is all zeros; where() also keeps a non-finite loss of such a row out of the sum.
        loss = losses.cross_entropy(logits, label) if label.ndim == 1 else losses.set_loss(logits, label)
        if label.ndim == 2:  # any class of the set will do: the one that the model thinks most of decides
            label = losses.best_of_set(logits, label)
        loss = jnp.where(counted, loss, 0.0)
        sums = {
            'loss': loss.sum(),
            'top1': (losses.hits(logits, label, 1) & counted).sum(dtype=jnp.float32),
            'top5': (losses.hits(logits, label, 5) & counted).sum(dtype=jnp.float32),
            'count': counted.sum(dtype=jnp.float32),
            'stop': stop,
        }
        return jax.lax.psum(sums, AXIS)

    return evaluate


def run_evaluation(
    evaluate: Callable[[Tree, Batch, jax.Array], dict[str, jax.Array]],
    grid: Grid,
    variables: Tree,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Evaluates one set of variables.

    Args:
        evaluate: The program of `make_evaluate`.
        grid: Where it runs.
        variables: As `make_gather` gives them, on the grid.
        batches: This process's host batches; rows divide by the number of its devices.
        stop: Asked between batches whether this process should leave; True in any process gives the evaluation up.

    Returns:
        {'loss', 'accuracy', 'top5', 'count'}: means over the examples, and how many there were; None if stopped.
    """
    waiting, totals, alone = None, np.zeros(5), grid.layout.processes == 1
    flags = [grid.flag(value) for value in (False, True)]
    for batch in grid.prefetch(batches, 1):
        asked = stop()
        if alone and asked:
            return None
        sums = evaluate(variables, batch, flags[asked])
        totals += _read(waiting)  # one batch late, so that the devices never wait for the host
        waiting = sums
        if totals[-1]:  # all processes see this at the same batch
            return None
    loss, top1, top5, count, _ = totals + _read(waiting)
    return {'loss': loss / count, 'accuracy': top1 / count, 'top5': top5 / count, 'count': int(count)}


def _read(sums: dict[str, jax.Array] | None) -> np.ndarray:
    if sums is None:
        return np.zeros(5)
    return np.array([float(sums[name]) for name in ('loss', 'top1', 'top5', 'count', 'stop')])
