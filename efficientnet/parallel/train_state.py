"""What a weight update reads and writes, packed on the grid and plain in a checkpoint, and its settings.

On the host a packed state has the stages of the pipeline in front of every array: [stages, rows, ROW] for what is
packed, [stages] for a number that all stages share. A device holds its own stage's entry.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficientnet.numerics.augment import Mixing
from efficientnet.numerics.loss_scale import LossScale, LossScaleState
from efficientnet.numerics.precision import Policy
from efficientnet.parallel.packing import Packings, StagedPacking

Tree = Any


class TrainState(NamedTuple):
    """All that a weight update reads and writes. On the grid trees are packed; a checkpoint has them plain."""

    seed: jax.Array  # [] uint32, of the run; it is not in the program, which therefore fits any seed
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
    smoothing_over: str  # of `losses.SMOOTHED_OVER`
    mixing: Mixing
    batch_norm_decay: float
    update_decay: float  # 0 = no average
    epoch_decay: float
    frozen: frozenset[str] = frozenset()  # names of parameters and running statistics that stay as they are


def init_state(
    variables: Tree, seed: jax.Array, optimizer: optax.GradientTransformation, packings: Packings, rule: UpdateRule
) -> TrainState:
    """Builds the packed state of all stages before the first update.

    Args:
        variables: {'params': …, 'batch_stats': … if there is batch norm}, plain, fp32.
        seed: Of the run, [] uint32.
        optimizer: As given to `make_update`.
        packings: Of the variables.
        rule: As given to `make_update`.
    """

    def init_stage(params: jax.Array, batch_stats: jax.Array) -> TrainState:
        averaged = {'params': params.astype(rule.policy.average), 'batch_stats': batch_stats}
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            seed=seed,
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

    params = packings.params.pack(variables['params'], rule.policy.master)
    batch_stats = packings.batch_stats.pack(variables.get('batch_stats', {}), jnp.float32)
    return jax.vmap(init_stage)(params, batch_stats)


def unpack_state(state: TrainState, packings: Packings) -> TrainState:
    """Returns the plain state from all stages', as checkpoints have it: any layout of devices can go on from it."""

    def plain(x: Any, packing: StagedPacking = packings.params) -> Any:
        return packing.unpack(x) if x.shape[1:] == packing.shape else x[0]

    return TrainState(
        *(jax.tree.map(plain, value) for value in state),
    )._replace(
        batch_stats=packings.batch_stats.unpack(state.batch_stats),
        update_average=packings.unpack(state.update_average),
        epoch_average=packings.unpack(state.epoch_average),
    )


def pack_state(state: TrainState, like: TrainState, packings: Packings) -> TrainState:
    """Undoes `unpack_state`, for the layout that `packings` are of.

    Args:
        state: Plain host arrays.
        like: A packed state of all stages, or its shapes and dtypes.
        packings: Of the variables.
    """

    def packed(rows: Any, tree: Tree) -> Any:
        if rows.shape[1:] == packings.params.shape:
            return packings.params.pack(tree, rows.dtype)
        return np.broadcast_to(tree, rows.shape)

    def average(rows: Tree, tree: Tree) -> Tree:
        return {name: getattr(packings, name).pack(tree[name], rows[name].dtype) for name in rows}

    return TrainState(
        seed=packed(like.seed, state.seed),
        step=packed(like.step, state.step),
        params=packed(like.params, state.params),
        batch_stats=packings.batch_stats.pack(state.batch_stats, like.batch_stats.dtype),
        optimizer=jax.tree.map(packed, like.optimizer, state.optimizer),
        update_average=average(like.update_average, state.update_average),
        epoch_average=average(like.epoch_average, state.epoch_average),
        epochs_averaged=packed(like.epochs_averaged, state.epochs_averaged),
        loss_scale=jax.tree.map(packed, like.loss_scale, state.loss_scale),
        skipped=packed(like.skipped, state.skipped),
        skipped_in_row=packed(like.skipped_in_row, state.skipped_in_row),
    )
