"""Learning rates over a run: a linear warm-up, then one of four shapes.

A schedule is a function of the number n of an update, counted from 1 (the optimizers do the counting): the
run's last update, n = T, uses the final rate. At n = 0, which no update sees, the rate of a warm-up is 0,
as in the reference's and MLPerf's rate = peak · n / W. Differences of steps are taken as integers, so that
the end of a run of any length is exact in fp32.
"""

import math

import jax
import jax.numpy as jnp
import optax

from efficientnet.errors import ConfigError

KINDS = ('polynomial', 'exponential', 'cosine', 'constant')


def warmup_schedule(
    kind: str,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    end_ratio: float = 1e-5,
    power: float = 2.0,
    decay_rate: float = 0.97,
    decay_steps: int = 0,
) -> optax.Schedule:
    """Returns the schedule rate(n) = peak · min(n / W, 1) · shape(n), with n first limited to 0 … T.

    With r = (T - max(n, W)) / (T - W) falling from 1 at the end of the warm-up to 0 at the end of the run:

    | kind        | shape                                                                       |
    | ----------- | --------------------------------------------------------------------------- |
    | polynomial  | r^power + end_ratio · (1 - r^power)                                         |
    | cosine      | c + end_ratio · (1 - c), c = (1 - cos(πr)) / 2                              |
    | exponential | decay_rate^floor(n / decay_steps): a staircase that, as in the reference and |
    |             | the EfficientNet papers, starts at n = 0, underneath the warm-up            |
    | constant    | 1                                                                           |

    Args:
        kind: One of `KINDS`.
        peak: Rate at the end of the warm-up (before any drop of 'exponential').
        total_steps: T, updates in the run.
        warmup_steps: W, updates over which the rate rises linearly; 0 starts at the peak, T only ever rises.
        end_ratio: Last rate over peak, of 'polynomial' and 'cosine'.
        power: Of 'polynomial'.
        decay_rate: Factor of one drop, of 'exponential'.
        decay_steps: Updates between two drops, of 'exponential'.

    Returns:
        A function of an int32 scalar (or array), whose result is fp32 of the same shape.

    Raises:
        ConfigError: Unknown kind, warm-up outside 0 … T, or 'exponential' without decay_steps.
    """
    if kind not in KINDS:
        raise ConfigError(f'schedule.kind={kind!r} is unknown; choose one of {", ".join(KINDS)}')
    if not 0 <= warmup_steps <= total_steps:
        raise ConfigError(f"schedule.warmup={warmup_steps} steps must lie within the run's {total_steps}")
    if kind == 'exponential' and decay_steps < 1:
        raise ConfigError(f"schedule.decay_every={decay_steps} steps must be at least 1 for 'exponential'")

    def shape(n: jax.Array) -> jax.Array:
        if kind == 'constant':
            return jnp.ones(n.shape, jnp.float32)
        if kind == 'exponential':
            return decay_rate ** (n // decay_steps).astype(jnp.float32)
        left = (total_steps - jnp.maximum(n, warmup_steps)).astype(jnp.float32)
        r = left / (total_steps - warmup_steps) if total_steps > warmup_steps else jnp.ones_like(left)
        # sin² is (1 - cos) / 2 without the cancellation that would blur the last rates.
        falling = r**power if kind == 'polynomial' else jnp.square(jnp.sin(r * (math.pi / 2)))
        return falling + end_ratio * (1 - falling)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        n = jnp.clip(jnp.asarray(count, jnp.int32), 0, total_steps)
        ramp = jnp.minimum(n, warmup_steps).astype(jnp.float32) / warmup_steps if warmup_steps else 1.0
        return peak * (ramp * shape(n))

    return schedule
