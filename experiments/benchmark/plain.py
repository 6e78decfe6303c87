"""What the pipelined update is compared with, written without pipeline, packing or stash, on one device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efficientnet.loop.assemble import Parts
from efficientnet.numerics import augment, random_keys
from efficientnet.numerics.stochastic_rounding import apply_updates
from efficientnet.parallel.accumulation import SUMS, Micro, Stage
from efficientnet.parallel.grid import compiler_options
from efficientnet.parallel.stages import stage_blocks
from efficientnet.parallel.update import make_apply

Tree = Any
Piece = Callable[[], None]


def make_step(parts: Parts, batch: dict[str, jax.Array]) -> Piece:
    """Returns a weight update as one would write it: `jax.jit`, a scan of `value_and_grad` over micro-batches.

    Gradients are summed as the tree they are. Weights and optimizer state stay packed between updates, because the
    optimizer and its rounding, which are the same, want them so.

    Args:
        parts: Of a run in one stage.
        batch: A global batch, on the device.
    """
    layout, rule, optimizer, (packing,) = parts.grid.layout, parts.rule, parts.optimizer, parts.packings.params.parts
    model = parts.model.clone(recompute=layout.recompute == 'block')
    network = Stage(model, first=True, last=True, rule=rule)
    samples = random_keys.purpose_key(parts.config.seed, 'samples')

    def step(params: jax.Array, state: Tree, number: jax.Array, batch: Tree) -> tuple:
        keys = random_keys.sample_keys(samples, number, jnp.arange(layout.rows, dtype=jnp.int32))
        micros = _micros(parts, batch, keys)
        tree = packing.unpack(params)
        scale = rule.loss_scale.init().scale

        def add(sums: Tree, micro: Micro) -> tuple[Tree, jax.Array]:
            (loss, _), grads = jax.value_and_grad(network.run, has_aux=True)(tree, {}, None, micro, scale)
            return jax.tree.map(lambda total, grad: total + grad.astype(jnp.float32), sums, grads), loss

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)
        sums, found = jax.lax.scan(add, zeros, micros)
        grads = packing.pack(sums, jnp.float32) / (layout.accumulation * scale)
        updates, state = optimizer.update(grads, state, params)
        return apply_updates(params, updates), state, number + 1, found.mean() / scale

    start = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), parts.init_state())
    carry = [start.params, start.optimizer, jnp.zeros((), jnp.int32)]
    step = _jit(step, donate_argnums=(0, 1, 2))

    def piece() -> None:
        *carry[:], loss = jax.block_until_ready(step(*carry, batch))
        del loss

    return piece


def make_stages(parts: Parts, variables: Tree, batch: dict[str, jax.Array]) -> dict[str, Piece]:
    """Returns each stage's forward ('forward_0', not of the last) and forward + backward ('both_0') of an update.

    One micro-batch after the other in one program, as in an update: a program for each would ask for its memory anew
    each time. What comes of a micro-batch is thrown away with the next.

    Args:
        parts: Of the pipelined run.
        variables: Plain, of the whole network.
        batch: A global batch, on one device.
    """
    layout, rule = parts.grid.layout, parts.rule
    keys = random_keys.sample_keys(random_keys.purpose_key(0, 'samples'), jnp.int32(0), jnp.arange(layout.rows))
    micros = _micros(parts, batch, keys)
    scale = rule.loss_scale.init().scale
    blocks, pieces, x = stage_blocks(parts.model.spec, layout.splits), {}, None
    for number, names in enumerate(blocks):
        model = parts.model.clone(blocks=names, recompute=layout.recompute == 'block')
        stage = Stage(model, number == 0, number == len(blocks) - 1, rule)
        own = {name: variables['params'][name] for name in names}
        own = {'params': jax.tree.map(lambda leaf: leaf.astype(rule.policy.master), own), 'batch_stats': {}}
        forward, both = _stage_functions(stage, scale)
        y = None
        if not stage.last:
            y = _jit(_all_of(forward))(own, (x, micros))
            pieces[f'forward_{number}'] = _call(_jit(_last_of(forward)), own, (x, micros))
        pieces[f'both_{number}'] = _call(_jit(_last_of(both)), own, (x, micros, y))
        x = y
    return pieces


def make_weight_update(parts: Parts) -> Piece:
    """Returns what an update of a run in one stage does once, after its micro-batches (see `make_apply`)."""
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), parts.init_state())
    sums = {
        'grads': jnp.full(state.params.shape, 1e-3, jnp.float32),
        'batch_stats': jnp.zeros(state.batch_stats.shape),
        'metrics': dict.fromkeys(SUMS, jnp.ones(())),
        'stop': jnp.zeros(()),
    }
    step = _jit(make_apply(parts.optimizer, parts.packings, parts.grid.layout, parts.rule), donate_argnums=0)

    def piece() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, sums))

    return piece


def _stage_functions(stage: Stage, scale: jax.Array) -> tuple[Callable, Callable]:
    """A stage's forward, and its forward and backward, of one micro-batch.

    The gradient that comes back to a stage may be any array of the shape of what it sent.
    """

    def forward(variables: Tree, x: jax.Array | None, micro: Micro) -> jax.Array:
        return stage.run(variables['params'], variables['batch_stats'], x, micro, scale)[0]

    def both(variables: Tree, x: jax.Array | None, micro: Micro, dy: jax.Array | None) -> tuple:
        y, pull, found = stage.vjp(variables, x, micro, scale)
        return found, pull(jnp.ones_like(y) if stage.last else dy)

    return forward, both


def _all_of(function: Callable) -> Callable:
    """Runs a function on one micro-batch after the other and returns all that it said."""
    return lambda variables, micros: jax.lax.map(lambda micro: function(variables, *micro), micros)


def _last_of(function: Callable) -> Callable:
    """Runs a function on one micro-batch after the other and returns what it said of the last."""

    def run(variables: Tree, micros: Tree) -> Tree:
        one = jax.tree.map(lambda rows: rows[0], micros)
        shapes = jax.eval_shape(function, variables, *one)
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(lambda _, micro: (function(variables, *micro), None), start, micros)[0]

    return run


def _micros(parts: Parts, batch: dict[str, jax.Array], keys: jax.Array) -> Micro:
    """The micro-batches of a global batch, of which nothing is mixed."""
    layout = parts.grid.layout
    return jax.tree.map(
        lambda rows: rows.reshape(layout.accumulation, layout.micro_batch, *rows.shape[1:]),
        Micro(batch['image'], batch['label'], batch['mask'], keys, augment.Coefficients(None, None)),
    )


def _jit(function: Callable, **options: Any) -> Callable:
    return jax.jit(function, compiler_options=compiler_options(jax.default_backend()), **options)


def _call(function: Callable, *given: Any) -> Piece:
    def piece() -> None:
        jax.block_until_ready(function(*given))

    return piece
