import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from efficientnet.errors import ConfigError
from efficientnet.model.normalization import (
    BatchNorm,
    BatchPool,
    GroupNorm,
    GroupPool,
    ProxyNormSwish,
    group_norm,
    norm_swish,
    proxy_moments,
)
from efficientnet.parallel.grid import compiler_options


def group_norm_by_loop(x, scale, bias, groups, layout, epsilon):
    """By definition in float64: collect a group's channels, normalise them together."""
    x, channels = np.float64(x), x.shape[3]
    y = np.empty_like(x)
    for n in range(len(x)):
        for g in range(groups):
            strided = [c for c in range(channels) if c % groups == g]
            members = strided if layout == 'strided' else range(g * channels // groups, (g + 1) * channels // groups)
            values = x[n][..., list(members)]
            y[n][..., list(members)] = (values - values.mean()) / np.sqrt(values.var() + epsilon)
    return y * scale + bias


@pytest.mark.parametrize('layout', ['strided', 'contiguous'])
@pytest.mark.parametrize('groups', [1, 4, 12])
def test_group_norm_is_its_definition(groups, layout):
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, size=(2, 3, 5, 12)).astype(np.float32) * np.arange(1, 13, dtype=np.float32)
    scale, bias = (rng.normal(size=12).astype(np.float32) for _ in range(2))
    got = group_norm(*map(jnp.array, (x, scale, bias)), groups, layout, 1e-3)
    want = group_norm_by_loop(x, scale, bias, groups, layout, 1e-3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_layouts_differ():
    x = jax.random.normal(jax.random.key(0), (1, 2, 2, 8)) + jnp.arange(8.0)[None, None, None]
    one = jnp.ones(8)
    strided, contiguous = (group_norm(x, one, None, 4, layout, 1e-3) for layout in ('strided', 'contiguous'))
    assert jnp.abs(strided - contiguous).max() > 0.5


def test_large_mean_does_not_cancel():
    # E[x²] − E[x]² in fp32 would lose all digits of a variance of 1 under a mean of 10⁴
    x = 1e4 + jax.random.normal(jax.random.key(0), (2, 8, 8, 8))
    y = group_norm(x, jnp.ones(8), None, 4, 'strided', 1e-3)
    want = group_norm_by_loop(np.array(x), 1.0, 0.0, 4, 'strided', 1e-3)
    np.testing.assert_allclose(y, want, atol=5e-3)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize('layer', [GroupNorm(), BatchNorm(), ProxyNormSwish()])
def test_16_bit_in_and_out_with_fp32_statistics(layer, dtype):
    # 64·64 values of 100 with squares of 10⁴: any 16-bit sum would overflow or stall
    x = (100 + jax.random.normal(jax.random.key(0), (2, 64, 64, 8))).astype(dtype)
    apply = functools.partial(layer.apply, mutable=['batch_stats'])
    options = {'train': True} if isinstance(layer, BatchNorm) else {}
    variables = layer.init(jax.random.key(0), x, **options)

    @jax.jit
    def run(variables, x):
        y, pull = jax.vjp(lambda x: jax.tree.leaves(apply(variables, x, **options)[0])[0], x)
        return y, pull(jnp.ones_like(y))[0]

    (y, dx), (wide, _) = run(variables, x), run(variables, x.astype(jnp.float32))
    assert y.dtype == dx.dtype == dtype
    assert jnp.isfinite(dx.astype(jnp.float32)).all()
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=float(jnp.finfo(dtype).eps), atol=1e-5)


