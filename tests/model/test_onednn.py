import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientnet.model import onednn
from efficientnet.model.convolution import grouped_conv
from tests.model.conv_reference import reference, value_and_gradients

pytestmark = pytest.mark.skipif(not onednn.available(), reason='needs oneDNN in XLA')


@pytest.mark.parametrize('samples', [1, 3, 16, 33])
@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize(('inputs', 'outputs', 'groups'), [(1, 1, 12), (3, 5, 1), (4, 4, 3), (16, 16, 2), (17, 8, 2)])
def test_any_number_of_samples_and_channels(samples, stride, inputs, outputs, groups):
    """The library has kernels of its own for few and many, for multiples of 16 and for others."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(samples, 7, 5, inputs * groups)), rng.normal(size=(3, 3, inputs, outputs * groups))
    want = reference(x, kernel, None, stride, groups, 'same')
    conv = functools.partial(grouped_conv, stride=stride, groups=groups, method='onednn')
    y, pull = jax.vjp(conv, jnp.float32(x), jnp.float32(kernel))
    for mine, theirs in zip((y, *pull(y)), want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-3)


def test_each_direction_is_one_call():
    conv = functools.partial(grouped_conv, groups=2, stride=2, method='onednn')
    both_ways = jax.jit(functools.partial(value_and_gradients, conv))
    shapes = (2, 8, 8, 32), (3, 3, 16, 32), (2, 4, 4, 32)
    text = both_ways.lower(*map(jnp.ones, shapes)).as_text()
    assert text.count('__onednn$convolution') == 3
    assert 'stablehlo.convolution' not in text


def test_calls_at_the_same_time_keep_to_themselves():
    """Some of the library's kernels have scratch memory, which must not be that of another one."""
    rng = np.random.default_rng(0)
    cases = [(48, 3, 32, 1), (24, 64, 64, 1), (16, 96, 128, 1), (20, 128, 64, 2), (10, 256, 32, 1), (12, 48, 96, 1)]
    given = [(rng.normal(size=(4, side, side, c)), rng.normal(size=(3, 3, c // g, o))) for side, c, o, g in cases]
    given = [(jnp.float32(x), jnp.float32(kernel)) for x, kernel in given]
    convs = [functools.partial(grouped_conv, groups=g, method='onednn') for *_, g in cases]
    alone = [jax.jit(conv)(*each) for conv, each in zip(convs, given, strict=True)]
    together = jax.jit(lambda given: [conv(*each) for conv, each in zip(convs, given, strict=True)])
    for _ in range(20):
        for mine, theirs in zip(together(given), alone, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_nothing_is_written_to_the_cache_of_programs(tmp_path):
    """What XLA writes of such a program is garbage, or the process crashes."""
    code = """
import sys

import jax
import jax.numpy as jnp

from efficientnet.model.convolution import grouped_conv

jax.config.update('jax_compilation_cache_dir', sys.argv[1])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
x, kernel = jnp.ones((1, 8, 8, 32)), jnp.ones((3, 3, 16, 32))
for method in sys.argv[2:]:
    print(jax.jit(lambda x, kernel: grouped_conv(x, kernel, groups=2, method=method))(x, kernel).shape)
"""
    for methods, written in ((('native',), True), (('onednn', 'native'), False)):
        cache = tmp_path / methods[0]
        run = subprocess.run(
            [sys.executable, '-W', 'error', '-c', code, cache, *methods],
            env=os.environ | {'JAX_PLATFORMS': 'cpu'},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert any('lambda' in path.name for path in cache.glob('*')) == written
