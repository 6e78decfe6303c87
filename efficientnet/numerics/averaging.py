"""Averages of the weights over a run, which generalise better than the last weights at a constant cost.

Two of them: the exponential average over updates of the EfficientNet papers, and the reference system's
average over the ends of epochs. Both are fp32 whatever the weights are, and linear in them: in sixteen bits
an average would not move at all.
"""

import jax
import jax.numpy as jnp
import optax

from efficientnet.numerics.precision import FP32


def ema_update(average: optax.Params, params: optax.Params, decay: float, count: jax.Array) -> optax.Params:
    """Exponential average over updates, whose first updates forget faster.

        d = min(decay, (1 + n) / (10 + n));  average ← d · average + (1 - d) · params

    Args:
        average: fp32 tree; before the first call, the initial weights in fp32.
        params: Tree of the same shapes, of any floating-point format.
        decay: In [0, 1), such as 0.9999.
        count: n, updates made before, int32 [].

    Returns:
        The new average, fp32.

    Source: `tf.train.ExponentialMovingAverage` with num_updates.
    """
    n = jnp.asarray(count, FP32)
    return _mix(average, params, jnp.minimum(decay, (1 + n) / (10 + n)))


def epoch_average(
    average: optax.Params, params: optax.Params, decay: float, first: jax.typing.ArrayLike
) -> optax.Params:
    """The reference's average over the weights at the ends of epochs, to be called there.

        average ← params at the first epoch's end, then decay · average + (1 - decay) · params

    Args:
        average: fp32 tree; its numbers don't matter at the first call.
        params: Tree of the same shapes, of any floating-point format.
        decay: In [0, 1), 0.97 in the reference.
        first: bool [], whether this is the first epoch's end.

    Returns:
        The new average, fp32.
    """
    # Chosen, not mixed with weight 0: what the average was before may be large or not finite.
    mixed = _mix(average, params, decay)
    return jax.tree.map(lambda a, w: jnp.where(first, w.astype(FP32), a), mixed, params)


def _mix(average: optax.Params, params: optax.Params, keep: jax.typing.ArrayLike) -> optax.Params:
    return jax.tree.map(lambda a, w: a + (1 - keep) * (w.astype(FP32) - a), average, params)
