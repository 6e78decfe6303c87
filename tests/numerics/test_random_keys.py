import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientnet.numerics.random_keys import purpose_key, random_words, sample_keys


def test_purposes_seeds_steps_and_samples_differ():
    data = {
        tuple(np.asarray(jax.random.key_data(key)).tolist())
        for seed in range(2)
        for purpose in ('weights', 'samples', 'rounding')
        for step in range(2)
        for key in sample_keys(purpose_key(seed, purpose), jnp.int32(step), jnp.arange(4))
    }
    assert len(data) == 2 * 3 * 2 * 4


def test_a_sample_keeps_its_key_whoever_computes_it():
    key = purpose_key(0, 'samples')
    whole = jax.random.key_data(sample_keys(key, jnp.int32(5), jnp.arange(8)))
    part = jax.random.key_data(sample_keys(key, jnp.int32(5), jnp.arange(4, 8)))
    np.testing.assert_array_equal(whole[4:], part)


@pytest.mark.parametrize('seed', [0, 7, 2**31, 2**32 - 1])
def test_a_seed_may_be_known_at_run_time_only(seed):
    key = jax.random.key_data(purpose_key(seed, 'rounding'))
    found = jax.jit(lambda number: jax.random.key_data(purpose_key(number, 'rounding')))(np.uint32(seed))
    np.testing.assert_array_equal(found, key)


@pytest.mark.parametrize('count', [1, 2, 7, 256])
def test_words_are_those_of_jax(count):
    keys = jax.random.split(purpose_key(3, 'rounding'), 5)
    expected = jax.vmap(lambda key: jax.random.bits(key, (count,), jnp.uint32))(keys)
    np.testing.assert_array_equal(random_words(keys, count), expected)
