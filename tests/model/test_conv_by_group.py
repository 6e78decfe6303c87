import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from efficientnet.model.conv_by_group import FEW_SAMPLES, GROUPS_A_TURN
from efficientnet.model.convolution import grouped_conv
from tests.model.conv_reference import reference


@pytest.mark.parametrize('method', ['split', 'loop'])
@pytest.mark.parametrize('stride', [1, 2])
def test_loops_have_only_convolutions_in_the_fast_order(stride, method):
    """XLA on CPU brings other orders of dimensions into the fast one outside of loops only."""
    conv = functools.partial(grouped_conv, groups=2, method=method, stride=stride)

    def loss(kernel, x):
        return lax.scan(lambda total, part: (total + jnp.square(conv(part, kernel)).sum(), None), 0.0, x)[0]

    x, kernel = jnp.ones((3, 2, 9, 9, 16)), jnp.ones((3, 3, 8, 16))
    text = jax.jit(jax.grad(loss, (0, 1))).lower(kernel, x).compile().as_text()
    labels = re.findall(r'convolution\(.*dim_labels=([^,\s]+)', text)
    assert len(labels) >= (6 if method == 'split' else 3)
    assert set(labels) == {'b01f_01io->b01f'}


@pytest.mark.parametrize('method', ['split', 'loop'])
def test_strided_gradients_multiply_no_zeros(method):
    """An output gradient that is spread out by the stride would show as a dilated image in a convolution."""
    conv = functools.partial(grouped_conv, stride=2, groups=2, method=method)
    x, kernel = jnp.zeros((2, 9, 8, 32)), jnp.zeros((5, 5, 16, 32))
    program = jax.jit(jax.grad(lambda *given: conv(*given).sum(), (0, 1))).lower(x, kernel).as_text()
    assert program.count('stablehlo.convolution') >= 2
    assert 'lhs_dilate = [2, 2]' not in program


@pytest.mark.parametrize('groups', [GROUPS_A_TURN, 22])
@pytest.mark.parametrize('method', ['split', 'loop'])
def test_many_groups_are_computed_so_that_threads_can_share_them(groups, method):
    x, kernel = jnp.zeros((2, 8, 8, 16 * groups)), jnp.zeros((3, 3, 16, 16 * groups))
    conv = functools.partial(grouped_conv, groups=groups, method=method)
    text = jax.jit(conv).lower(x, kernel).compile().as_text()
    # The library that computes narrow convolutions on one thread, but as many as are ready at a time.
    bodies = [body for body in text.split('\n\n') if body.count('kind":"__ynn_fusion"') > 1]
    at_once = 11 if method == 'loop' and groups == 22 else groups
    assert [body.count('kind":"__ynn_fusion"') for body in bodies] == [at_once]


@pytest.mark.parametrize('samples', [FEW_SAMPLES, FEW_SAMPLES + 1])
@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize('method', ['split', 'loop'])
def test_few_samples_and_many_have_the_same_gradients(samples, stride, method):
    rng = np.random.default_rng(3)
    x, kernel = rng.normal(size=(samples, 4, 7, 8)), rng.normal(size=(5, 5, 4, 8))
    want = reference(x, kernel, None, stride, 2, 'same')
    y, pull = jax.vjp(
        functools.partial(grouped_conv, stride=stride, groups=2, method=method), jnp.float32(x), jnp.float32(kernel)
    )
    for mine, theirs in zip((y, *pull(y)), want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-3)
