import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficientnet.errors import ConfigError
from efficientnet.numerics.schedules import KINDS, warmup_schedule

PEAK = 8.4853


def reference(kind, n, T, W, end_ratio=1e-5, power=2.0, decay_rate=0.97, decay_steps=7):
    """The formulas in float64, one step at a time."""
    n = min(max(n, 0), T)
    if kind == 'exponential':
        return PEAK * decay_rate ** (n // decay_steps) * (n / W if n < W else 1.0)
    if n <= W and W > 0:
        return PEAK * n / W
    if kind == 'constant':
        return PEAK
    done, end = (n - W) / (T - W), end_ratio * PEAK
    if kind == 'polynomial':
        return (PEAK - end) * (1 - done) ** power + end
    return end + (PEAK - end) * 0.5 * (1 + np.cos(np.pi * done))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('T', 'W'), [(72_983, 14_596), (20, 5), (20, 0), (20, 1), (20, 20), (20, 19), (1, 1)])
def test_against_float64(kind, T, W):
    schedule = warmup_schedule(kind, peak=PEAK, total_steps=T, warmup_steps=W, decay_steps=7)
    around = np.concatenate([np.arange(-2, 4), np.arange(W - 3, W + 4), np.arange(T - 3, T + 4), [2 * T]])
    rates = jax.jit(schedule)(jnp.asarray(around, jnp.int32))
    expected = [reference(kind, n, T, W) for n in around.tolist()]
    assert rates.dtype == jnp.float32
    # The exponential takes fp32(0.97) to a power of up to 10,426, and underflows with it.
    np.testing.assert_allclose(rates, expected, rtol=1e-3 if T > 1000 and kind == 'exponential' else 2e-6, atol=1e-30)


@pytest.mark.parametrize('kind', ['polynomial', 'cosine'])
def test_ends_are_exact(kind):
    schedule = warmup_schedule(kind, peak=PEAK, total_steps=72_983, warmup_steps=14_596)
    assert schedule(0) == 0
    assert schedule(14_596) == np.float32(PEAK)
    assert schedule(14_595) < schedule(14_596) >= schedule(14_597) > schedule(15_596)
    assert schedule(72_983) == np.float32(PEAK) * np.float32(1e-5) == schedule(10**6)
    assert schedule(72_982) > schedule(72_983)


def test_no_warmup_starts_at_the_peak_and_only_warmup_ends_there():
    assert warmup_schedule('polynomial', peak=PEAK, total_steps=9)(0) == np.float32(PEAK)
    assert warmup_schedule('cosine', peak=PEAK, total_steps=9, warmup_steps=9)(9) == np.float32(PEAK)


def test_exponential_is_the_references_staircase():
    """146 drops of 3 % over 350 epochs of 500 updates each 1198 or so, 5 of them warm-up."""
    schedule = warmup_schedule('exponential', peak=1.0, total_steps=175_000, warmup_steps=2500, decay_steps=1198)
    np.testing.assert_allclose(schedule(1198), 0.97 * 1198 / 2500, rtol=1e-6)
    np.testing.assert_allclose(schedule(2500), 0.97**2, rtol=1e-6)
    assert schedule(3 * 1198 - 1) > schedule(3 * 1198) == schedule(4 * 1198 - 1)
    np.testing.assert_allclose(schedule(175_000), 0.97**146, rtol=1e-5)


def test_agrees_with_optax():
    ours = warmup_schedule('cosine', peak=0.5, total_steps=50, warmup_steps=10, end_ratio=0.1)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.5, 10, 50, 0.05)
    steps = jnp.arange(51, dtype=jnp.int32)
    np.testing.assert_allclose(ours(steps), theirs(steps.astype(jnp.float32)), rtol=1e-5)


def test_power_one_is_a_straight_line():
    schedule = warmup_schedule('polynomial', peak=1.0, total_steps=8, power=1.0, end_ratio=0.0)
    np.testing.assert_array_equal(schedule(jnp.arange(9)), np.arange(8, -1, -1) / 8)


@pytest.mark.parametrize(
    ('kind', 'settings', 'match'),
    [
        ('linear', {}, "schedule.kind='linear'.*polynomial"),
        ('cosine', {'warmup_steps': 11}, 'schedule.warmup=11'),
        ('cosine', {'warmup_steps': -1}, 'schedule.warmup=-1'),
        ('exponential', {}, 'schedule.decay_every=0'),
    ],
)
def test_mistakes(kind, settings, match):
    with pytest.raises(ConfigError, match=match):
        warmup_schedule(kind, peak=1.0, total_steps=10, **settings)
