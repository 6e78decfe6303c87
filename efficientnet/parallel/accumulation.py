"""Gradients of a replica's micro-batches, added up over its pipeline stages: the loop inside a weight update.

Every device runs the same loop over the ticks of a timetable (pipeline.py) and, in it, its own stage's branch. What
goes from stage to stage is one flat array each way and tick, activations forward and their gradients backward,
padded to the widest boundary because all devices of a permutation exchange equal shapes. Between a micro-batch's
forward and backward a stage keeps its input, or under recompute='none' all that the backward needs, in a stash of
the same kind. The last stage goes forward and backward at once and keeps nothing. With one stage there is nothing
to choose, hand over or keep, and the loop is the usual one over micro-batches.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efficientnet.model.network import EfficientNet
from efficientnet.model.scaling import boundary_shape
from efficientnet.numerics import augment, freezing, losses, random_keys
from efficientnet.parallel.layout import AXIS, Layout
from efficientnet.parallel.packing import Packings, own_stage
from efficientnet.parallel.pipeline import NONE, timetable
from efficientnet.parallel.residuals import Residuals
from efficientnet.parallel.stages import stage_blocks
from efficientnet.parallel.train_state import TrainState, UpdateRule

Tree = Any
Batch = dict[str, jax.Array]  # image [rows, H, W, 3] uint8, label [rows] int32, mask [rows] fp32
METRICS = ('loss', 'correct', 'count')


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: jnp.dtype) -> jax.Array:
    """Casts uint8 images on the device: (image − mean) ÷ std in fp32, then to the compute dtype."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean, std = (jnp.asarray(values, jnp.float32).reshape(shape) for values in (mean, std))
    return ((images.astype(jnp.float32) - mean) / std).astype(dtype)


class Micro(NamedTuple):
    """One micro-batch, as every stage of a replica sees it."""

    image: jax.Array  # [N, H, W, 3] uint8
    label: jax.Array  # [N] int32
    mask: jax.Array  # [N] fp32
    keys: jax.Array  # [N] typed keys
    mixing: augment.Coefficients


@dataclasses.dataclass(frozen=True)
class Stage:
    """The blocks of one pipeline stage, as functions of its variables, what comes in, and a micro-batch.

    Attributes:
        model: Those blocks.
        first: Whether its input is the images.
        last: Whether it ends in the loss.
        rule: Precision, normalisation, mixing, smoothing.
    """

    model: EfficientNet
    first: bool
    last: bool
    rule: UpdateRule

    def run(self, params: Tree, batch_stats: Tree, x: jax.Array | None, micro: Micro, scale: jax.Array) -> tuple:
        """Goes forward.

        Args:
            params: Of the blocks, in the compute dtype.
            batch_stats: Of the blocks.
            x: Activation from the stage before, [N, H, W, C]; None for the first stage.
            micro: The micro-batch.
            scale: Of the loss, fp32 [].

        Returns:
            The activation for the next stage or, of the last, the mean loss times `scale`; and {'batch_stats': of
            this micro-batch, 'metrics': sums over its examples, of the last stage}.
        """
        if self.first:
            x = normalise(micro.image, self.rule.mean, self.rule.std, self.rule.policy.compute)
            x = augment.mix_images(x, micro.mixing)
        variables = {'params': params, 'batch_stats': batch_stats}
        y, mutated = self.model.apply(variables, x, train=True, sample_keys=micro.keys, mutable=['batch_stats'])
        found = {'batch_stats': mutated.get('batch_stats', {})}
        if not self.last:
            return y, found
        counted = micro.mask > 0
        labels, weights = augment.mix_labels(micro.label, micro.mixing)
        loss = losses.cross_entropy(y, labels, self.rule.label_smoothing, self.rule.smoothing_over, weights)
        loss = jnp.where(counted, loss, 0.0)
        metrics = {
            'loss': loss.sum(),
            'correct': (losses.hits(y, micro.label, 1) & counted).sum(dtype=jnp.float32),
            'count': counted.sum(dtype=jnp.float32),
        }
        return loss.mean() * scale, found | {'metrics': metrics}

    def vjp(self, variables: Tree, x: jax.Array | None, micro: Micro, scale: jax.Array) -> tuple:
        """Goes forward and returns what `run` does, with the function back between the two.

        That function maps the gradient of what came out to those of the parameters, None for frozen ones, and,
        except of the first stage, of x.
        """
        params = variables['params']

        def function(trained: Tree, *x: jax.Array) -> tuple:
            return self.run(freezing.join(trained, params), variables['batch_stats'], *(x or (None,)), micro, scale)

        inputs = () if self.first else (x,)
        # What is not an argument costs no gradient: leading blocks that are frozen go forward only.
        return jax.vjp(function, freezing.leave_out(params, self.rule.frozen), *inputs, has_aux=True)


