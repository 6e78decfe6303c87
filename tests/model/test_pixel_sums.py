import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientnet.model.pixel_sums import pixel_sum, pixel_sums

SIDES = [(1, 1), (1, 2), (4, 4), (7, 7), (5, 13), (6, 8), (1, 23), (32, 32)]


@pytest.mark.parametrize('sides', SIDES)
@pytest.mark.parametrize('dtype', [np.float16, np.float32])
def test_sums_are_those_of_float64(sides, dtype):
    x = (5 + np.random.default_rng(0).normal(size=(2, *sides, 3))).astype(dtype)
    found = jax.jit(pixel_sum)(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, x.astype(np.float64).sum((1, 2)), rtol=3e-7)


def test_more_exact_than_one_number_after_the_other():
    x = np.random.default_rng(0).uniform(size=(1, 256, 256, 1)).astype(np.float32)
    exact = x.astype(np.float64).sum()
    in_a_row = np.cumsum(x.ravel(), dtype=np.float32)[-1]
    assert abs(float(pixel_sum(x)[0, 0]) - exact) < abs(float(in_a_row) - exact) / 10


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.float32])
def test_every_pixel_has_the_gradient_of_its_sum(dtype):
    x = jnp.ones((2, 3, 5, 4), dtype)
    dsum = jnp.arange(8.0).reshape(2, 4)
    (dx,) = jax.vjp(pixel_sum, x)[1](dsum)
    assert dx.dtype == dtype
    np.testing.assert_array_equal(dx, np.broadcast_to(np.asarray(dsum, dtype)[:, None, None], x.shape))


def test_an_accelerator_has_its_own_reduction(monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    text = jax.jit(lambda x: pixel_sum(x)).lower(jnp.ones((2, 4, 4, 3), jnp.bfloat16)).as_text()
    assert text.count('stablehlo.reduce(') == 1
    assert 'stablehlo.add %' not in text


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_two_sums_are_those_of_each(backend, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    x, y = np.random.default_rng(0).normal(size=(2, 2, 6, 8, 3)).astype(np.float32)
    for found, values in zip(jax.jit(lambda *given: pixel_sums(*given))(x, y), (x, y), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, values.astype(np.float64).sum((1, 2)), rtol=1e-5, atol=1e-5)


def test_a_gpu_has_one_reduction_for_two_sums(monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    x = jnp.ones((2, 4, 4, 3))
    assert jax.jit(lambda *given: pixel_sums(*given)).lower(x, x).as_text().count('stablehlo.reduce(') == 1
