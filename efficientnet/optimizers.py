"""LARS, RMSProp and SGD as the reference system and TensorFlow compute them, which is not as optax does.

`optax.lars` divides by |g + βw| where the paper and the reference divide by |g| + β|w|, adapts biases and
norms unless told otherwise, and takes norms in the gradient's own format, where fp16 overflows and the
trust ratio silently becomes 1. `optax.rmsprop` starts its mean square at zero and scales after momentum.
Each optimizer here is a few lines of fp32 arithmetic over weights of any format.

Counting: the n-th update of a run, counted from 1, uses `schedule(n)`. The first therefore already moves the
weights, and the last, n = T, uses the final rate.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efficientnet.errors import ConfigError
from efficientnet.precision import FP32, Policy
from efficientnet.stochastic_rounding import path_name, round_updates, store_state_as


class Treatment(NamedTuple):
    """Whether LARS adapts a parameter's rate (and decays it), and whether RMSProp and SGD decay it."""

    adapted: bool
    decayed: bool


def treatment(name: str) -> Treatment:
    """Says how optimizers treat the parameter whose own name (the last of its path) is `name`.

    | name          | adapted | decayed | what it is                                     |
    | ------------- | ------- | ------- | ---------------------------------------------- |
    | bias, scale   | no      | no      | of norms (β, γ), convolutions and dense layers |
    | proxy_…       | no      | yes     | proxy norm's β', γ', decayed towards no change |
    | anything else | yes     | yes     | kernels                                        |

    The reference's RMSProp decays biases of convolutions and dense layers as well; at its 1e-5 that is
    nothing.
    """
    if name in ('bias', 'scale'):
        return Treatment(adapted=False, decayed=False)
    if name.startswith('proxy_'):
        return Treatment(adapted=False, decayed=True)
    return Treatment(adapted=True, decayed=True)


class MomentumState(NamedTuple):
    """Updates made so far, int32 [], and the momentum buffer, shaped as the weights."""

    count: jax.Array
    momentum: optax.Updates


class RmspropState(NamedTuple):
    """Updates made so far, int32 [], and running mean square and momentum buffer, shaped as the weights."""

    count: jax.Array
    mean_square: optax.Updates
    momentum: optax.Updates


