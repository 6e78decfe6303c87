"""One weight update as one program: micro-batches, reduction, optimizer, rounding, averages, metrics.

Every device of the grid runs `make_update`'s function on its own rows. Its micro-batches only add to fp32
accumulators; one reduction of one fp32 vector then carries gradients, batch statistics and metrics together.
Whether that sum is finite is known to all before anything changes, so a skipped update leaves weights, optimizer
state, averages and step as they were.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from efficientnet import averaging, losses, random_keys
from efficientnet.grid import AXIS
from efficientnet.layout import Layout
from efficientnet.loss_scale import LossScale, LossScaleState, all_finite
from efficientnet.model import EfficientNet
from efficientnet.packing import Packings
from efficientnet.precision import Policy
from efficientnet.stochastic_rounding import apply_updates

Tree = Any
Batch = dict[str, jax.Array]  # image [rows, H, W, 3] uint8, label [rows] int32, mask [rows] fp32


class TrainState(NamedTuple):
    """All that a weight update reads and writes. On the grid trees are packed; a checkpoint has them plain."""

    step: jax.Array  # [] int32, updates applied; a skipped one does not count
    params: Tree  # in the master dtype
    batch_stats: Tree  # fp32; empty without batch norm
    optimizer: optax.OptState  # in the policy's state dtype, its arrays laid out as params
    update_average: Tree  # fp32 {'params', 'batch_stats'}; empty when off
    epoch_average: Tree  # likewise
    epochs_averaged: jax.Array  # [] int32
    loss_scale: LossScaleState
    skipped: jax.Array  # [] int32, in the whole run
    skipped_in_row: jax.Array  # [] int32


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """The plain-data settings of an update, beside model, optimizer and layout."""

    policy: Policy
    loss_scale: LossScale
    learning_rate: Callable[[jax.Array], jax.Array]  # number of the update, from 1 -> rate; for the report
    mean: tuple[float, ...]  # a channel
    std: tuple[float, ...]
    label_smoothing: float
    batch_norm_decay: float
    update_decay: float  # 0 = no average
    epoch_decay: float


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: jnp.dtype) -> jax.Array:
    """Casts uint8 images on the device: (image − mean) ÷ std in fp32, then to the compute dtype."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean, std = (jnp.asarray(values, jnp.float32).reshape(shape) for values in (mean, std))
    return ((images.astype(jnp.float32) - mean) / std).astype(dtype)


def init_state(
    variables: Tree, optimizer: optax.GradientTransformation, packings: Packings, rule: UpdateRule
) -> TrainState:
    """Builds the packed state before the first update.

    Args:
        variables: {'params': …, 'batch_stats': … if there is batch norm}, plain, fp32.
        optimizer: As given to `make_update`.
        packings: Of the variables.
        rule: As given to `make_update`.
    """
    params = packings.params.pack(variables['params'], rule.policy.master)
    batch_stats = packings.batch_stats.pack(variables.get('batch_stats', {}), jnp.float32)
    averaged = {'params': params.astype(rule.policy.average), 'batch_stats': batch_stats}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        batch_stats=batch_stats,
        optimizer=optimizer.init(params),
        update_average=averaged if rule.update_decay else {},
        epoch_average=averaged if rule.epoch_decay else {},
        epochs_averaged=zero,
        loss_scale=rule.loss_scale.init(),
        skipped=zero,
        skipped_in_row=zero,
    )


def unpack_state(state: TrainState, packings: Packings) -> TrainState:
    """Returns the plain state, as checkpoints have it: any layout of devices can go on from it."""
    packed = packings.params.shape
    return state._replace(
        params=packings.params.unpack(state.params),
        batch_stats=packings.batch_stats.unpack(state.batch_stats),
        optimizer=jax.tree.map(lambda x: packings.params.unpack(x) if x.shape == packed else x, state.optimizer),
        update_average=packings.unpack(state.update_average),
        epoch_average=packings.unpack(state.epoch_average),
    )


def pack_state(state: TrainState, like: TrainState, packings: Packings) -> TrainState:
    """Undoes `unpack_state`.

    Args:
        state: Plain host arrays.
        like: A packed state, or its shapes and dtypes.
        packings: Of the variables.
    """

    def params(rows: Any, tree: Tree) -> Any:
        return packings.params.pack(tree, rows.dtype) if rows.shape == packings.params.shape else tree

    def average(rows: Tree, tree: Tree) -> Tree:
        return {name: getattr(packings, name).pack(tree[name], rows[name].dtype) for name in rows}

    return state._replace(
        params=params(like.params, state.params),
        batch_stats=packings.batch_stats.pack(state.batch_stats, like.batch_stats.dtype),
        optimizer=jax.tree.map(params, like.optimizer, state.optimizer),
        update_average=average(like.update_average, state.update_average),
        epoch_average=average(like.epoch_average, state.epoch_average),
    )


