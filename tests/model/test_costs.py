import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientnet.errors import ConfigError
from efficientnet.model.costs import block_costs
from efficientnet.model.network import NORMS, EfficientNet
from efficientnet.model.scaling import VARIANTS, block_names, boundary_shape, model_spec

TINY = functools.partial(model_spec, 'b0', width=0.25, depth=0.3, classes=5)


def total(costs, field):
    return sum(getattr(block, field) for block in costs)


def shapes_of(spec, norm, blocks=None, size=33, batch=3, dtype=jnp.float32):
    """The blocks as a module, the shapes of its variables and input, and keys."""
    model = EfficientNet(spec=spec, norm=norm, blocks=blocks, conv_method='native', dtype=dtype)
    first = blocks[0] if blocks else 'stem'
    x = jax.ShapeDtypeStruct((batch, *boundary_shape(spec, first, size)), dtype)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    return model, jax.eval_shape(model.init, jax.random.key(0), x), x, keys


@pytest.mark.parametrize(
    ('group_size', 'variant', 'parameters', 'mega_macs'),
    [
        (1, 'b0', 5288548, 386), (1, 'b1', 7794184, 687), (1, 'b2', 9109994, 994), (1, 'b3', 12233232, 1827),
        (1, 'b4', 19341616, 4394), (1, 'b5', 30389784, 10266), (1, 'b6', 43040704, 19068),
        (1, 'b7', 66347960, 37746), (4, 'b0', 5145556, 417), (4, 'b4', 17943552, 4463), (4, 'b7', 59387192, 36394),
        (16, 'b0', 5913796, 635), (16, 'b1', 8332120, 1112), (16, 'b2', 9504122, 1522), (16, 'b3', 12590896, 2731),
        (16, 'b4', 19328168, 6183), (16, 'b5', 28715320, 13501), (16, 'b7', 59210264, 44862),
    ],
)  # fmt: skip
def test_whole_networks_at_their_native_resolution(group_size, variant, parameters, mega_macs):
    spec = model_spec(variant, group_size=group_size)
    costs = block_costs(spec, VARIANTS[variant].resolution)
    assert total(costs, 'parameters') == parameters
    assert round(total(costs, 'macs') / 1e6) == mega_macs


@pytest.mark.parametrize(
    ('group_size', 'parameters', 'mega_macs'),
    [(16, (0.558, 18.77), (2467, 3717)), (1, (0.269, 19.07), (1100, 3294))],
)
def test_b4_split_as_the_reference_does(group_size, parameters, mega_macs):
    costs = block_costs(model_spec('b4', group_size=group_size), 380)
    cut = [block.name for block in costs].index('block4a')
    for stage, millions, macs in zip((costs[:cut], costs[cut:]), parameters, mega_macs, strict=True):
        assert total(stage, 'parameters') / 1e6 == pytest.approx(millions, abs=5e-3)
        assert round(total(stage, 'macs') / 1e6) == macs
    assert costs[cut].boundary == 48 * 48 * 56


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('spec', [TINY(group_size=1), TINY(group_size=4, stem_stride=1), model_spec('b0')])
def test_parameters_are_the_models(norm, spec):
    _, variables, _, _ = shapes_of(spec, norm)
    params = variables['params']
    found = {block.name: block.parameters for block in block_costs(spec, 33, norm=norm)}
    assert found == {name: sum(leaf.size for leaf in jax.tree.leaves(params[name])) for name in block_names(spec)}


def test_boundaries_are_what_enters_a_block():
    spec = TINY(stem_stride=1)
    costs = block_costs(spec, 33)
    assert tuple(block.name for block in costs) == block_names(spec)
    assert all(block.boundary == math.prod(boundary_shape(spec, block.name, 33)) for block in costs)


def count_macs(jaxpr):
    """Multiply-adds of all matrix products and convolutions in a traced program."""
    macs = 0
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0].aval
        if eqn.primitive.name == 'dot_general':
            (contracted, _), _ = eqn.params['dimension_numbers']
            macs += out.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        elif eqn.primitive.name == 'conv_general_dilated':
            kernel = eqn.invars[1].aval.shape
            macs += out.size * math.prod(kernel[axis] for axis in eqn.params['dimension_numbers'].rhs_spec[1:])
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda value: hasattr(value, 'eqns')):
            macs += count_macs(inner) if hasattr(inner, 'eqns') else 0
    return macs


@pytest.mark.parametrize('group_size', [1, 16])
def test_macs_are_those_of_the_traced_model(group_size):
    # At 97 pixels every tap of every kernel meets the image; on smaller ones the model leaves some out.
    spec = TINY(group_size=group_size)
    for cost in block_costs(spec, 97):
        model, variables, x, _ = shapes_of(spec, 'group', (cost.name,), size=97, batch=1)
        assert count_macs(jax.make_jaxpr(model.apply)(variables, x).jaxpr) == cost.macs, cost.name


def kept_bytes(spec, norm, name, size, batch, dtype):
    """Bytes of the tensors with pixels that `jax.vjp` of one block in training holds on to."""
    model, variables, x, keys = shapes_of(spec, norm, (name,), size, batch, dtype)
    sides = [boundary_shape(spec, block, size)[0] for block in block_names(spec)]
    held = []

    def trace(variables, x, keys):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), variables['params'])

        def run(params, x):
            return model.apply(
                {**variables, 'params': params}, x, train=True, sample_keys=keys, mutable=['batch_stats']
            )

        y, pull, _ = jax.vjp(run, params, x, has_aux=True)
        held.extend((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(pull) if hasattr(leaf, 'shape'))
        return y

    jax.eval_shape(trace, variables, x, keys)
    # Images [batch, H, W, C], or the same with all pixels in rows for a matrix product.
    rows = {batch * side**2 for side in sides}
    images = [
        (shape, kind)
        for shape, kind in held
        if (len(shape) == 4 and shape[0] == batch and shape[1] > 1) or (len(shape) == 2 and shape[0] in rows)
    ]
    return sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in images)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float16])
@pytest.mark.parametrize('norm', NORMS)
def test_kept_is_what_differentiation_keeps(norm, dtype):
    """Exactly, for every kind of block, as it is on an accelerator: a CPU widens the inputs of convolutions."""
    spec, size, batch = TINY(stem_stride=1, survival=0.5), 33, 2
    chosen = {'stem', 'block1a', 'block2a', 'block6b', 'head'}
    with mock.patch.object(jax, 'default_backend', return_value='gpu'):
        for cost in block_costs(spec, size, norm=norm):
            if cost.name in chosen:
                found = kept_bytes(spec, norm, cost.name, size, batch, dtype)
                assert found == batch * cost.kept_bytes(jnp.dtype(dtype).itemsize), cost.name
                chosen.remove(cost.name)
    assert not chosen


def test_everything_but_parameters_grows_with_the_image():
    spec = model_spec('b4')
    half, whole = block_costs(spec, 192), block_costs(spec, 384)
    for field, factor in (('parameters', 1), ('boundary', 4), ('kept', 4), ('kept_fp32', 4)):
        assert total(whole, field) == factor * total(half, field)
    assert 3.99 < total(whole, 'macs') / total(half, 'macs') < 4


def test_what_cannot_be_counted():
    with pytest.raises(ConfigError, match=r"^norm='instance' must be one of group, batch, layer_proxy$"):
        block_costs(TINY(), 32, norm='instance')
    with pytest.raises(ConfigError, match=r'^image_size=0 must be at least 1$'):
        block_costs(TINY(), 0)
