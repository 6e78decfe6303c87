"""LARS, RMSProp and SGD as the reference system and TensorFlow compute them, which is not as optax does.

`optax.lars` divides by |g + βw| where the paper and the reference divide by |g| + β|w|, adapts biases and
norms unless told otherwise, and takes norms in the gradient's own format, where fp16 overflows and the
trust ratio silently becomes 1. `optax.rmsprop` starts its mean square at zero and scales after momentum.
Each optimizer here is a few lines of fp32 arithmetic over weights of any format.

Weights, gradients and state are packed (see packing.py): [rows, ROW] each, where what differs from array to
array, such as trust ratios, is one number a row. The padding's gradients are zero, and so are its updates.

Counting: the n-th update of a run, counted from 1, uses `schedule(n)`. The first therefore already moves the
weights, and the last, n = T, uses the final rate.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficientnet.errors import ConfigError
from efficientnet.numerics.precision import FP32, Policy
from efficientnet.numerics.stochastic_rounding import round_updates, store_state_as
from efficientnet.parallel.packing import StagedPacking, row_sums


class Treatment(NamedTuple):
    """Whether LARS adapts a parameter's rate (and decays it), and whether RMSProp and SGD decay it."""

    adapted: bool
    decayed: bool


def treatment(name: str) -> Treatment:
    """Says how optimizers treat the parameter called `name`; only its own name, the last of a path, counts.

    | own name      | adapted | decayed | what it is                                     |
    | ------------- | ------- | ------- | ---------------------------------------------- |
    | bias, scale   | no      | no      | of norms (β, γ), convolutions and dense layers |
    | proxy_…       | no      | yes     | proxy norm's β', γ', decayed towards no change |
    | anything else | yes     | yes     | kernels                                        |

    The reference's RMSProp decays biases of convolutions and dense layers as well; at its 1e-5 that is
    nothing.
    """
    own_name = name.rpartition('/')[2]
    if own_name in ('bias', 'scale'):
        return Treatment(adapted=False, decayed=False)
    if own_name.startswith('proxy_'):
        return Treatment(adapted=False, decayed=True)
    return Treatment(adapted=True, decayed=True)


class MomentumState(NamedTuple):
    """Updates made so far, int32 [], and the momentum buffer, fp32 [rows, ROW]."""

    count: jax.Array
    momentum: jax.Array


class RmspropState(NamedTuple):
    """Updates made so far, int32 [], and running mean square and momentum buffer, fp32 [rows, ROW]."""

    count: jax.Array
    mean_square: jax.Array
    momentum: jax.Array


