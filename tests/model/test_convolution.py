import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from jax import lax
from jax.test_util import check_grads

from efficientnet.errors import ConfigError
from efficientnet.model import convolution, onednn
from efficientnet.model.convolution import METHODS, choose_library, choose_method, grouped_conv
from efficientnet.model.depthwise import SAMPLES
from tests.model.conv_reference import reference, value_and_gradients

ONEDNN = pytest.param('onednn', marks=pytest.mark.skipif(not onednn.available(), reason='needs oneDNN in XLA'))

# (H, W, k, C/groups, O/groups, groups)
SHAPES = [
    (6, 6, 3, 4, 4, 2),
    (7, 5, 3, 2, 3, 3),
    (5, 8, 5, 1, 1, 6),
    (2, 3, 5, 1, 1, 4),
    (2, 2, 5, 4, 4, 3),
    (1, 1, 5, 3, 3, 2),
    (4, 3, 1, 5, 7, 1),
    (5, 4, 1, 2, 2, 3),
    (4, 6, 3, 3, 8, 1),
    (5, 4, 3, 16, 16, 10),  # spare channels
    (3, 4, 5, 16, 16, 22),  # and two turns of a loop
    (3, 3, 3, 16, 8, 12),
    (3, 3, 3, 8, 16, 12),
    (3, 3, 3, 1, 2, 31),  # no number of groups a turn
]


def methods_for(shape):
    _, _, k, inputs, outputs, groups = shape
    fits = {'taps': inputs == outputs == 1, 'matmul': k == 1 and groups == 1, 'dense': groups == 1}
    fits['onednn'] = onednn.available()
    return [method for method in METHODS if fits.get(method, True)]


# with a stride of 1, and with odd sizes, both paddings are the same
CASES = [
    *((shape, stride, 'same') for shape in SHAPES for stride in (1, 2)),
    *((shape, 2, 'symmetric') for shape in SHAPES if shape[2] > 1 and (shape[0] % 2 == 0 or shape[1] % 2 == 0)),
]


@pytest.mark.parametrize(('shape', 'stride', 'padding'), CASES)
def test_value_and_gradients_equal_the_definition(shape, stride, padding):
    h, w, k, inputs, outputs, groups = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, h, w, inputs * groups))
    kernel = rng.normal(size=(k, k, inputs, outputs * groups))
    want = reference(x, kernel, None, stride, groups, padding)

    @jax.jit
    def run(x, kernel):
        results = {}
        for method in methods_for(shape):
            options = {'stride': stride, 'groups': groups, 'padding': padding, 'method': method}
            y, pull = jax.vjp(functools.partial(grouped_conv, **options), x, kernel)
            results[method] = y, *pull(y)
        return results

    for method, got in run(jnp.float32(x), jnp.float32(kernel)).items():
        for mine, theirs in zip(got, want, strict=True):
            assert mine.shape == theirs.shape
            atol = max(1e-4, 1e-6 * np.abs(theirs).max())  # rounding of sums whose terms cancel
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=atol, err_msg=method)


@pytest.mark.parametrize(('size', 'k', 'stride'), [(1, 5, 1), (2, 3, 2), (7, 3, 2), (8, 5, 2), (8, 3, 1)])
def test_same_is_tensorflows(size, k, stride):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, size, size, 8)).astype(np.float32)
    kernel = rng.normal(size=(k, k, 4, 8)).astype(np.float32)
    # TensorFlow's CPU kernel has no groups
    parts = zip(np.split(x, 2, 3), np.split(kernel, 2, 3), strict=True)
    want = np.concatenate([tf.nn.conv2d(a, b, stride, 'SAME').numpy() for a, b in parts], 3)
    conv = jax.jit(functools.partial(grouped_conv, stride=stride, groups=2))
    got = conv(jnp.array(x), jnp.array(kernel))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('samples', [SAMPLES, SAMPLES + 1, 2 * SAMPLES, 3 * SAMPLES - 1])