def make_accumulate(
    model: EfficientNet, packings: Packings, layout: Layout, rule: UpdateRule, key: jax.Array
) -> Callable[[TrainState, Batch], Tree]:
    """Returns the per-device function that adds up what one stage of one replica finds in its micro-batches.

    It takes the device's state and its part of the replica's rows (see `Grid.shard`), and returns packed fp32
    'grads' (times the loss scale) and 'batch_stats', and the 'metrics' (not zero on the last stage only).

    Args:
        model: The whole network, in the compute dtype.
        packings: Of the model's variables, by stage.
        layout: Replicas, stages, micro-batch, accumulation count, schedule and recomputation.
        rule: Precision, normalisation, mixing, smoothing.
        key: The 'samples' key of the run.
    """
    blocks = stage_blocks(model.spec, layout.splits)
    model = model.clone(recompute=layout.recompute == 'block')
    stages = [
        Stage(model.clone(blocks=names), number == 0, number == len(blocks) - 1, rule)
        for number, names in enumerate(blocks)
    ]

    def accumulate(state: TrainState, batch: Batch) -> Tree:
        if len(stages) > 1:
            batch = _gather_rows(batch, layout)
        first_row = jax.lax.axis_index(AXIS) // layout.stages * layout.rows
        keys = random_keys.sample_keys(key, state.step, first_row + jnp.arange(layout.rows, dtype=jnp.int32))
        micros = jax.tree.map(
            lambda rows: rows.reshape(layout.accumulation, layout.micro_batch, *rows.shape[1:]),
            Micro(batch['image'], batch['label'], batch['mask'], keys, augment.Coefficients(None, None)),
        )
        draw = functools.partial(augment.draw, rule.mixing, size=batch['image'].shape[1:3])
        micros = micros._replace(mixing=jax.vmap(draw)(micros.keys, micros.mask))
        # Cast once an update, not once a micro-batch.
        rows = {'params': state.params.astype(rule.policy.compute), 'batch_stats': state.batch_stats}
        if len(stages) == 1:
            return _run_loop(stages, packings, rows, micros, state.loss_scale.scale)
        return _run_pipeline(stages, packings, rows, micros, state.loss_scale.scale, layout)

    return accumulate


def _run_loop(stages: list[Stage], packings: Packings, rows: Tree, micros: Micro, scale: jax.Array) -> Tree:
    """The one stage there is, one micro-batch after the other."""
    variables = packings.unpack_stage(0, rows)

    def step(sums: Tree, micro: Micro) -> tuple[Tree, None]:
        loss, pull, found = stages[0].vjp(variables, None, micro, scale)
        (grads,) = pull(jnp.ones_like(loss))
        found['grads'] = grads
        return _add(sums, _packed(packings, 0, found)), None

    sums, _ = jax.lax.scan(step, _packed(packings, 0, {}), micros)
    return sums