def make_update(
    model: EfficientNet,
    optimizer: optax.GradientTransformation,
    packings: Packings,
    layout: Layout,
    rule: UpdateRule,
    key: jax.Array,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the per-device function of one weight update, to be mapped over the axis `AXIS`.

    Args:
        model: Applied to micro-batches in the compute dtype.
        optimizer: Takes packed fp32 gradients and master weights, returns fp32 updates.
        packings: Of the model's variables.
        layout: Replicas, micro-batch and accumulation count.
        rule: Precision, loss scale, normalisation, smoothing, averages.
        key: The 'samples' key of the run.
    """
    accumulate = _make_accumulate(model, packings, layout, rule, key)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        vector, unravel = ravel_pytree(accumulate(state, batch))
        sums = unravel(jax.lax.psum(vector, AXIS))
        # Each micro-batch contributed a mean, times the loss scale.
        share = 1.0 / (layout.replicas * layout.accumulation)
        grads = sums['grads'] * (share / state.loss_scale.scale)
        stats = sums['batch_stats'] * share

        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        # Also catches what only overflows when weights or momentum are rounded to 16 bits.
        finite = all_finite((grads, stats, updates, optimizer_state))
        params = apply_updates(state.params, updates)
        batch_stats = rule.batch_norm_decay * state.batch_stats + (1.0 - rule.batch_norm_decay) * stats
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
        metrics = sums['metrics'] | {
            'learning_rate': rule.learning_rate(state.step + 1),
            'gradient_norm': optax.tree.norm(grads),
            'update_norm': optax.tree.norm(updates),
            'weight_norm': optax.tree.norm(state.params.astype(jnp.float32)),
            'loss_scale': state.loss_scale.scale,
            'skipped': new.skipped,
            'skipped_in_row': new.skipped_in_row,
        }
        return new, metrics

    return update


def _make_accumulate(
    model: EfficientNet, packings: Packings, layout: Layout, rule: UpdateRule, key: jax.Array
) -> Callable[[TrainState, Batch], Tree]:
    """Returns the function that adds up one replica's micro-batches: packed fp32 gradients, statistics, metrics."""

    def micro_loss(weights: Tree, batch_stats: Tree, scale: jax.Array, batch: Batch, keys: jax.Array) -> tuple:
        images = normalise(batch['image'], rule.mean, rule.std, rule.policy.compute)
        logits, mutated = model.apply(
            {'params': weights, 'batch_stats': batch_stats},
            images,
            train=True,
            sample_keys=keys,
            mutable=['batch_stats'],
        )
        counted = batch['mask'] > 0
        loss = jnp.where(counted, losses.cross_entropy(logits, batch['label'], rule.label_smoothing), 0.0)
        metrics = {
            'loss': loss.sum(),
            'correct': (losses.hits(logits, batch['label'], 1) & counted).sum(dtype=jnp.float32),
            'count': counted.sum(dtype=jnp.float32),
        }
        return loss.mean() * scale, (metrics, mutated.get('batch_stats', {}))

    def accumulate(state: TrainState, batch: Batch) -> Tree:
        # Cast and unpacked once an update, not once a micro-batch.
        weights = packings.params.unpack(state.params.astype(rule.policy.compute))
        batch_stats = packings.batch_stats.unpack(state.batch_stats)
        first_row = jax.lax.axis_index(AXIS) // layout.stages * layout.rows

        def micro_step(sums: Tree, micro: tuple[jax.Array, Batch]) -> tuple[Tree, None]:
            index, micro_batch = micro
            rows = first_row + index * layout.micro_batch + jnp.arange(layout.micro_batch, dtype=jnp.int32)
            keys = random_keys.sample_keys(key, state.step, rows)
            grads, (metrics, stats) = jax.grad(micro_loss, has_aux=True)(
                weights, batch_stats, state.loss_scale.scale, micro_batch, keys
            )
            found = {
                'grads': packings.params.pack(grads, jnp.float32),
                'batch_stats': packings.batch_stats.pack(stats, jnp.float32),
                'metrics': metrics,
            }
            return jax.tree.map(jnp.add, sums, found), None

        zeros = {
            'grads': jnp.zeros(packings.params.shape, jnp.float32),
            'batch_stats': jnp.zeros(packings.batch_stats.shape, jnp.float32),
            'metrics': dict.fromkeys(('loss', 'correct', 'count'), jnp.zeros((), jnp.float32)),
        }
        micro_batches = jax.tree.map(
            lambda rows: rows.reshape(layout.accumulation, layout.micro_batch, *rows.shape[1:]), batch
        )
        indices = jnp.arange(layout.accumulation, dtype=jnp.int32)
        sums, _ = jax.lax.scan(micro_step, zeros, (indices, micro_batches))
        return sums

    return accumulate


def make_epoch_average(rule: UpdateRule) -> Callable[[TrainState], TrainState]:
    """Returns the per-device function that takes the weights at an epoch's end into the epoch average."""

    def epoch_average(state: TrainState) -> TrainState:
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        average = averaging.epoch_average(state.epoch_average, variables, rule.epoch_decay, state.epochs_averaged == 0)
        return state._replace(epoch_average=average, epochs_averaged=state.epochs_averaged + 1)

    return epoch_average