def test_depthwise_of_many_samples(samples):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(samples, 5, 6, 3)), rng.normal(size=(3, 3, 1, 3))
    dy = rng.normal(size=(samples, 3, 3, 3))
    conv = functools.partial(grouped_conv, stride=2, groups=3, method='taps')
    got = jax.jit(value_and_gradients, static_argnums=0)(conv, *map(jnp.float32, (x, kernel, dy)))
    for mine, theirs in zip(got, reference(x, kernel, dy, 2, 3, 'same'), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize('method', ['native', 'dense', 'split', 'loop', 'patches', 'taps', 'matmul', ONEDNN])
def test_16_bit_rounds_once(method, dtype):
    rng = np.random.default_rng(2)
    k, inputs, groups = {'taps': (3, 1, 32), 'matmul': (1, 32, 1), 'dense': (3, 32, 1)}.get(method, (3, 16, 2))
    x = jnp.array(rng.normal(size=(4, 6, 6, 32)), dtype)
    kernel = jnp.array(rng.normal(size=(k, k, inputs, 32)), dtype)
    dy = jnp.array(rng.normal(size=x.shape), dtype)
    conv = functools.partial(grouped_conv, groups=groups, method=method)
    y, dx, dkernel = jax.jit(value_and_gradients, static_argnums=0)(conv, x, kernel, dy)
    wide = [np.float64(a.astype(jnp.float32)) for a in (x, kernel, dy)]
    eps = float(jnp.finfo(dtype).eps)
    for got, want in zip((y, dx, dkernel), reference(*wide, 1, groups, 'same'), strict=True):
        assert got.dtype == dtype
        # half a unit in the last place, and fp32 noise in sums of cancelling terms
        np.testing.assert_allclose(np.float64(got.astype(jnp.float32)), want, rtol=0.51 * eps, atol=1e-4)


@pytest.mark.parametrize('method', ['native', 'split', 'loop', 'patches', 'taps', ONEDNN])
def test_sums_beyond_16_bit_resolution(method):
    # A running fp16 sum of ones stops at 2048; the weight gradient here is 4096.
    x = jnp.ones((1, 64, 64, 2), jnp.float16)
    kernel = jnp.ones((3, 3, 1, 2), jnp.float16)
    conv = functools.partial(grouped_conv, groups=2, method=method)
    _, _, dkernel = jax.jit(value_and_gradients, static_argnums=0)(conv, x, kernel, x)
    assert dkernel[1, 1, 0, 0] == 4096
    assert dkernel[0, 0, 0, 0] == 63 * 63 // 2 * 2  # 3969 is not an fp16 number, its even neighbour is


@pytest.mark.parametrize('method', ['split', 'loop', 'patches', 'taps', ONEDNN])
def test_under_jit_scan_checkpoint_vmap_and_pmap(method):
    groups, inputs = (8, 1) if method == 'taps' else (2, 4)
    key = jax.random.key(0)
    x = jax.random.normal(key, (2, 5, 5, 8))
    kernel = 0.1 * jax.random.normal(jax.random.fold_in(key, 1), (3, 3, inputs, 8))
    conv = functools.partial(grouped_conv, groups=groups, method=method)

    def loss(conv, kernel, x):
        step = jax.checkpoint(lambda y, _: (jnp.tanh(conv(y, kernel)), None))
        return jnp.square(lax.scan(step, x, None, length=3)[0]).sum()

    native = functools.partial(grouped_conv, groups=groups, method='native')
    want = jax.jit(jax.grad(functools.partial(loss, native)))(kernel, x)
    grad = jax.grad(functools.partial(loss, conv))
    np.testing.assert_allclose(jax.jit(grad)(kernel, x), want, rtol=1e-5, atol=1e-5)
    parts = x[:, None]
    mapped = jax.jit(jax.vmap(grad, (None, 0)))(kernel, parts).sum(0)
    np.testing.assert_allclose(mapped, want, rtol=1e-5, atol=1e-5)
    two = jax.devices()[:2]
    summed = jax.pmap(lambda k, p: lax.psum(grad(k, p), 'replica'), 'replica', in_axes=(None, 0), devices=two)
    np.testing.assert_allclose(summed(kernel, parts)[0], want, rtol=1e-5, atol=1e-5)


def test_jacobian_against_finite_differences():
    x, kernel = np.random.default_rng(3).normal(size=(2, 5, 5, 4)), np.ones((3, 3, 1, 4))
    conv = jax.jit(functools.partial(grouped_conv, groups=4, method='taps', stride=2))
    check_grads(conv, (jnp.float32(x), jnp.float32(kernel)), order=1, modes=['rev'], rtol=1e-2)


def test_auto_on_cpu_never_takes_the_slow_weight_gradient():
    kernel = (5, 5, 16, 448)
    assert choose_method((32, 16, 16, 448), kernel, 1, 28) == 'loop'
    assert choose_method((32, 16, 16, 448), (5, 5, 112, 448), 1, 4) == 'split'
    assert choose_method((32, 2, 2, 448), kernel, 1, 28) == 'patches'
    assert choose_method((32, 4, 4, 448), kernel, 2, 28) == 'patches'
    assert choose_method((32, 4, 4, 448), kernel, 1, 28) == 'loop'
    assert choose_method((32, 8, 8, 48), (3, 3, 1, 48), 1, 48) == 'taps'
    assert choose_method((32, 8, 8, 48), (3, 3, 48, 48), 1, 1) == 'dense'
    assert choose_method((32, 8, 8, 48), (1, 1, 48, 96), 1, 1) == 'matmul'
    x, weights = jnp.zeros((1, 9, 9, 32)), jnp.zeros((3, 3, 16, 32))
    program = jax.jit(jax.grad(lambda k: grouped_conv(x, k, groups=2).sum())).lower(weights).as_text()
    assert 'feature_group_count = 2' not in program
    assert 'batch_group_count = 2' not in program


def test_large_images_are_onednns_where_it_can_be_had_and_nobody_said_otherwise(monkeypatch):
    monkeypatch.setattr(onednn, 'available', lambda: True)
    assert choose_library('auto', 33) == 'onednn'
    assert choose_library('auto', 32) == 'auto'
    assert choose_library('loop', 128) == 'loop'
    monkeypatch.setattr(onednn, 'available', lambda: False)
    assert choose_library('auto', 33) == 'auto'
    with pytest.raises(
        ConfigError, match=r'conv_method=onednn needs an x86 CPU under Linux and jaxlib 0\.10\.2; this is'
    ):
        grouped_conv(jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 4, 8)), groups=2, method='onednn')


