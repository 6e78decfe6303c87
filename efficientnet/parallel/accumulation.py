"""Gradients of a replica's micro-batches, added up over its pipeline stages: the loop inside a weight update.

Every device runs the same loop over the ticks of a timetable (pipeline.py) and, in it, its own stage's part. What
goes from stage to stage is one flat array each way and tick, activations forward and their gradients backward,
padded to the widest boundary because all devices of a permutation exchange equal shapes. Between a micro-batch's
forward and backward a stage keeps its input, or under recompute='none' all that the backward needs, in a stash as
large as the largest stage's. The last stage goes forward and backward at once and keeps nothing. With one stage there
is nothing to choose, hand over or keep, and the loop is the usual one over micro-batches.
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
from efficientnet.parallel.pipeline import NONE, Timetable, timetable
from efficientnet.parallel.residuals import Residuals, largest
from efficientnet.parallel.stages import stage_blocks
from efficientnet.parallel.train_state import TrainState, UpdateRule

Tree = Any
Batch = dict[str, jax.Array]  # image [rows, H, W, 3] uint8, label [rows] int32, mask [rows] fp32
SUMS = ('loss', 'correct', 'count')  # over the images of an update


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
            params: Of the blocks, kernels of convolutions in the compute dtype.
            batch_stats: Of the blocks.
            x: Activation from the stage before, [N, H, W, C]; None for the first stage.
            micro: The micro-batch.
            scale: Of the loss, fp32 [].

        Returns:
            The activation for the next stage or, of the last, the mean loss times `scale`; and {'batch_stats': of
            this micro-batch, 'metrics': sums over its examples, of the last stage}.
        """
        if self.first:
            image = _without_blanks(micro) if self.model.norm == 'batch' else micro.image
            x = normalise(image, self.rule.mean, self.rule.std, self.rule.policy.compute)
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


def _without_blanks(micro: Micro) -> jax.Array:
    """The images, with the first good one in the place of blanks, which would be part of batch norm's statistics."""
    good = micro.mask > 0
    return jnp.where(good[:, None, None, None], micro.image, micro.image[jnp.argmax(good)][None])


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
        rows = {'params': state.params, 'batch_stats': state.batch_stats}
        if rule.policy.compute != rule.policy.master:  # cast once an update, not once a micro-batch
            rows['cast'] = state.params.astype(rule.policy.compute)
        if len(stages) == 1:
            return _run_loop(stages, packings, rows, micros, state.loss_scale.scale)
        return _run_pipeline(stages, packings, rows, micros, state.loss_scale.scale, layout)

    return accumulate


def _run_loop(stages: list[Stage], packings: Packings, rows: Tree, micros: Micro, scale: jax.Array) -> Tree:
    """The one stage there is, one micro-batch after the other; packs the sums at the end."""
    variables = _unpack(packings, 0, rows)

    def step(sums: Tree, micro: Micro) -> tuple[Tree, None]:
        loss, pull, found = stages[0].vjp(variables, None, micro, scale)
        (found['grads'],) = pull(jnp.ones_like(loss))
        return jax.tree.map(lambda total, more: total + more.astype(total.dtype), sums, found), None

    trained = freezing.leave_out(variables['params'], stages[0].rule.frozen)
    plain = {'grads': trained, 'batch_stats': variables['batch_stats']}
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), plain)
    sums, _ = jax.lax.scan(step, _no_sums(packings) | zeros, micros)
    return sums | {
        'grads': packings.params.parts[0].pack(sums['grads'], jnp.float32),
        'batch_stats': packings.batch_stats.parts[0].pack(sums['batch_stats'], jnp.float32),
    }


def _unpack(packings: Packings, stage: int, rows: Tree) -> Tree:
    """Returns one stage's variables, kernels of convolutions in the compute dtype and all else as it is stored."""
    rows = dict(rows)
    cast = rows.pop('cast', None)
    variables = packings.unpack_stage(stage, rows)
    if cast is not None:
        kernels = packings.unpack_stage(stage, {'params': cast})['params']
        params = jax.tree.map(lambda own, kernel: kernel if own.ndim == 4 else own, variables['params'], kernels)
        variables |= {'params': params}
    return variables


