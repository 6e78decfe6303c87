"""Loss scaling: lifts small gradients above the smallest fp16 number and takes the lift away again in fp32.

Every scale is a power of two, so that multiplying and dividing by it never rounds. The state is a small
pytree that lives with the training state: plain data, adjusted inside the compiled update, saved in
checkpoints.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efficientnet.errors import ConfigError
from efficientnet.parallel.packing import ROW, row_sums

KINDS = ('static', 'dynamic')


class LossScaleState(NamedTuple):
    """The scale, fp32 [], and the finite updates in a row since it last changed, int32 []."""

    scale: jax.Array
    good_steps: jax.Array


@dataclasses.dataclass(frozen=True)
class LossScale:
    """How the loss scale behaves.

    Attributes:
        kind: 'static' keeps `initial` for ever; 'dynamic' looks for the largest scale without overflow.
        initial: First scale; 128 is the reference's.
        growth_interval: Finite updates in a row before the scale grows.
        factor: By which it grows, and shrinks after an update that was not finite.
        min: Smallest scale.
        max: Largest scale.
    """

    kind: str = 'static'
    initial: float = 128.0
    growth_interval: int = 2000
    factor: float = 2.0
    min: float = 1.0
    max: float = 2.0**24

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f'precision.loss_scale={self.kind!r} is unknown; choose one of {", ".join(KINDS)}')
        for field in ('initial', 'factor', 'min', 'max'):
            value = getattr(self, field)
            if not 0 < value < math.inf or math.frexp(value)[0] != 0.5:
                name = 'precision.initial_loss_scale' if field == 'initial' else f'{field} of the loss scale'
                raise ConfigError(f'{name}={value} must be a power of two, such as 128')
        if not self.min <= self.initial <= self.max:
            raise ConfigError(f'precision.initial_loss_scale={self.initial} must lie in {self.min} … {self.max}')
        if self.factor <= 1 or self.growth_interval < 1:
            raise ConfigError(
                f'factor={self.factor} and growth_interval={self.growth_interval} of the loss scale '
                'must be at least 2 and 1'
            )

    def init(self) -> LossScaleState:
        """Returns the state at the start of a run."""
        return LossScaleState(scale=jnp.asarray(self.initial, jnp.float32), good_steps=jnp.zeros((), jnp.int32))

    def adjust(self, state: LossScaleState, finite: jax.Array) -> LossScaleState:
        """Returns the state after an update; the one piece of state that a skipped update does change.

        Args:
            state: Before the update.
            finite: bool [], whether the update was finite everywhere: on all stages and replicas.
        """
        if self.kind == 'static':
            return state
        good_steps = jnp.where(finite, state.good_steps + 1, 0)
        grow = good_steps >= self.growth_interval
        grown = jnp.where(grow, jnp.minimum(state.scale * self.factor, self.max), state.scale)
        shrunk = jnp.maximum(state.scale / self.factor, self.min)
        return LossScaleState(scale=jnp.where(finite, grown, shrunk), good_steps=jnp.where(grow, 0, good_steps))


def all_finite(tree: Any) -> jax.Array:
    """Returns whether every floating-point number in a tree is finite, bool []; of none, True.

    0 · x is 0 if x is finite and NaN otherwise, so that one sum tells: a third of the time, on a CPU, of asking every
    number for itself. Of packed arrays it is the sum of the sums of their rows, half the time again.
    """

    def times_zero(x: jax.Array) -> jax.Array:
        zeros = 0.0 * x.astype(jnp.float32)
        return jnp.sum(row_sums(zeros) if zeros.shape[1:] == (ROW,) else zeros)

    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum((times_zero(x) for x in leaves), jnp.zeros(())) == 0