def test_gradient_against_finite_differences():
    x = jax.random.normal(jax.random.key(1), (2, 3, 3, 8))
    check = functools.partial(jax.test_util.check_grads, order=1, modes=['rev'], rtol=2e-2, atol=2e-2)
    norm = jax.jit(lambda x, s, b: jnp.sin(group_norm(x, s, b, 4, 'strided', 1e-3)))
    check(norm, (x, 1.5 * jnp.ones(8), jnp.ones(8)))


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize('swish', [False, True])
@pytest.mark.parametrize(('groups', 'layout'), [(1, 'strided'), (4, 'strided'), (4, 'contiguous'), (12, 'strided')])
@pytest.mark.parametrize('shape', [(2, 3, 5, 12), (3, 1, 1, 12), (1, 9, 9, 24)])
def test_own_gradient_is_that_of_autodiff(shape, groups, layout, swish, backend, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    rng = np.random.default_rng(0)
    x, dy = rng.normal(3, 2, (2, *shape)).astype(np.float32)
    scale, bias = rng.normal(size=(2, shape[3])).astype(np.float32)

    def plain(x, scale, bias):
        y = group_norm(x, scale, bias, groups, layout, 1e-3)
        return nn.swish(y) if swish else y

    y, pull = jax.vjp(lambda *given: norm_swish(*given, GroupPool(groups, layout), 1e-3, swish)[0], x, scale, bias)
    want, want_pull = jax.vjp(plain, x, scale, bias)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    for got, expected in zip(pull(dy), want_pull(dy), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize('swish', [False, True])
@pytest.mark.parametrize('shape', [(4, 3, 5, 12), (4, 1, 1, 12)])
def test_own_gradient_of_batch_norm_is_that_of_autodiff_on_one_device_and_over_two(shape, swish):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(3, 2, (2, *shape)).astype(np.float32)
    scale, bias = rng.normal(size=(2, shape[3])).astype(np.float32)

    def plain(x, scale, bias):
        u = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-3)
        y = u * scale + bias
        return nn.swish(y) if swish else y

    with jax.numpy_rank_promotion('allow'):
        y, pull = jax.vjp(plain, x, scale, bias)
        want = (y, *pull(dy))

    def run(axis, x, dy):
        y, pull = jax.vjp(lambda *given: norm_swish(*given, BatchPool(axis), 1e-3, swish)[0], x, scale, bias)
        dx, dscale, dbias = pull(dy)
        total = functools.partial(jax.lax.psum, axis_name=axis) if axis else jnp.array
        return y, dx, total(dscale), total(dbias)

    halves = [given.reshape(2, 2, *shape[1:]) for given in (x, dy)]
    synced = jax.pmap(functools.partial(run, 'replica'), 'replica', devices=jax.devices()[:2])(*halves)
    synced = [*(leaf.reshape(shape) for leaf in synced[:2]), *(leaf[0] for leaf in synced[2:])]
    for got in (run(None, x, dy), synced):
        for mine, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=2e-4)


def test_between_forward_and_backward_nothing_is_kept_but_what_enters_and_leaves():
    layers, x = 8, jnp.ones((4, 16, 16, 32))

    def loss(kernels):
        y = x
        for kernel in kernels:
            y = norm_swish(y @ kernel, jnp.ones(32), jnp.ones(32), GroupPool(4, 'strided'), 1e-3, True)[0]
        return y.sum()

    gradient = jax.jit(jax.grad(loss), compiler_options=compiler_options('cpu'))
    planned = gradient.lower(jnp.ones((layers, 32, 32))).compile().memory_analysis().temp_size_in_bytes
    # Of every layer what the norm gets and what the next product gets, and a few at work; the sigmoid would be a third.
    assert planned < (2 * layers + 4) * x.nbytes


def test_gradient_under_a_large_mean():
    x = 1e3 + jax.random.normal(jax.random.key(0), (2, 8, 8, 8))
    dy, pool = jax.random.normal(jax.random.key(1), x.shape), GroupPool(4, 'strided')
    pulled = [
        jax.vjp(lambda x: norm_swish(x, jnp.ones(8), jnp.zeros(8), pool, 1e-3, True)[0], x - offset)[1](dy)[0]
        for offset in (0, 1e3)
    ]
    np.testing.assert_allclose(*pulled, atol=2e-3)


@pytest.mark.parametrize(('channels', 'groups'), [(6, 4), (8, 0), (8, 16)])
def test_groups_that_do_not_divide_name_the_layer(channels, groups):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return GroupNorm(groups, name='here')(x)

    with pytest.raises(ConfigError, match=f'norm_groups={groups} must divide the {channels} channels of here'):
        Net().init(jax.random.key(0), jnp.ones((1, 1, 1, channels)))