def _run_pipeline(
    stages: list[Stage], packings: Packings, rows: Tree, micros: Micro, scale: jax.Array, layout: Layout
) -> Tree:
    """All stages, each on its own device, tick by tick."""
    table = timetable(layout.schedule, layout.stages, layout.accumulation)
    work = Work(stages, packings, rows, micros, scale, keeps_all=layout.recompute == 'none', table=table)
    onward = [pair for group in layout.replica_groups for pair in itertools.pairwise(group)]
    back = [(after, before) for before, after in onward]
    stage = own_stage(len(stages))

    def tick(state: InFlight, times: tuple) -> tuple[InFlight, None]:
        for number in range(len(stages)):
            state = work.do(number, state, *(jnp.where(stage == number, row[number], NONE) for row in times))
        state = _when_done(state, times[0][0])
        # A stage that rests sends on what it was sent; where nothing came from, the timetable takes nothing.
        x, dy = jax.lax.ppermute(state.x, AXIS, onward), jax.lax.ppermute(state.dy, AXIS, back)
        return state._replace(x=x, dy=dy), None

    state, _ = jax.lax.scan(tick, work.start, tuple(table))
    return state.sums


class InFlight(NamedTuple):
    """What goes through the ticks; arrays of equal shapes on all stages."""

    x: jax.Array  # [width], the activation from the stage before, then that for the stage after
    dy: jax.Array  # [width], the gradient from the stage after, then that for the stage before
    stash: Tree  # of [depth, …], for the stage's own backward
    sums: Tree  # as `make_accumulate` says


def _when_done(state: InFlight, index: jax.Array) -> InFlight:
    """Makes what is sent wait for all that the tick did, by a loop of no rounds that takes all of it.

    The last stage's work does not touch x, nor the first one's dy. A CPU's exchange waits for the neighbour, and XLA,
    to which a barrier is no order there, would have the last stage first wait for x and only then work on the old one.

    Args:
        state: At the tick's end.
        index: Of any stage's micro-batch, or `NONE`.
    """
    rounds = jnp.minimum(index, NONE) - NONE  # 0, which XLA, not knowing the timetable's numbers, cannot tell

    def round_(_: jax.Array, carry: tuple) -> tuple:
        return jax.tree.map(lambda each: each + carry[-1].astype(each.dtype), carry)

    done = state.sums['grads'][0, 0]
    x, dy, _ = jax.lax.fori_loop(0, rounds, round_, (state.x, state.dy, done))
    return state._replace(x=x, dy=dy)


