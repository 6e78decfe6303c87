"""One weight update as one program: micro-batches, reduction, optimizer, rounding, averages, metrics.

Every device of the grid runs `make_update`'s function on its own stage's rows. Its micro-batches only add to fp32
accumulators; one reduction of one fp32 vector over the devices with the same stage then carries gradients, batch
statistics and metrics together. Whether everything is finite, on all stages, is known to all before anything
changes, so a skipped update leaves weights, optimizer state, averages and step as they were.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from efficientnet.model.network import EfficientNet
from efficientnet.numerics import averaging, freezing
from efficientnet.numerics.loss_scale import all_finite
from efficientnet.numerics.stochastic_rounding import apply_updates
from efficientnet.parallel.accumulation import SUMS, Batch, make_accumulate
from efficientnet.parallel.layout import AXIS, Layout
from efficientnet.parallel.packing import Packings, row_sums
from efficientnet.parallel.train_state import TrainState, UpdateRule

Tree = Any
METRICS = (
    *SUMS,
    'gradient_norm',
    'update_norm',
    'weight_norm',
    'learning_rate',
    'loss_scale',
    'skipped',  # updates so far that were not finite
    'skipped_in_row',
    'stop',  # devices that were asked to leave
)


def make_update(
    model: EfficientNet,
    optimizer: optax.GradientTransformation,
    packings: Packings,
    layout: Layout,
    rule: UpdateRule,
    key: jax.Array,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, jax.Array]]:
    """Returns the per-device function of one weight update, to be mapped over the axis `AXIS`.

    It takes the device's state, its part of the batch, and whether its process was asked to leave, fp32 []. It returns
    the new state and the metrics, fp32 [len(METRICS)].

    Args:
        model: Applied to micro-batches in the compute dtype.
        optimizer: Takes packed fp32 gradients and master weights, returns fp32 updates.
        packings: Of the model's variables.
        layout: Replicas, stages, micro-batch and accumulation count.
        rule: Precision, loss scale, normalisation, smoothing, averages.
        key: The 'samples' key of the run.
    """
    accumulate = make_accumulate(model, packings, layout, rule, key)
    apply = make_apply(optimizer, packings, layout, rule)

    def update(state: TrainState, batch: Batch, stop: jax.Array) -> tuple[TrainState, jax.Array]:
        vector, unravel = ravel_pytree(accumulate(state, batch) | {'stop': stop})
        return apply(state, unravel(_sum_over(vector, layout.stage_groups)))

    return update


def make_apply(
    optimizer: optax.GradientTransformation, packings: Packings, layout: Layout, rule: UpdateRule
) -> Callable[[TrainState, Tree], tuple[TrainState, jax.Array]]:
    """Returns the per-device function of all that an update does once, after its micro-batches.

    It takes the device's state and the sums over micro-batches and replicas, those of `make_accumulate` and 'stop'
    (fp32 []), and returns what `make_update`'s function returns. With one device it needs no axis.

    Args:
        optimizer: As in `make_update`, and so are the others.
        packings: Of the model's variables.
        layout: Replicas, stages, micro-batch and accumulation count.
        rule: Loss scale, averages and what is frozen.
    """

    def apply(state: TrainState, sums: Tree) -> tuple[TrainState, jax.Array]:
        # Each micro-batch contributed a mean, times the loss scale.
        share = 1.0 / (layout.replicas * layout.accumulation)
        grads = sums['grads'] * (share / state.loss_scale.scale)
        stats = sums['batch_stats'] * share

        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        hold = functools.partial(freezing.hold, frozen=rule.frozen)
        updates = hold(updates, jnp.zeros_like(updates), packings.params)
        optimizer_state = hold(optimizer_state, state.optimizer, packings.params)
        # What all stages together say. The last has loss and hits; each has its share of the squared norms, which are
        # not finite where a number is not, or is above 1e19. Overflow by rounding to 16 bits shows in the updates,
        # where it is the weights', and in the optimizer's state.
        squares = {
            'gradient_norm': _sum_of_squares(grads),
            'update_norm': _sum_of_squares(updates),
            'weight_norm': _sum_of_squares(state.params.astype(jnp.float32)),
        }
        own_finite = jnp.isfinite(squares['gradient_norm'] + squares['update_norm'])
        own_finite &= all_finite((stats, optimizer_state))
        own = sums['metrics'] | squares | {'unfinished': (~own_finite).astype(jnp.float32)}
        vector, unravel = ravel_pytree(own)
        said = unravel(_sum_over(vector, layout.replica_groups))
        # New weights come after all that reads the old ones, whose memory they take; it would be copied otherwise.
        finite, said = jax.lax.optimization_barrier((said.pop('unfinished') == 0, said))
        params = hold(apply_updates(state.params, updates), state.params, packings.params)
        batch_stats = rule.batch_norm_decay * state.batch_stats + (1.0 - rule.batch_norm_decay) * stats
        batch_stats = hold(batch_stats, state.batch_stats, packings.batch_stats)
        changed = state._replace(step=state.step + 1, params=params, batch_stats=batch_stats, optimizer=optimizer_state)
        if rule.update_decay:
            variables = {'params': params, 'batch_stats': batch_stats}
            average = averaging.ema_update(state.update_average, variables, rule.update_decay, state.step)
            changed = changed._replace(update_average=average)
        # A branch, not a select a leaf: XLA would fuse the whole finite check into every one of those.
        new = jax.lax.cond(finite, lambda: changed, lambda: state)
        missed = jnp.where(finite, 0, 1)
        new = new._replace(
            loss_scale=rule.loss_scale.adjust(state.loss_scale, finite),
            skipped=state.skipped + missed,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
        )
        metrics = {name: jnp.sqrt(value) if name.endswith('_norm') else value for name, value in said.items()}
        metrics |= {
            'stop': sums['stop'],
            'learning_rate': rule.learning_rate(state.step + 1),
            'loss_scale': state.loss_scale.scale,
            'skipped': new.skipped,
            'skipped_in_row': new.skipped_in_row,
        }
        return new, jnp.stack([metrics[name].astype(jnp.float32) for name in METRICS])

    return apply


def read_metrics(metrics: jax.Array) -> dict[str, float]:
    """Waits for an update and names its metrics; as an array each, they took five times as long to read."""
    return dict(zip(METRICS, np.asarray(metrics).tolist(), strict=True))


def _sum_of_squares(rows: jax.Array) -> jax.Array:
    """Adds up squares, fp32 []: row by row first, as LARS does for its norms, so that the compiler does it once."""
    return row_sums(jnp.square(rows)).sum()


def _sum_over(vector: jax.Array, groups: list[list[int]]) -> jax.Array:
    """Adds up over the devices of each group; nothing is sent where every group is one device."""
    if len(groups[0]) == 1:
        return vector
    return jax.lax.psum(vector, AXIS, axis_index_groups=groups if len(groups) > 1 else None)


def make_epoch_average(rule: UpdateRule) -> Callable[[TrainState], TrainState]:
    """Returns the per-device function that takes the weights at an epoch's end into the epoch average."""

    def epoch_average(state: TrainState) -> TrainState:
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        average = averaging.epoch_average(state.epoch_average, variables, rule.epoch_decay, state.epochs_averaged == 0)
        return state._replace(epoch_average=average, epochs_averaged=state.epochs_averaged + 1)

    return epoch_average
