import dataclasses
import functools
import itertools
import math
import zlib

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from efficientnet.errors import ConfigError
from efficientnet.model.network import NORMS, EfficientNet, gated, sample_dropout, stochastic_depth
from efficientnet.model.scaling import block_names, boundary_shape, model_spec
from efficientnet.numerics.random_keys import layer_keys

TINY = functools.partial(model_spec, 'b0', width=0.25, depth=0.3, classes=5)
TAIL = ('block6b', 'block7a', 'head')  # a block with a residual and one without, and dropout
# Gradients of whole networks are compiled here to be run once.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


def random_variables(model, x, seed=0):
    """Plausible variables drawn with numpy: compiling a network's initialisers takes longer than a test may."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == 'kernel':
            values = rng.normal(0, math.sqrt(2 / math.prod(leaf.shape[:-1])), leaf.shape)
        elif name in ('scale', 'var'):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = rng.normal(0, 0.1, leaf.shape)
        return jnp.array(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0), x))


def run_quickly(function, *args):
    return jax.jit(function).lower(*args).compile(compiler_options=QUICK)(*args)


def count(variables):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables['params']))


@pytest.mark.parametrize(
    ('group_size', 'variant', 'parameters'),
    [
        (1, 'b0', 5288548), (16, 'b0', 5913796),
        # test_costs.py counts all of these without building them, and shows that it counts what modules have.
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (1, 'b1', 7794184), (1, 'b2', 9109994), (1, 'b3', 12233232), (1, 'b4', 19341616), (1, 'b5', 30389784),
                (1, 'b6', 43040704), (1, 'b7', 66347960), (16, 'b1', 8332120), (16, 'b2', 9504122),
                (16, 'b3', 12590896), (16, 'b4', 19328168), (16, 'b5', 28715320),
            )
        ),
    ],
)  # fmt: skip
def test_parameter_counts(group_size, variant, parameters):
    model = EfficientNet(spec=model_spec(variant, group_size=group_size), conv_method='native')
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    assert count(shapes) == parameters
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))


def from_keras(network, variables):
    """The variables with the values of a keras.applications EfficientNet."""
    layers = {
        'expand': 'expand_conv', 'expand_norm': 'expand_bn', 'spatial': 'dwconv', 'spatial_norm': 'bn',
        'se_reduce': 'se_reduce', 'se_expand': 'se_expand', 'project': 'project_conv',
        'project_norm': 'project_bn', 'conv': 'conv', 'norm': 'bn',
    }  # fmt: skip
    weights = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean', 'var': 'moving_variance'}

    def value(path, leaf):
        _, block, layer, name = (entry.key for entry in path)
        prefix = {'head': 'top'}.get(block, block)
        target = 'predictions' if layer == 'classifier' else f'{prefix}_{layers[layer]}'
        stored = {w.name: w for w in network.get_layer(target).weights}
        wanted = name if name in stored else weights[name]
        # keras has 1x1 convolutions in squeeze-and-excite, and [k, k, C, 1] depthwise kernels
        return jnp.array(stored[wanted].numpy().reshape(leaf.shape))

    return jax.tree_util.tree_map_with_path(value, variables)


@pytest.mark.parametrize('size', [64, pytest.param(75, marks=pytest.mark.slow)])
def test_b0_equals_keras(size):
    keras.utils.set_random_seed(0)
    network = keras.applications.EfficientNetB0(weights=None, input_shape=(size, size, 3))
    rng = np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            low_high = ((0.5, 1.5), (-0.3, 0.3), (-0.3, 0.3), (0.5, 1.5))
            layer.set_weights([rng.uniform(*span, layer.gamma.shape) for span in low_high])
        elif hasattr(layer, 'bias') and layer.bias is not None:
            layer.bias.assign(rng.normal(0, 0.3, layer.bias.shape))
    images = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    # its own rescaling divides by 255, its normalisation is the identity without pretrained weights
    body = keras.Model(network.input, network.get_layer('top_dropout').output)
    kernel, bias = network.get_layer('predictions').get_weights()
    want = body(255 * images, training=False).numpy() @ kernel + bias

    model = EfficientNet(spec=model_spec('b0', group_size=1), norm='batch')
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    got = jax.jit(model.apply)(from_keras(network, shapes), images)
    assert np.std(want) > 0.01
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def micro_spec(**options):
    """Every kind of block in a network that compiles in seconds: unexpanded, strided, with a residual."""
    spec = TINY(**options)
    first, strided = spec.blocks[:2]
    residual = dataclasses.replace(strided, name='block2b', kernel=5, stride=1)
    return dataclasses.replace(spec, blocks=(first, strided, residual), head_channels=16)


def loss_and_logits(params, model, variables, x, keys):
    variables = {**variables, 'params': params}
    logits, _ = model.apply(variables, x, train=True, sample_keys=keys, mutable=['batch_stats'])
    return jnp.sin(logits).mean(), logits


@pytest.mark.parametrize(
    ('norm', 'dtype'), [('group', jnp.float16), ('batch', jnp.bfloat16), ('layer_proxy', jnp.float16)]
)
@pytest.mark.parametrize(
    ('group_size', 'size', 'stem_stride'),
    [(1, 33, 2), pytest.param(4, 8, 1, marks=pytest.mark.slow), pytest.param(16, 33, 2, marks=pytest.mark.slow)],
)
def test_every_norm_and_group_size_trains_in_16_bit(norm, dtype, group_size, size, stem_stride):
    spec = micro_spec(group_size=group_size, stem_stride=stem_stride)
    model = EfficientNet(spec=spec, norm=norm, dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (4, size, size, 3))
    variables = random_variables(model, x)
    keys = jax.random.split(jax.random.key(1), 4)
    grad = jax.grad(lambda params: loss_and_logits(params, model, variables, x, keys), has_aux=True)
    grads, logits = run_quickly(grad, variables['params'])
    assert logits.dtype == jnp.float32
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert leaf.dtype == jnp.float32
        assert jnp.isfinite(leaf).all(), path
        assert jnp.abs(leaf).max() > 0, path


SIZES = [(33, 2), (8, 1), (1, 1)]  # of images, and the stem's stride


@pytest.mark.parametrize(
    ('norm', 'size', 'stem_stride'),
    [
        pytest.param(norm, *size, marks=[] if NORMS.index(norm) == SIZES.index(size) else pytest.mark.slow)
        for norm, size in itertools.product(NORMS, SIZES)
    ],
)
def test_whole_networks_have_gradients_of_the_right_shapes(norm, size, stem_stride):
    model = EfficientNet(spec=TINY(stem_stride=stem_stride), norm=norm)
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(1), 2))

    def grad(variables, x, keys):
        return jax.grad(loss_and_logits, has_aux=True)(variables['params'], model, variables, x, keys)

    grads, logits = jax.eval_shape(grad, variables, x, keys)
    assert logits.shape == (2, 5)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, variables['params'])


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize('norm', NORMS)
def test_no_gradient_is_summed_in_16_bit(norm, backend, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    spec = model_spec('b0', group_size=16, classes=3, width=0.2, depth=0.3)
    model = EfficientNet(spec=spec, norm=norm, dtype=jnp.bfloat16)
    images, keys = jnp.ones((2, 32, 32, 3)), jax.random.split(jax.random.key(0))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images))

    def loss(params):
        return model.apply({**variables, 'params': params}, images, train=True, sample_keys=keys, mutable=True)[0].sum()

    def sums(jaxpr):
        for equation in jaxpr.eqns:
            # A merged kernel [k, k, n, C, G/n, n, O] of a GPU adds one number to zeros.
            if equation.primitive.name == 'reduce_sum' and equation.invars[0].aval.ndim < 7:
                yield equation.invars[0].aval
            for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, 'eqns')):
                if hasattr(inner, 'jaxpr') or hasattr(inner, 'eqns'):
                    yield from sums(getattr(inner, 'jaxpr', inner))

    found = list(sums(jax.make_jaxpr(jax.grad(loss))(variables['params']).jaxpr))
    assert found
    assert {aval.dtype for aval in found} <= {np.dtype(np.float32), np.dtype(np.complex64)}


def test_gradients_of_a_gate_are_those_of_autodiff_in_fp32():
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = (jax.random.normal(key, (2, 40, 40, 3), jnp.bfloat16) for key in keys[:2])
    gate = jax.random.uniform(keys[2], (2, 3))
    y, pull = jax.vjp(gated, x, gate)
    want, want_pull = jax.vjp(lambda x, gate: x * gate[:, None, None, :], x.astype(jnp.float32), gate)
    dx, dgate = pull(dy)
    want_dx, want_dgate = want_pull(dy.astype(jnp.float32))
    assert y.dtype == dx.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, want.astype(jnp.bfloat16))
    np.testing.assert_array_equal(dx, want_dx.astype(jnp.bfloat16))
    np.testing.assert_allclose(dgate, want_dgate, rtol=1e-5, atol=1e-5)


def test_compute_dtype_changes_little():
    x = jax.random.normal(jax.random.key(0), (2, *boundary_shape(TINY(), 'block6b', 64)))
    outputs = {}
    for dtype in (jnp.float32, jnp.float16):
        model = EfficientNet(spec=TINY(), blocks=TAIL[:2], dtype=dtype)
        outputs[dtype] = jax.jit(model.apply)(random_variables(model, x), x)
        assert outputs[dtype].dtype == dtype
    np.testing.assert_allclose(outputs[jnp.float16].astype(jnp.float32), outputs[jnp.float32], atol=2e-2)


def test_slices_have_the_whole_networks_variables_and_results():
    spec = TINY()
    first, *_, wide, residual, last = spec.blocks
    wide = dataclasses.replace(wide, in_channels=first.out_channels)  # what lies between adds nothing but time
    spec = dataclasses.replace(spec, blocks=(first, wide, residual, last))
    names = block_names(spec)
    slices = [names[:3], names[3:4], names[4:]]
    x = jax.random.normal(jax.random.key(3), (1, 33, 33, 3))
    whole = EfficientNet(spec=spec, conv_method='native')
    parts = [whole.clone(blocks=blocks) for blocks in slices]

    def init(key):
        merged = {}
        for blocks, part in zip(slices, parts, strict=True):
            merged.update(part.init(key, jnp.zeros((1, *boundary_shape(spec, blocks[0], 33))))['params'])
        return whole.init(key, x)['params'], merged

    params, merged = run_quickly(init, jax.random.key(0))
    assert set(params) == set(names) == set(merged)
    jax.tree.map(np.testing.assert_array_equal, params, merged)
    gates = [params[name]['se_expand']['kernel'] for name in ('block6b', 'block7a')]
    assert gates[0].shape == gates[1].shape
    assert not np.array_equal(*gates)

    def in_parts(y):
        for blocks, part in zip(slices, parts, strict=True):
            y = part.apply({'params': {name: params[name] for name in blocks}}, y)
        return y

    want = run_quickly(lambda x: whole.apply({'params': params}, x), x)
    np.testing.assert_allclose(run_quickly(in_parts, x), want, rtol=1e-5, atol=1e-5)

    # initialisers: fan-out for dense kernels, fan-in for the spatial ones, glorot for the classifier
    kernel = params['head']['conv']['kernel']
    assert kernel.std() == pytest.approx(math.sqrt(2 / kernel.shape[-1]), rel=0.1)
    spatial = params['block6a']['spatial']['kernel']
    assert spatial.std() == pytest.approx(math.sqrt(2 / math.prod(spatial.shape[:3])), rel=0.1)
    classifier = params['head']['classifier']['kernel']
    assert jnp.abs(classifier).max() <= math.sqrt(6 / sum(classifier.shape))
    assert all((block.get('norm', block.get('spatial_norm'))['scale'] == 1).all() for block in params.values())


def test_boundary_shapes_are_the_activations():
    for padding, size, stem_stride in (('same', 33, 1), ('symmetric', 33, 2), ('symmetric', 64, 2)):
        spec = TINY(stem_stride=stem_stride)
        shape = (size, size, 3)
        for name in block_names(spec)[:-1]:
            assert boundary_shape(spec, name, size) == shape
            block = EfficientNet(spec=spec, blocks=(name,), padding=padding, conv_method='native')
            y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.zeros((2, *shape)))
            shape = y.shape[1:]
        assert boundary_shape(spec, 'head', size) == shape


def test_randomness_belongs_to_the_sample():
    spec = TINY(dropout=0.5, survival=0.3)
    model = EfficientNet(spec=spec, blocks=TAIL)
    x = jax.random.normal(jax.random.key(0), (4, *boundary_shape(spec, 'block6b', 64)))
    variables = random_variables(model, x)
    keys = jax.random.split(jax.random.key(1), 4)
    train = jax.jit(functools.partial(model.apply, train=True))
    whole = train(variables, x, sample_keys=keys)
    halves = [train(variables, x[i : i + 2], sample_keys=keys[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(whole, np.concatenate(halves), rtol=1e-5, atol=1e-5)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(train(variables, x[order], sample_keys=keys[order]), whole[order], rtol=1e-5)
    assert not np.allclose(train(variables, x, sample_keys=keys[order]), whole)
    # the same image under two keys differs, under one key is equal
    twice = train(variables, x[jnp.zeros(4, int)], sample_keys=keys[jnp.array([0, 0, 1, 2])])
    np.testing.assert_allclose(twice[0], twice[1], rtol=1e-6)
    assert not np.allclose(twice[1], twice[2])


def test_evaluation_is_deterministic_and_ignores_keys():
    spec = TINY(dropout=0.5, survival=0.3)
    model = EfficientNet(spec=spec, blocks=TAIL)
    x = jax.random.normal(jax.random.key(0), (2, *boundary_shape(spec, 'block6b', 64)))
    variables = random_variables(model, x)
    y = model.apply(variables, x)
    np.testing.assert_array_equal(model.apply(variables, x, sample_keys=jax.random.split(jax.random.key(0), 2)), y)


def test_training_asks_for_keys_only_where_something_is_random():
    keys = jax.random.split(jax.random.key(0), 3)

    def trace(blocks, sample_keys=None, **options):
        spec = TINY(**options)
        x = jnp.zeros((2, *boundary_shape(spec, blocks[0], 32)))
        init = functools.partial(EfficientNet(spec=spec, blocks=blocks).init, train=True)
        jax.eval_shape(init, jax.random.key(0), x, sample_keys=sample_keys)

    with pytest.raises(ValueError, match=r'block6b.*sample_keys'):
        trace(TAIL[:2])
    with pytest.raises(ValueError, match=r'head.*sample_keys'):
        trace(('head',))
    with pytest.raises(ValueError, match=r'shape \(2,\)'):
        trace(('head',), keys)
    trace(('block7a',))
    trace(TAIL[:2], survival=1.0)
    trace(('head',), dropout=0.0)
    trace(('head',), keys[:2])


@pytest.mark.parametrize('drop', [stochastic_depth, sample_dropout])
def test_dropping_keeps_the_expectation(drop):
    samples = 4000
    x = jnp.ones((samples, 1, 1, 2) if drop is stochastic_depth else (samples, 2))
    y = drop(x, 0.8 if drop is stochastic_depth else 0.2, jax.random.split(jax.random.key(0), samples))
    np.testing.assert_allclose(np.unique(y), [0, 1.25])
    np.testing.assert_allclose(y.mean(), 1, atol=0.03)
    alike = (y.reshape(samples, 2)[:, 0] == y.reshape(samples, 2)[:, 1]).mean()
    assert (alike == 1) == (drop is stochastic_depth)  # whole samples, or single elements


@pytest.mark.parametrize('survival', [0.9875, 0.85])
def test_what_survives_is_rounded_once(survival):
    x = jnp.linspace(1, 2, 64).astype(jnp.bfloat16).reshape(64, 1, 1, 1)
    y = stochastic_depth(x, survival, jax.random.split(jax.random.key(0), 64))
    expected = jnp.where(y != 0, x.astype(jnp.float32) / survival, 0).astype(jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, expected)


def test_layer_keys_are_the_documented_ones():
    keys = jax.random.split(jax.random.key(0), 2)
    for layer in ('block2b', 'head', 'block7a'):
        want = [jax.random.fold_in(key, np.uint32(zlib.crc32(layer.encode()))) for key in keys]
        got = layer_keys(keys, layer)
        np.testing.assert_array_equal(jax.random.key_data(got), [jax.random.key_data(key) for key in want])


def test_proxy_norm_defers_its_division_to_the_gate():
    spec = TINY()
    model = EfficientNet(spec=spec, blocks=('block1a',), norm='layer_proxy')
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, spec.stem_channels))
    params = random_variables(model, x)['params']['block1a']
    assert set(params['spatial_norm']) == {'scale', 'bias', 'proxy_scale', 'proxy_bias'}
    assert set(params['project_norm']) == {'scale'}
    zero_gate = jax.tree.map(jnp.zeros_like, params['se_expand'])
    params = {**params, 'se_expand': zero_gate, 'spatial_norm': {**params['spatial_norm']}}
    _, captured = model.apply({'params': {'block1a': params}}, x, capture_intermediates=True)
    block = captured['intermediates']['block1a']
    (numerator, factor), *_ = block['spatial_norm']['__call__']
    # with a gate of 1/2 the projection must have seen numerator · factor / 2
    want = numerator * factor[None, None, None] / 2 @ params['project']['kernel'][0, 0]
    np.testing.assert_allclose(block['project']['__call__'][0], want, rtol=1e-4, atol=1e-5)


def test_batch_statistics_have_the_blocks_names():
    spec = TINY(survival=1.0, dropout=0.0)
    model = EfficientNet(spec=spec, blocks=TAIL, norm='batch')
    x = jax.random.normal(jax.random.key(0), (2, *boundary_shape(spec, 'block6b', 64)))
    variables = random_variables(model, x)
    assert set(variables) == {'params', 'batch_stats'}
    assert set(variables['batch_stats']) == set(TAIL)
    _, written = jax.jit(functools.partial(model.apply, train=True, mutable=['batch_stats']))(variables, x)
    shapes = [jax.tree.map(jnp.shape, tree['batch_stats']) for tree in (written, variables)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'norm': 'instance'}, "norm='instance' must be one of group"),
        ({'conv_method': 'fft'}, "conv_method='fft' must be auto"),
        ({'conv_method': 'taps'}, 'conv_method=taps'),
        ({'padding': 'valid'}, "padding='valid'"),
        ({'norm_groups': 5}, 'norm_groups=5 must divide the .* channels of stem/norm'),
        ({'blocks': ('block1a', 'block3a')}, 'consecutive'),
        ({'blocks': ('block9z',)}, 'block9z'),
        ({'blocks': ()}, 'consecutive'),
    ],
)
def test_what_cannot_work_says_why(options, message):
    model = EfficientNet(spec=TINY(), **options)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