def test_unknown_layout():
    with pytest.raises(ConfigError, match="norm_layout='random'"):
        GroupNorm(layout='random').init(jax.random.key(0), jnp.ones((1, 1, 1, 4)))


def test_batch_norm_writes_raw_statistics_and_uses_the_stored_ones():
    layer = BatchNorm()
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 5, 5, 6))
    variables = layer.init(jax.random.key(1), x, train=True)
    np.testing.assert_array_equal(variables['batch_stats']['mean'], np.zeros(6))
    np.testing.assert_array_equal(variables['batch_stats']['var'], np.ones(6))

    wide = np.float64(x)
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    y, written = layer.apply(variables, x, train=True, mutable=['batch_stats'])
    np.testing.assert_allclose(written['batch_stats']['mean'], mean, rtol=1e-5)
    np.testing.assert_allclose(written['batch_stats']['var'], var, rtol=1e-5)
    np.testing.assert_allclose(y, (wide - mean) / np.sqrt(var + 1e-3), rtol=1e-4, atol=1e-5)

    # immutable statistics are left alone, and training does not depend on them
    np.testing.assert_array_equal(layer.apply(variables, x, train=True), y)
    evaluated = layer.apply(variables, x, train=False)
    np.testing.assert_allclose(evaluated, wide / np.sqrt(1 + 1e-3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_batch_norm_is_rounded_once_in_evaluation_too(dtype):
    x = (3 * jax.random.normal(jax.random.key(0), (4, 5, 5, 6))).astype(dtype)
    layer = BatchNorm(swish=True)
    variables = layer.init(jax.random.key(1), x, train=False)
    normed = np.float64(x) / np.sqrt(1 + 1e-3)
    exact = normed / (1 + np.exp(-normed))
    found = layer.apply(variables, x, train=False)
    assert found.dtype == dtype
    step = np.float64(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(np.abs(exact)))
    assert (np.abs(np.float64(found) - exact) <= 0.51 * step).all()


def test_proxy_moments_against_monte_carlo():
    rng = np.random.default_rng(0)
    scale, bias, proxy_scale, proxy_bias = rng.normal(size=(4, 7)) * [[1.0], [1.0], [0.3], [0.5]]
    y = scale * (proxy_bias + (1 + proxy_scale) * rng.normal(size=(400_000, 7))) + bias
    activated = y / (1 + np.exp(-y))
    mean, var = proxy_moments(*map(jnp.float32, (scale, bias, proxy_scale, proxy_bias)))
    np.testing.assert_allclose(mean, activated.mean(0), atol=1e-2)
    # equally likely midpoints cut the Gaussian's tails: a percent of the variance is missing
    np.testing.assert_allclose(var, activated.var(0), rtol=3e-2, atol=1e-2)


def test_proxy_norm_standardises_gaussian_input():
    x = jax.random.normal(jax.random.key(0), (8, 16, 16, 8))
    layer = ProxyNormSwish()
    variables = layer.init(jax.random.key(1), x)
    assert set(variables['params']) == {'scale', 'bias', 'proxy_scale', 'proxy_bias'}
    numerator, factor = layer.apply(variables, x)
    assert factor.shape == (8,)
    y = np.float64(numerator * factor[None, None, None])
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=0.1)
    variance = (y.var((0, 1, 2)) / (1 - 0.03 * np.float64(factor) ** 2)).mean()
    np.testing.assert_allclose(variance, 1, atol=0.05)


def test_proxy_norm_carries_gradients_through_its_statistics():
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    layer = ProxyNormSwish()
    params = jax.tree.map(lambda p: p + 0.1, layer.init(jax.random.key(1), x)['params'])

    def output(params):
        numerator, factor = layer.apply({'params': params}, x)
        return jnp.sin(numerator * factor[None, None, None])

    jax.test_util.check_grads(jax.jit(output), (params,), order=1, modes=['rev'], rtol=2e-2, atol=2e-2)
    grads = jax.grad(lambda p: output(p).sum())(params)
    assert all(jnp.abs(g).min() > 1e-4 for g in jax.tree.leaves(grads))