@pytest.mark.parametrize(
    ('inputs', 'groups', 'method', 'left'),
    [
        (16, 28, 'merged', 14),
        (16, 6, 'merged', 1),  # few channels are one group
        (16, 7, 'merged', 7),  # groups of 7 · 16 channels would be larger than is fast
        (4, 40, 'native', 40),
        (1, 48, 'native', 48),
        (32, 8, 'native', 8),
        (7, 1, 'native', 1),
    ],
)
def test_auto_on_an_accelerator_has_fewer_and_wider_groups_in_16_bit(inputs, groups, method, left, monkeypatch):
    monkeypatch.setattr(convolution.jax, 'default_backend', lambda: 'gpu')
    channels = inputs * groups
    x, kernel = jnp.ones((1, 4, 4, channels), jnp.bfloat16), jnp.ones((3, 3, inputs, channels), jnp.bfloat16)
    assert choose_method(x.shape, kernel.shape, 1, groups) == method
    program = jax.jit(functools.partial(grouped_conv, groups=groups)).lower(x, kernel).as_text()
    assert f'feature_group_count = {left} ' in program
    assert 'f32' not in program


def test_taps_that_never_meet_the_image_are_left_out():
    x, kernel = jnp.ones((1, 1, 1, 16)), jnp.ones((5, 5, 4, 16))
    program = jax.make_jaxpr(functools.partial(grouped_conv, groups=4, method='patches'))(x, kernel)
    assert max(v.aval.size for e in program.eqns for v in e.outvars) <= 4 * 16


@pytest.mark.parametrize(
    ('kernel', 'options', 'message'),
    [
        ((3, 3, 4, 8), {'groups': 1}, 'groups=1'),
        ((3, 3, 4, 9), {'groups': 2}, 'groups=2'),
        ((3, 3, 4, 8), {'groups': 2, 'method': 'taps'}, 'conv_method=taps'),
        ((3, 3, 8, 8), {'method': 'matmul'}, 'conv_method=matmul'),
        ((1, 1, 4, 8), {'groups': 2, 'method': 'matmul'}, 'conv_method=matmul'),
        ((3, 3, 8, 8), {'method': 'fft'}, "conv_method='fft' must be auto, native, merged, dense, split, loop"),
        ((3, 3, 8, 8), {'stride': 0}, 'stride=0 must be at least 1'),
        ((3, 8, 8), {}, r'kernel \(3, 8, 8\)'),
        ((3, 3, 8, 8), {'padding': 'valid'}, "padding='valid' must be same or symmetric"),
    ],
)
def test_what_cannot_work_says_why(kernel, options, message):
    with pytest.raises(ConfigError, match=message):
        grouped_conv(jnp.ones((1, 4, 4, 8)), jnp.ones(kernel), **options)
