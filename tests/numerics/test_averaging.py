import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from efficientnet.numerics.averaging import ema_update, epoch_average

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('decay', [0.0, 0.5, 0.9999])
def test_ema_against_tensorflow(decay):
    weights = RNG.normal(size=(40, 3)).astype(np.float32)
    variable = tf.Variable(weights[0])
    count = tf.Variable(0)
    theirs = tf.train.ExponentialMovingAverage(decay, num_updates=count)
    theirs.apply([variable])  # the first call only creates the average, equal to the weights
    ours = {'w': jnp.asarray(weights[0])}
    update = jax.jit(ema_update, static_argnums=2)
    for n, w in enumerate(weights):
        variable.assign(w)
        count.assign(n)
        theirs.apply([variable])
        ours = update(ours, {'w': jnp.asarray(w)}, decay, jnp.int32(n))
        np.testing.assert_allclose(ours['w'], theirs.average(variable).numpy(), rtol=1e-5, atol=1e-6)


def test_epoch_average_against_float64():
    weights = RNG.normal(size=(350, 5)).astype(np.float16)
    expected = weights[0].astype(np.float64)
    average = {'w': jnp.full((5,), 1e4)}  # whatever was there before the first epoch's end must not matter

    def body(carry, w):
        average, first = carry
        return (epoch_average(average, {'w': w}, 0.97, first), jnp.asarray(False)), None

    (average, _), _ = jax.lax.scan(body, (average, jnp.asarray(True)), jnp.asarray(weights))
    for w in weights[1:]:
        expected = 0.97 * expected + 0.03 * w.astype(np.float64)
    assert average['w'].dtype == jnp.float32
    np.testing.assert_allclose(average['w'], expected, rtol=1e-5, atol=1e-6)


def test_first_epoch_takes_the_weights_exactly():
    """Even after a non-finite average, and to the last bit."""
    weights = {'w': jnp.asarray([0.1, -3e-5, 6e4], jnp.float16)}
    for before in (0.0, 1e30, jnp.nan):
        average = epoch_average({'w': jnp.full((3,), before)}, weights, 0.97, True)
        np.testing.assert_array_equal(average['w'], np.asarray(weights['w'], np.float32))


def test_average_of_sixteen_bit_weights_moves():
    average = {'w': jnp.ones((2,))}
    weights = {'w': jnp.full((2,), 1.0 + 2.0**-10, jnp.float16)}
    for n in range(100):
        average = ema_update(average, weights, 0.999, jnp.int32(10_000 + n))
    np.testing.assert_allclose(average['w'] - 1, 2.0**-10 * (1 - 0.999**100), rtol=1e-2)