def lars(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Layer-wise adaptive rate scaling, with the learning rate inside the momentum buffer.

    For a parameter w with gradient g, rate γ, trust coefficient η, weight decay β and momentum μ:

        trust = η|w| / (|g| + β|w| + eps) if |w| > 0 and |g| > 0, else 1
        step = γ · trust · (g + βw)
        m ← μm + step
        w ← w - m, with Nesterov w - (μm + step)

    Parameters that `treatment` does not adapt take step = γg. Norms are over one array, in fp32.

    Args:
        learning_rate: A number, or a schedule of the update's number (int32 [], from 1).
        momentum: μ, in [0, 1).
        weight_decay: β.
        trust_coefficient: η.
        eps: Added to the denominator of the trust ratio.
        nesterov: Look one momentum step ahead.

    Returns:
        A transformation from fp32 gradients, and weights of any format, to fp32 updates.

    Source: You et al., https://arxiv.org/abs/1708.03888; the rate's place as in the MLPerf reference.
    """

    def init(params: optax.Params) -> MomentumState:
        return MomentumState(count=jnp.zeros((), jnp.int32), momentum=_full_like(params, 0.0))

    def update(grads: optax.Updates, state: MomentumState, params: optax.Params) -> tuple[optax.Updates, MomentumState]:
        rate = _rate(learning_rate, state.count)

        def scaled_step(path: tuple[Any, ...], g: jax.Array, w: jax.Array) -> jax.Array:
            if not treatment(path_name(path[-1:])).adapted:
                return rate * g
            w = w.astype(FP32)
            w_norm, g_norm = jnp.sqrt(jnp.sum(jnp.square(w))), jnp.sqrt(jnp.sum(jnp.square(g)))
            both = (w_norm > 0) & (g_norm > 0)
            denominator = jnp.where(both, g_norm + weight_decay * w_norm + eps, 1.0)
            trust = jnp.where(both, trust_coefficient * w_norm / denominator, 1.0)
            return rate * trust * (g + weight_decay * w)

        steps = jax.tree_util.tree_map_with_path(scaled_step, grads, params)
        buffer = jax.tree.map(lambda m, step: momentum * m + step, state.momentum, steps)
        ahead = jax.tree.map(lambda m, step: momentum * m + step, buffer, steps) if nesterov else buffer
        return jax.tree.map(jnp.negative, ahead), MomentumState(count=state.count + 1, momentum=buffer)

    return optax.GradientTransformation(init, update)


def rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: float = 0.9,
    momentum: float = 0.9,
    eps: float = 1e-3,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """RMSProp as TensorFlow 1 has it, which the EfficientNet papers trained with.

    With g' = g + weight_decay · w where `treatment` decays the parameter, else g:

        s ← decay · s + (1 - decay) · g'²
        m ← momentum · m + rate · g' / sqrt(s + eps)
        w ← w - m

    The mean square s starts at one, not at zero, so that early steps are small; eps is inside the square
    root and the rate inside the momentum buffer.

    Args:
        learning_rate: A number, or a schedule of the update's number (int32 [], from 1).
        decay: Of the mean square, in [0, 1).
        momentum: In [0, 1).
        eps: Added to the mean square.
        weight_decay: Added to the gradient, times the weight.

    Returns:
        A transformation from fp32 gradients, and weights of any format, to fp32 updates.

    Source: `tf.compat.v1.train.RMSPropOptimizer`.
    """

    def init(params: optax.Params) -> RmspropState:
        zeros, ones = _full_like(params, 0.0), _full_like(params, 1.0)
        return RmspropState(count=jnp.zeros((), jnp.int32), mean_square=ones, momentum=zeros)

    def update(grads: optax.Updates, state: RmspropState, params: optax.Params) -> tuple[optax.Updates, RmspropState]:
        rate = _rate(learning_rate, state.count)
        grads = _with_decay(grads, params, weight_decay)
        mean_square = jax.tree.map(lambda s, g: decay * s + (1 - decay) * jnp.square(g), state.mean_square, grads)
        buffer = jax.tree.map(
            lambda m, g, s: momentum * m + rate * g / jnp.sqrt(s + eps), state.momentum, grads, mean_square
        )
        return jax.tree.map(jnp.negative, buffer), RmspropState(state.count + 1, mean_square, buffer)

    return optax.GradientTransformation(init, update)


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum, the learning rate outside the buffer as is usual for it.

        m ← momentum · m + g', with g' = g + weight_decay · w where `treatment` decays the parameter, else g
        w ← w - rate · m, with Nesterov w - rate · (momentum · m + g')

    Args:
        learning_rate: A number, or a schedule of the update's number (int32 [], from 1).
        momentum: In [0, 1).
        nesterov: Look one momentum step ahead.
        weight_decay: Added to the gradient, times the weight.

    Returns:
        A transformation from fp32 gradients, and weights of any format, to fp32 updates.

    Source: Sutskever et al., http://proceedings.mlr.press/v28/sutskever13.html, with the rate moved out.
    """

    def init(params: optax.Params) -> MomentumState:
        return MomentumState(count=jnp.zeros((), jnp.int32), momentum=_full_like(params, 0.0))

    def update(grads: optax.Updates, state: MomentumState, params: optax.Params) -> tuple[optax.Updates, MomentumState]:
        rate = _rate(learning_rate, state.count)
        grads = _with_decay(grads, params, weight_decay)
        buffer = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, grads)
        ahead = jax.tree.map(lambda m, g: momentum * m + g, buffer, grads) if nesterov else buffer
        return jax.tree.map(lambda m: -rate * m, ahead), MomentumState(state.count + 1, momentum=buffer)

    return optax.GradientTransformation(init, update)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    'lars': lars,
    'rmsprop': rmsprop,
    'sgd': sgd,
}


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    policy: Policy,
    rounding: str,
    key: jax.Array,
    **options: float,
) -> optax.GradientTransformation:
    """Builds an optimizer whose state and weights are stored as the policy says.

    Args:
        name: A key of `OPTIMIZERS`.
        learning_rate: A number, or a schedule of the update's number (int32 [], from 1).
        policy: Formats of weights and optimizer state.
        rounding: Of both where they are 16-bit, 'stochastic' or 'nearest'.
        key: Typed PRNG key of the rounding, the same on every replica and stage.
        **options: Of that optimizer.

    Returns:
        A transformation to use with `stochastic_rounding.apply_updates`. An overflow of 16-bit weights or
        state shows as infinity in the updates or the new state: check both before keeping either.

    Raises:
        ConfigError: Unknown optimizer, option or rounding.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f'optimizer.name={name!r} is unknown; choose one of {", ".join(OPTIMIZERS)}')
    known = [option for option in inspect.signature(OPTIMIZERS[name]).parameters if option != 'learning_rate']
    for option in options:
        if option not in known:
            raise ConfigError(f'optimizer.{option} is no option of {name}, which has {", ".join(known)}')
    optimizer = OPTIMIZERS[name](learning_rate, **options)
    return optax.chain(
        store_state_as(optimizer, policy.state, rounding, key), round_updates(policy.master, rounding, key)
    )


def _rate(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> optax.ScalarOrSchedule:
    """The rate of the update after `count` others."""
    return learning_rate(count + 1) if callable(learning_rate) else learning_rate


def _full_like(params: optax.Params, value: float) -> optax.Updates:
    return jax.tree.map(lambda w: jnp.full(w.shape, value, FP32), params)


def _with_decay(grads: optax.Updates, params: optax.Params, weight_decay: float) -> optax.Updates:
    """Adds weight_decay · w to the gradients of the parameters that `treatment` decays."""

    def decayed(path: tuple[Any, ...], g: jax.Array, w: jax.Array) -> jax.Array:
        return g + weight_decay * w.astype(FP32) if treatment(path_name(path[-1:])).decayed else g

    return jax.tree_util.tree_map_with_path(decayed, grads, params)
