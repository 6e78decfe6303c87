"""Cross entropy with the reference's label smoothing, and hits among the k best classes. All in fp32."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross entropy of every example against its smoothed label.

    The reference gives the label 1 − ε and every other class ε / (classes − 1); the more common form gives
    1 − ε + ε / classes and ε / classes.

    Args:
        logits: [N, classes] fp32.
        labels: [N] int32.
        smoothing: ε in [0, 1).

    Returns:
        [N] fp32, in nats.
    """
    classes = logits.shape[-1]
    log_p = jax.nn.log_softmax(logits)
    hit = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    off = smoothing / max(classes - 1, 1)
    return -((1.0 - smoothing - off) * hit + off * log_p.sum(-1))


def hits(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Tells which examples have their label among the k largest logits; of equal logits the first counts more.

    Args:
        logits: [N, classes].
        labels: [N] int32.
        k: How many classes count.

    Returns:
        [N] bool. NaN logits are never a hit.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    index = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None]
    # "not less or equal" instead of "greater": a NaN then counts as ahead of the label, never behind it.
    ahead = ~(logits <= own) | ((logits == own) & (index < labels[:, None]))
    return ahead.sum(-1) < k
