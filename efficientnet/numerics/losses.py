"""Cross entropy with label smoothing, of one label, of several with weights or of any of a set; hits among the k best.

All in fp32.
"""

import jax
import jax.numpy as jnp

from efficientnet.errors import ConfigError

SMOOTHED_OVER = ('others', 'all')


def cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: float = 0.0, over: str = 'others', weights: jax.Array | None = None
) -> jax.Array:
    """Cross entropy of every example against its smoothed label or weighted labels.

    Over the 'others', as the reference has it, the label gets 1 − ε and every other class ε / (classes − 1). Over
    'all', the more common form, every class gets ε / classes and the label 1 − ε on top (Szegedy et al., arXiv
    1512.00567, equation 7). Several labels are smoothed one by one and then weighted.

    Args:
        logits: [N, classes] fp32.
        labels: [N] int32, or [N, K] with `weights`.
        smoothing: ε in [0, 1).
        over: 'others' or 'all'.
        weights: [N, K] fp32 whose rows sum to 1.

    Returns:
        [N] fp32, in nats.

    Raises:
        ConfigError: An unknown `over`.
    """
    if over not in SMOOTHED_OVER:
        raise ConfigError(f'augment.smoothing_over={over!r} must be one of {", ".join(SMOOTHED_OVER)}')
    classes = logits.shape[-1]
    log_p = jax.nn.log_softmax(logits)
    if weights is None:
        hit = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    else:
        hit = (weights * jnp.take_along_axis(log_p, labels, axis=-1)).sum(-1)
    if over == 'all':
        smoothing *= (classes - 1) / classes  # the rest of ε goes to the label itself
    off = smoothing / max(classes - 1, 1)
    return -((1.0 - smoothing - off) * hit + off * log_p.sum(-1))


def set_loss(logits: jax.Array, sets: jax.Array) -> jax.Array:
    """−log of the probability that a class drawn by the model is in the example's set.

    Of a set of one class that is the cross entropy; of an empty set it is infinite.

    Args:
        logits: [N, classes] fp32.
        sets: [N, classes], not 0 for the classes of the set.

    Returns:
        [N] fp32, in nats.
    """
    inside = jnp.where(sets > 0, logits, -jnp.inf)
    return jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(inside, axis=-1)


def best_of_set(logits: jax.Array, sets: jax.Array) -> jax.Array:
    """The class of each set with the largest logit: a set is among the k best classes exactly when this one is.

    Args:
        logits: [N, classes], none of them -inf.
        sets: [N, classes], not 0 for the classes of the set.

    Returns:
        [N] int32, the first of equal ones; of no meaning for an empty set.
    """
    return jnp.where(sets > 0, logits, -jnp.inf).argmax(-1).astype(jnp.int32)


def hits(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Tells which examples have their label among the k largest logits; of equal logits the first counts more.

    Args:
        logits: [N, classes].
        labels: [N] int32.
        k: How many classes count.

    Returns:
        [N] bool. Where a logit is NaN, nothing is a hit.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    index = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None]
    ahead = (logits > own) | ((logits == own) & (index < labels[:, None]))
    return (ahead.sum(-1) < k) & ~jnp.isnan(logits).any(-1)