class Work:
    """What the stages do in a tick, each as a loop of one round on its own device and of none on the others.

    A loop changes in place what goes through it. Through a conditional, and a switch in the same way, XLA copies it
    whole: the stash, which under recompute='none' is most of the memory, was there several times over.

    Args:
        stages: From first to last, at least two.
        packings: Of the variables, by stage.
        rows: The device's own packed variables and, where it is not the master dtype, parameters in the compute dtype.
        micros: All micro-batches of the replica.
        scale: Of the loss.
        keeps_all: Whether a stage keeps what its backward needs, or its input, from which it computes that again.
        table: Which stage works on which micro-batch when.

    Attributes:
        start: What goes into the first tick.
    """

    def __init__(
        self,
        stages: list[Stage],
        packings: Packings,
        rows: Tree,
        micros: Micro,
        scale: jax.Array,
        *,
        keeps_all: bool,
        table: Timetable,
    ) -> None:
        self._stages, self._packings, self._given = stages, packings, (rows, micros, scale)
        self._keeps_all = keeps_all
        spec, (_, size, images, *_) = stages[0].model.spec, micros.image.shape
        self._shapes = [(size, *boundary_shape(spec, stage.model.blocks[0], images)) for stage in stages]
        self._depth = table.stash_depth(first=keeps_all)
        self._dtype = stages[0].rule.policy.compute  # of what goes from stage to stage
        self._residuals = [self._trace_residuals(number) for number in range(len(stages) - 1)] if keeps_all else []
        wire = jnp.zeros(max(map(math.prod, self._shapes[1:])), self._dtype)
        widths = largest(self._residuals) if keeps_all else {str(wire.dtype): wire.size}
        stash = {name: jnp.zeros((self._depth, size), name) for name, size in widths.items()}
        self.start = InFlight(wire, wire, stash, _no_sums(packings))

    def do(self, number: int, state: InFlight, forward: jax.Array, backward: jax.Array) -> InFlight:
        """Does one stage's tick: first backward, then forward, each if there is a micro-batch for it, else nothing.

        Backward comes first, for forward takes the place in the stash that it is done with.
        """
        if self._stages[number].last:
            return self._once(forward, functools.partial(self._both, number), state)
        state = self._once(backward, functools.partial(self._backward, number), state)
        return self._once(forward, functools.partial(self._forward, number), state)

    def _once(self, index: jax.Array, work: Callable, state: InFlight) -> InFlight:
        def round_(index: jax.Array, state: InFlight) -> InFlight:
            # What does not depend on the round, XLA would compute before the loop, whether there is a round or not.
            index, given, x, dy = jax.lax.optimization_barrier((index, self._given, state.x, state.dy))
            return work(index, given, state._replace(x=x, dy=dy))

        return jax.lax.fori_loop(index, jnp.where(index == NONE, NONE, index + 1), round_, state)

    def _both(self, number: int, index: jax.Array, given: tuple, state: InFlight) -> InFlight:
        """The last stage on one micro-batch, there and back."""
        loss, pull, found = self._vjp(number, index, given, state.x)
        found['grads'], dx = pull(jnp.ones_like(loss))
        return state._replace(dy=self._flat(dx, state), sums=_add(self._packings, number, state.sums, found))

    def _forward(self, number: int, index: jax.Array, given: tuple, state: InFlight) -> InFlight:
        """An earlier stage forward."""
        y, pull, found = self._vjp(number, index, given, state.x)
        stash = state.stash
        if self._keeps_all:
            stash = self._residuals[number].put(pull, stash, index % self._depth)
        elif not self._stages[number].first:
            stash = {name: rows.at[index % self._depth].set(state.x) for name, rows in stash.items()}
        sums = _add(self._packings, number, state.sums, found)
        return state._replace(x=self._flat(y, state), stash=stash, sums=sums)

    def _backward(self, number: int, index: jax.Array, given: tuple, state: InFlight) -> InFlight:
        """An earlier stage backward."""
        if self._keeps_all:
            params = _unpack(self._packings, number, given[0])['params']
            pull = self._residuals[number].take(state.stash, index % self._depth, params)
        else:
            kept = None if self._stages[number].first else next(iter(state.stash.values()))[index % self._depth]
            _, pull, _ = self._vjp(number, index, given, kept)
        grads, *dx = pull(self._unflat(state.dy, number + 1))
        state = state._replace(sums=_add(self._packings, number, state.sums, {'grads': grads}))
        return state._replace(dy=self._flat(dx[0], state)) if dx else state

    def _vjp(self, number: int, index: jax.Array, given: tuple, x: jax.Array | None) -> tuple:
        stage, (rows, micros, scale) = self._stages[number], given
        micro, variables = jax.tree.map(lambda leaf: leaf[index], micros), _unpack(self._packings, number, rows)
        return stage.vjp(variables, None if stage.first else self._unflat(x, number), micro, scale)

    def _flat(self, x: jax.Array, state: InFlight) -> jax.Array:
        x = x.reshape(-1)
        return jnp.pad(x, (0, state.x.size - x.size))

    def _unflat(self, x: jax.Array, number: int) -> jax.Array:
        """The activation that enters a stage."""
        shape = self._shapes[number]
        return x[: math.prod(shape)].reshape(shape)

    def _trace_residuals(self, number: int) -> Residuals:
        found = {}

        def probe(x: jax.Array) -> jax.Array:
            rows, micros, scale = self._given
            variables = _unpack(self._packings, number, rows)
            _, pull, _ = self._stages[number].vjp(variables, x, jax.tree.map(lambda leaf: leaf[0], micros), scale)
            found['residuals'] = Residuals(pull, variables['params'])
            return x

        jax.eval_shape(probe, jax.ShapeDtypeStruct(self._shapes[number], self._dtype))
        return found['residuals']


def _no_sums(packings: Packings) -> Tree:
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    return {
        'grads': zeros(packings.params.shape),
        'batch_stats': zeros(packings.batch_stats.shape),
        'metrics': dict.fromkeys(SUMS, zeros(())),
    }


def _add(packings: Packings, stage: int, sums: Tree, found: Tree) -> Tree:
    """Adds what one stage found in a micro-batch, plain trees, to packed sums."""
    sums = dict(sums)
    for name, packing in (('grads', packings.params), ('batch_stats', packings.batch_stats)):
        if name in found:
            sums[name] = packing.parts[stage].add(sums[name], found[name])
    if 'metrics' in found:
        sums['metrics'] = jax.tree.map(jnp.add, sums['metrics'], found['metrics'])
    return sums


def _gather_rows(batch: Batch, layout: Layout) -> Batch:
    """Brings the replica's rows, of which every stage holds a share, to all of its stages.

    Each row has then crossed the link from the host once. The shares are equal; what filled the last one up is cut.
    """

    def gather(rows: jax.Array) -> jax.Array:
        return jax.lax.all_gather(rows, AXIS, axis_index_groups=layout.replica_groups, tiled=True)[: layout.rows]

    return jax.tree.map(gather, batch)