def _run_pipeline(
    stages: list[Stage], packings: Packings, rows: Tree, micros: Micro, scale: jax.Array, layout: Layout
) -> Tree:
    """All stages, each on its own device, tick by tick."""
    table = timetable(layout.schedule, layout.stages, layout.accumulation)
    branches = Branches(stages, packings, rows, micros, scale, keeps_all=layout.recompute == 'none')
    depth = table.stash_depth(first=branches.keeps_all)
    onward = [pair for group in layout.replica_groups for pair in itertools.pairwise(group)]
    back = [(after, before) for before, after in onward]
    stage = own_stage(len(stages))

    def tick(carry: tuple, times: tuple) -> tuple[tuple, None]:
        x, dy, stash, sums = carry
        forward, backward = (row[stage] for row in times)
        kept = stash[backward % depth] if depth else stash
        sent, sent_back, keep, found = jax.lax.switch(stage, branches.all, x, dy, kept, forward, backward)
        if depth:
            place = forward % depth
            stash = stash.at[place].set(jnp.where(forward != NONE, keep, stash[place]))
        x, dy = jax.lax.ppermute(sent, AXIS, onward), jax.lax.ppermute(sent_back, AXIS, back)
        return (x, dy, stash, _add(sums, found)), None

    nothing = branches.nothing
    stash = jnp.zeros((depth, *nothing.keep.shape), nothing.keep.dtype)
    start = (nothing.activation, nothing.gradient, stash, nothing.sums)
    (*_, sums), _ = jax.lax.scan(tick, start, tuple(table))
    return sums


class Done(NamedTuple):
    """What a stage did in one tick; arrays of equal shapes on all stages."""

    activation: jax.Array  # [width], for the stage after
    gradient: jax.Array  # [width], for the stage before
    keep: jax.Array  # [kept], for its own backward
    sums: Tree  # as `make_accumulate` says


