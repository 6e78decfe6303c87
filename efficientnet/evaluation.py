"""Evaluation on all devices: padded and masked, so that every example counts exactly once."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficientnet import losses
from efficientnet.grid import AXIS, Grid
from efficientnet.model import EfficientNet
from efficientnet.packing import Packings
from efficientnet.update import Batch, UpdateRule, normalise

Tree = Any


def make_evaluate(
    model: EfficientNet, packings: Packings, rule: UpdateRule
) -> Callable[[Tree, Batch], dict[str, jax.Array]]:
    """Returns the per-device function that sums loss and hits over a batch and over the axis `AXIS`.

    It takes packed {'params' in the compute dtype, 'batch_stats' in fp32} and a batch; the sums are 'loss',
    'top1', 'top5' and 'count', fp32 and equal on all devices.
    """

    def evaluate(variables: Tree, batch: Batch) -> dict[str, jax.Array]:
        images = normalise(batch['image'], rule.mean, rule.std, rule.policy.compute)
        logits = model.apply(packings.unpack(variables), images, train=False)
        label, counted = batch['label'], batch['mask'] > 0
        # A masked row is all zeros; where() also keeps a non-finite loss of such a row out of the sum.
        loss = jnp.where(counted, losses.cross_entropy(logits, label), 0.0)
        sums = {
            'loss': loss.sum(),
            'top1': (losses.hits(logits, label, 1) & counted).sum(dtype=jnp.float32),
            'top5': (losses.hits(logits, label, 5) & counted).sum(dtype=jnp.float32),
            'count': counted.sum(dtype=jnp.float32),
        }
        return jax.lax.psum(sums, AXIS)

    return evaluate


def run_evaluation(
    evaluate: Callable[[Tree, Batch], dict[str, jax.Array]],
    grid: Grid,
    variables: Tree,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Evaluates one set of variables.

    Args:
        evaluate: The mapped function of `make_evaluate`.
        grid: Where it runs.
        variables: Packed, on the grid.
        batches: Host batches; rows divide by the number of devices.
        stop: Asked between batches; True gives the evaluation up.

    Returns:
        {'loss', 'accuracy', 'top5', 'count'}: means over the examples, and how many there were; None if stopped.
    """
    waiting, totals = None, np.zeros(4)
    for batch in grid.prefetch(batches, 1):
        if stop():
            return None
        sums = evaluate(variables, batch)
        totals += _read(waiting)  # one batch late, so that the devices never wait for the host
        waiting = sums
    loss, top1, top5, count = totals + _read(waiting)
    return {'loss': loss / count, 'accuracy': top1 / count, 'top5': top5 / count, 'count': int(count)}


def _read(sums: dict[str, jax.Array] | None) -> np.ndarray:
    if sums is None:
        return np.zeros(4)
    return np.array([float(sums[name]) for name in ('loss', 'top1', 'top5', 'count')])