def lars(
    learning_rate: optax.ScalarOrSchedule,
    packing: StagedPacking,
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
        packing: Of the weights.
        momentum: μ, in [0, 1).
        weight_decay: β.
        trust_coefficient: η.
        eps: Added to the denominator of the trust ratio.
        nesterov: Look one momentum step ahead.

    Returns:
        A transformation from packed fp32 gradients, and weights of any format, to fp32 updates.

    Source: You et al., https://arxiv.org/abs/1708.03888; the rate's place as in the MLPerf reference.
    """
    adapts = packing.per_array(lambda name: treatment(name).adapted, bool)

    def norms(rows: jax.Array) -> jax.Array:
        """Euclidean norm of each array, fp32 [arrays]."""
        return jnp.sqrt(_array_sums(row_sums(jnp.square(rows)), packing))

    def init(params: jax.Array) -> MomentumState:
        return MomentumState(count=jnp.zeros((), jnp.int32), momentum=jnp.zeros(params.shape, FP32))

    def update(grads: jax.Array, state: MomentumState, params: jax.Array) -> tuple[jax.Array, MomentumState]:
        rate = _rate(learning_rate, state.count)
        adapted, owners = packing.own(adapts), packing.own(packing.owners)
        decay = _decay(weight_decay, adapts, packing)
        params = params.astype(FP32)
        w_norm, g_norm = norms(params), norms(grads)
        both = (w_norm > 0) & (g_norm > 0)
        denominator = jnp.where(both, g_norm + weight_decay * w_norm + eps, 1.0)
        trust = jnp.where(adapted & both, trust_coefficient * w_norm / denominator, 1.0)
        step = rate * trust[owners][:, None] * (grads + decay * params)
        buffer = momentum * state.momentum + step
        ahead = momentum * buffer + step if nesterov else buffer
        return -ahead, MomentumState(count=state.count + 1, momentum=buffer)

    return optax.GradientTransformation(init, update)


def rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    packing: StagedPacking,
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
        packing: Of the weights.
        decay: Of the mean square, in [0, 1).
        momentum: In [0, 1).
        eps: Added to the mean square, above 0.
        weight_decay: Added to the gradient, times the weight.

    Returns:
        A transformation from packed fp32 gradients, and weights of any format, to fp32 updates.

    Raises:
        ConfigError: eps is not above 0.

    Source: `tf.compat.v1.train.RMSPropOptimizer`.
    """

    if eps <= 0:  # where gradients are zero for long, as in the padding, it would become 0 / 0
        raise ConfigError(f'optimizer.epsilon={eps} must be above 0 for rmsprop')
    decayed = packing.per_array(lambda name: treatment(name).decayed, bool)

    def init(params: jax.Array) -> RmspropState:
        ones, zeros = jnp.ones(params.shape, FP32), jnp.zeros(params.shape, FP32)
        return RmspropState(count=jnp.zeros((), jnp.int32), mean_square=ones, momentum=zeros)

    def update(grads: jax.Array, state: RmspropState, params: jax.Array) -> tuple[jax.Array, RmspropState]:
        rate = _rate(learning_rate, state.count)
        grads = grads + _decay(weight_decay, decayed, packing) * params.astype(FP32)
        mean_square = decay * state.mean_square + (1 - decay) * jnp.square(grads)
        buffer = momentum * state.momentum + rate * grads / jnp.sqrt(mean_square + eps)
        return -buffer, RmspropState(state.count + 1, mean_square, buffer)

    return optax.GradientTransformation(init, update)


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    packing: StagedPacking,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum, the learning rate outside the buffer as is usual for it.

        m ← momentum · m + g', with g' = g + weight_decay · w where `treatment` decays the parameter, else g
        w ← w - rate · m, with Nesterov w - rate · (momentum · m + g')

    Args:
        learning_rate: A number, or a schedule of the update's number (int32 [], from 1).
        packing: Of the weights.
        momentum: In [0, 1).
        nesterov: Look one momentum step ahead.
        weight_decay: Added to the gradient, times the weight.

    Returns:
        A transformation from packed fp32 gradients, and weights of any format, to fp32 updates.

    Source: Sutskever et al., http://proceedings.mlr.press/v28/sutskever13.html, with the rate moved out.
    """
    decayed = packing.per_array(lambda name: treatment(name).decayed, bool)

    def init(params: jax.Array) -> MomentumState:
        return MomentumState(count=jnp.zeros((), jnp.int32), momentum=jnp.zeros(params.shape, FP32))

    def update(grads: jax.Array, state: MomentumState, params: jax.Array) -> tuple[jax.Array, MomentumState]:
        rate = _rate(learning_rate, state.count)
        grads = grads + _decay(weight_decay, decayed, packing) * params.astype(FP32)
        buffer = momentum * state.momentum + grads
        ahead = momentum * buffer + grads if nesterov else buffer
        return -rate * ahead, MomentumState(state.count + 1, momentum=buffer)

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
    packing: StagedPacking,
    **options: float,
) -> optax.GradientTransformation:
    """Builds an optimizer whose state and weights are stored as the policy says.

    Args:
        name: A key of `OPTIMIZERS`.
        learning_rate: A number, or a schedule of the update's number (int32 [], from 1).
        policy: Formats of weights and optimizer state.
        rounding: Of both where they are 16-bit, 'stochastic' or 'nearest'.
        key: Typed PRNG key of the rounding, the same on every replica and stage.
        packing: Of the weights.
        **options: Of that optimizer.

    Returns:
        A transformation to use with `stochastic_rounding.apply_updates`. An overflow of 16-bit weights or
        state shows as infinity in the updates or the new state: check both before keeping either.

    Raises:
        ConfigError: Unknown optimizer, option or rounding, or an option out of range.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f'optimizer.name={name!r} is unknown; choose one of {", ".join(OPTIMIZERS)}')
    _, _, *known = inspect.signature(OPTIMIZERS[name]).parameters
    for option in options:
        if option not in known:
            raise ConfigError(f'optimizer.{option} is no option of {name}, which has {", ".join(known)}')
    optimizer = OPTIMIZERS[name](learning_rate, packing, **options)
    return optax.chain(
        store_state_as(optimizer, packing, policy.state, rounding, key),
        round_updates(packing, policy.master, rounding, key),
    )


def _rate(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> optax.ScalarOrSchedule:
    """The rate of the update after `count` others."""
    return learning_rate(count + 1) if callable(learning_rate) else learning_rate


def _array_sums(values: jax.Array, packing: StagedPacking) -> jax.Array:
    """Sums one number per row over the rows of each array, [rows] -> [arrays].

    It gathers into [arrays, most rows of one] and sums that. `jax.ops.segment_sum` scatters, which XLA does in any
    order on a GPU, so that the weights of replicas would drift apart, and slowly (openxla/xla issue 46225).
    """
    counts = packing.own(packing.counts)
    starts = packing.own(packing.counts.cumsum(1, dtype=np.int32) - packing.counts)
    places = jnp.arange(packing.counts.max(initial=0), dtype=jnp.int32)[None]
    gathered = values.at[jnp.asarray(starts)[:, None] + places].get(mode='clip')
    return jnp.sum(jnp.where(places < counts[:, None], gathered, 0.0), axis=1)


def _decay(weight_decay: float, decayed: np.ndarray, packing: StagedPacking) -> jax.Array:
    """The weight decay of each of this device's rows, fp32 [rows, 1], from which arrays are decayed."""
    rows = packing.own(decayed)[packing.own(packing.owners)]
    return jnp.where(rows, jnp.float32(weight_decay), 0.0)[:, None]