class Branches:
    """The work of every stage in one tick, each as a branch of the same switch.

    Args:
        stages: From first to last, at least two.
        packings: Of the variables, by stage.
        rows: The device's own packed variables, parameters in the compute dtype.
        micros: All micro-batches of the replica.
        scale: Of the loss.
        keeps_all: Whether a stage keeps what its backward needs, or its input, from which it computes that again.
    """

    def __init__(
        self, stages: list[Stage], packings: Packings, rows: Tree, micros: Micro, scale: jax.Array, *, keeps_all: bool
    ) -> None:
        self._stages, self._packings, self._rows, self._micros, self._scale = stages, packings, rows, micros, scale
        self.keeps_all = keeps_all
        spec, (_, size, images, *_) = stages[0].model.spec, micros.image.shape
        self._shapes = [(size, *boundary_shape(spec, stage.model.blocks[0], images)) for stage in stages]
        self._residuals = []
        dtype = rows['params'].dtype
        width = max(map(math.prod, self._shapes[1:]))
        keep = jnp.zeros(width if len(stages) > 2 else 0, dtype)
        if keeps_all:
            self._residuals = [self._trace_residuals(number) for number in range(len(stages) - 1)]
            keep = jnp.zeros(max(residuals.size for residuals in self._residuals), jnp.uint8)
        wire = jnp.zeros(width, dtype)
        self.nothing = Done(wire, wire, keep, _packed(packings, 0, {}))
        self.all = [functools.partial(self._run, number) for number in range(len(stages))]

    def _run(
        self, number: int, x: jax.Array, dy: jax.Array, kept: jax.Array, forward: jax.Array, backward: jax.Array
    ) -> Done:
        """One stage's tick: first backward, then forward, each if there is a micro-batch for it."""
        nothing = self.nothing
        if self._stages[number].last:
            return jax.lax.cond(forward != NONE, lambda: self._both(number, x, forward), lambda: nothing)
        gradient, grads = jax.lax.cond(
            backward != NONE,
            lambda: self._backward(number, kept, dy, backward),
            lambda: (nothing.gradient, nothing.sums['grads']),
        )
        activation, keep, batch_stats = jax.lax.cond(
            forward != NONE,
            lambda: self._forward(number, x, forward),
            lambda: (nothing.activation, nothing.keep, nothing.sums['batch_stats']),
        )
        return Done(activation, gradient, keep, nothing.sums | {'grads': grads, 'batch_stats': batch_stats})

    def _both(self, number: int, x: jax.Array, index: jax.Array) -> Done:
        """The last stage on one micro-batch, there and back."""
        loss, pull, found = self._vjp(number, x, index)
        found['grads'], dx = pull(jnp.ones_like(loss))
        sums = _packed(self._packings, number, found)
        return self.nothing._replace(gradient=self._flat(dx), sums=sums)

    def _forward(self, number: int, x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """An earlier stage forward: activation, what it keeps, packed batch statistics."""
        y, pull, found = self._vjp(number, x, index)
        keep = x[: self.nothing.keep.size]
        if self.keeps_all:
            keep = _pad(self._residuals[number].pack(pull), self.nothing.keep.size)
        return self._flat(y), keep, _packed(self._packings, number, found)['batch_stats']

    def _backward(self, number: int, kept: jax.Array, dy: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """An earlier stage backward: gradient for the stage before, packed gradients."""
        if self.keeps_all:
            pull = self._residuals[number].unpack(kept, self._variables(number)['params'])
        else:
            _, pull, _ = self._vjp(number, kept, index)
        grads, *dx = pull(self._unflat(dy, number + 1))
        packed = _packed(self._packings, number, {'grads': grads})['grads']
        return self._flat(dx[0]) if dx else self.nothing.gradient, packed

    def _vjp(self, number: int, x: jax.Array, index: jax.Array) -> tuple:
        stage, micro = self._stages[number], jax.tree.map(lambda rows: rows[index], self._micros)
        return stage.vjp(self._variables(number), None if stage.first else self._unflat(x, number), micro, self._scale)

    def _variables(self, number: int) -> Tree:
        return self._packings.unpack_stage(number, self._rows)

    def _flat(self, x: jax.Array) -> jax.Array:
        return _pad(x.reshape(-1), self.nothing.activation.size)

    def _unflat(self, x: jax.Array, number: int) -> jax.Array:
        """The activation that enters a stage."""
        shape = self._shapes[number]
        return x[: math.prod(shape)].reshape(shape)

    def _trace_residuals(self, number: int) -> 'Residuals':
        found = {}

        def probe(x: jax.Array) -> jax.Array:
            variables = self._variables(number)
            _, pull, _ = self._stages[number].vjp(variables, x, jax.tree.map(lambda r: r[0], self._micros), self._scale)
            found['residuals'] = Residuals(pull, variables['params'])
            return x

        jax.eval_shape(probe, jax.ShapeDtypeStruct(self._shapes[number], self._rows['params'].dtype))
        return found['residuals']


def _pad(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, (0, size - x.size))


def _packed(packings: Packings, stage: int, found: Tree) -> Tree:
    """What one stage found, packed, and zeros for what it did not find."""
    zero, sums = jnp.zeros((), jnp.float32), {}
    for name, packing in (('grads', packings.params), ('batch_stats', packings.batch_stats)):
        own = packing.parts[stage]
        rows = own.pack(found[name], jnp.float32) if name in found else jnp.zeros(own.shape, jnp.float32)
        sums[name] = packing.pad(rows)
    return sums | {'metrics': found.get('metrics', dict.fromkeys(METRICS, zero))}


def _add(sums: Tree, found: Tree) -> Tree:
    return jax.tree.map(jnp.add, sums, found)


def _gather_rows(batch: Batch, layout: Layout) -> Batch:
    """Brings the replica's rows, of which every stage holds a share, to all of its stages.

    Each row has then crossed the link from the host once. The shares are equal; what filled the last one up is cut.
    """

    def gather(rows: jax.Array) -> jax.Array:
        return jax.lax.all_gather(rows, AXIS, axis_index_groups=layout.replica_groups, tiled=True)[: layout.rows]

    return jax.tree.map(gather, batch)
