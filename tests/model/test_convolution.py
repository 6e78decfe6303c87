import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from jax import lax
from jax.test_util import check_grads

from efficientnet.errors import ConfigError
from efficientnet.model import convolution
from efficientnet.model.convolution import METHODS, choose_method, grouped_conv

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


def reference(x, kernel, dy, stride, groups, padding):
    """Value and both gradients by definition, one output pixel at a time, in float64; dy None takes y."""
    taps, _, inputs, outputs = kernel.shape
    pads = []
    for size in x.shape[1:3]:
        total = max((-(-size // stride) - 1) * stride + taps - size, 0)
        same = (total // 2, total - total // 2)
        pads.append(same if padding == 'same' else (taps // 2, taps // 2))
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    height = (padded.shape[1] - taps) // stride + 1
    width = (padded.shape[2] - taps) // stride + 1
    y = np.zeros((len(x), height, width, outputs))
    dpadded, dkernel = np.zeros_like(padded), np.zeros_like(kernel)
    per_group = outputs // groups
    for h in range(height):
        for w in range(width):
            for g in range(groups):
                window = np.s_[:, h * stride : h * stride + taps, w * stride : w * stride + taps]
                window += (slice(g * inputs, (g + 1) * inputs),)
                out = slice(g * per_group, (g + 1) * per_group)
                y[:, h, w, out] = np.einsum('nijc,ijco->no', padded[window], kernel[..., out])
                d = y[:, h, w, out] if dy is None else dy[:, h, w, out]
                dkernel[..., out] += np.einsum('nijc,no->ijco', padded[window], d)
                dpadded[window] += np.einsum('ijco,no->nijc', kernel[..., out], d)
    rows, columns = (slice(p[0], p[0] + size) for p, size in zip(pads, x.shape[1:3], strict=True))
    return y, dpadded[:, rows, columns], dkernel


def value_and_gradients(conv, x, kernel, dy):
    y, pull = jax.vjp(conv, x, kernel)
    return y, *pull(dy)


def methods_for(shape):
    _, _, k, inputs, outputs, groups = shape
    fits = {'taps': inputs == outputs == 1, 'matmul': k == 1 and groups == 1, 'dense': groups == 1}
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
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-4, err_msg=method)


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


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize('method', ['native', 'dense', 'split', 'loop', 'patches', 'taps', 'matmul'])
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


@pytest.mark.parametrize('method', ['native', 'split', 'loop', 'patches', 'taps'])
def test_sums_beyond_16_bit_resolution(method):
    # A running fp16 sum of ones stops at 2048; the weight gradient here is 4096.
    x = jnp.ones((1, 64, 64, 2), jnp.float16)
    kernel = jnp.ones((3, 3, 1, 2), jnp.float16)
    conv = functools.partial(grouped_conv, groups=2, method=method)
    _, _, dkernel = jax.jit(value_and_gradients, static_argnums=0)(conv, x, kernel, x)
    assert dkernel[1, 1, 0, 0] == 4096
    assert dkernel[0, 0, 0, 0] == 63 * 63 // 2 * 2  # 3969 is not an fp16 number, its even neighbour is


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


@pytest.mark.parametrize('method', ['split', 'loop', 'patches', 'taps'])
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


@pytest.mark.parametrize('method', ['split', 'loop'])
def test_strided_gradients_multiply_no_zeros(method):
    """An output gradient that is spread out by the stride would show as a dilated image in a convolution."""
    conv = functools.partial(grouped_conv, stride=2, groups=2, method=method)
    x, kernel = jnp.zeros((2, 9, 8, 32)), jnp.zeros((5, 5, 16, 32))
    program = jax.jit(jax.grad(lambda *given: conv(*given).sum(), (0, 1))).lower(x, kernel).as_text()
    assert program.count('stablehlo.convolution') >= 2
    assert 'lhs_dilate = [2, 2]' not in program


@pytest.mark.parametrize('groups', [convolution.GROUPS_A_TURN, 22])
@pytest.mark.parametrize('method', ['split', 'loop'])
def test_many_groups_are_computed_so_that_threads_can_share_them(groups, method):
    x, kernel = jnp.zeros((2, 8, 8, 16 * groups)), jnp.zeros((3, 3, 16, 16 * groups))
    conv = functools.partial(grouped_conv, groups=groups, method=method)
    text = jax.jit(conv).lower(x, kernel).compile().as_text()
    # The library that computes narrow convolutions on one thread, but as many as are ready at a time.
    bodies = [body for body in text.split('\n\n') if body.count('kind":"__ynn_fusion"') > 1]
    at_once = 11 if method == 'loop' and groups == 22 else groups
    assert [body.count('kind":"__ynn_fusion"') for body in bodies] == [at_once]


@pytest.mark.parametrize('samples', [convolution.FEW_SAMPLES, convolution.FEW_SAMPLES + 1])
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


def test_auto_on_an_accelerator_is_native_in_16_bit(monkeypatch):
    monkeypatch.setattr(convolution.jax, 'default_backend', lambda: 'gpu')
    assert choose_method((32, 4, 4, 448), (5, 5, 16, 448), 1, 28) == 'native'
    assert choose_method((32, 8, 8, 48), (3, 3, 1, 48), 1, 48) == 'native'
    x, kernel = jnp.ones((1, 4, 4, 8), jnp.bfloat16), jnp.ones((3, 3, 4, 8), jnp.bfloat16)
    assert 'f32' not in jax.jit(functools.partial(grouped_conv, groups=2)).lower(x, kernel).as_text()


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
        ((3, 3, 8, 8), {'method': 'fft'}, "conv_method='fft' must be auto, native, dense, split, loop, patches"),
        ((3, 3, 8, 8), {'stride': 0}, 'stride=0 must be at least 1'),
        ((3, 8, 8), {}, r'kernel \(3, 8, 8\)'),
        ((3, 3, 8, 8), {'padding': 'valid'}, "padding='valid' must be same or symmetric"),
    ],
)
def test_what_cannot_work_says_why(kernel, options, message):
    with pytest.raises(ConfigError, match=message):
        grouped_conv(jnp.ones((1, 4, 4, 8)), jnp.ones(kernel), **options)
