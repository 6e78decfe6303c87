"""Training a part: what is frozen stays to the bit, in every layout; what is not trains as it always did."""

import jax
import numpy as np
import pytest

from efficientnet.errors import ConfigError
from efficientnet.numerics.augment import Coefficients
from efficientnet.numerics.freezing import frozen_names, join, leave_out
from efficientnet.parallel.accumulation import Micro, Stage
from efficientnet.parallel.train_state import unpack_state
from tests.tiny import run_updates, tiny_parts

NAMES = ('block1a/norm/bias', 'block1a/norm/scale', 'block1b/expand/kernel', 'head/classifier/bias', 'head/norm/scale')
STATISTICS = ('block1a/norm/mean', 'head/norm/mean')


@pytest.mark.parametrize(
    ('trainable', 'trained'),
    [
        ('head', {'head/classifier/bias', 'head/norm/scale', 'head/norm/mean'}),
        ('head/classifier', {'head/classifier/bias'}),
        ('*/bias', {'block1a/norm/bias', 'head/classifier/bias', 'block1a/norm/mean'}),
        (' block1b/expand , head/norm/scale', {'block1b/expand/kernel', 'head/norm/scale', 'head/norm/mean'}),
        ('block1*', {*NAMES[:3], 'block1a/norm/mean'}),
        ('', {*NAMES, *STATISTICS}),
        ('*', {*NAMES, *STATISTICS}),
    ],
)
def test_patterns(trainable, trained):
    assert {*NAMES, *STATISTICS} - frozen_names(trainable, NAMES, STATISTICS) == trained


@pytest.mark.parametrize('trainable', ['heads', 'head,block9*', 'block1', 'Head', 'head/classifier/bias/x'])
def test_a_pattern_that_matches_nothing(trainable):
    with pytest.raises(ConfigError, match=r'the blocks block1a, block1b, head') as caught:
        frozen_names(trainable, NAMES, STATISTICS)
    assert repr(trainable.split(',')[-1]) in str(caught.value)


def test_leaving_out_and_joining():
    params = {'stem': {'conv': {'kernel': np.ones(2)}}, 'head': {'bias': np.zeros(3), 'scale': np.ones(1)}}
    part = leave_out(params, {'stem/conv/kernel', 'head/scale'})
    assert part == {'stem': {'conv': {'kernel': None}}, 'head': {'bias': params['head']['bias'], 'scale': None}}
    part['head']['bias'] = np.full(3, 7.0)
    joined = join(part, params)
    assert joined['head']['bias'][0] == 7
    assert joined['stem']['conv']['kernel'] is params['stem']['conv']['kernel']


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf) for path, leaf in leaves}


def states(parts, updates=2):
    """All arrays of the plain state, before and after some updates, by name."""
    before = jax.device_get(parts.init_state())
    # Numbers that arithmetic would not leave alone: a negative zero, an fp16 subnormal.
    rows = before.params.copy()
    rows[0, 0, :2] = np.array([-0.0, 6e-8], rows.dtype)
    before = before._replace(params=rows)
    after, metrics = run_updates(parts, updates, before)
    assert all(found['skipped'] == 0 for found in metrics)
    return (named(unpack_state(state, parts.packings)) for state in (before, after))


def test_frozen_bits():
    """16-bit weights and state with stochastic rounding, decay and averages: only what is trained moves."""
    parts = tiny_parts(
        precision__policy='16.16',
        optimizer__trainable='head,block2a/*_norm',
        optimizer__weight_decay=0.1,
        averaging__update_decay=0.5,
    )
    before, after = states(parts)
    moved = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    trained = {name for name in before if '/head/' in f'/{name}' or ('block2a/' in name and '_norm/' in name)}
    kinds = ('params/', 'optimizer/', 'update_average/')
    # The average is one of the weights before the two that stand out were put there.
    moved -= {'update_average/params/block1a/project/kernel'}
    counts = {name for name in before if 'count' in name}
    assert {name for name in moved if name.startswith(kinds)} - counts == {n for n in trained if n.startswith(kinds)}
    assert {f'params/{name}' for name in parts.packings.params.names} <= before.keys()


CHANGES = {
    'model__norm': 'batch',
    'optimizer__trainable': 'block2a/project*,block3a/spatial_norm,head/classifier',
    'optimizer__name': 'rmsprop',
    'optimizer__epsilon': 1e-3,
    'optimizer__weight_decay': 0.01,
}


@pytest.fixture(scope='module')
def alone():
    return list(states(tiny_parts(3, **CHANGES)))


def test_frozen_batch_norms(alone):
    before, after = alone
    moved = {name for name in before if name.startswith('batch_stats/') and (before[name] != after[name]).any()}
    norms = ('block2a/project_norm', 'block3a/spatial_norm')
    assert moved == {f'batch_stats/{norm}/{which}' for norm in norms for which in ('mean', 'var')}


@pytest.mark.parametrize('recompute', ['none', pytest.param('stage', marks=pytest.mark.slow)])
def test_frozen_alike_in_stages(alone, recompute):
    """A whole stage without anything to train, and one with some, next to the only device."""
    parts = tiny_parts(3, **CHANGES, splits='block2a,head', recompute=recompute)
    for mine, theirs in zip(states(parts), alone, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            np.testing.assert_allclose(value, theirs[name], rtol=2e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(('trainable', 'share'), [('head', 0.6), ('head/classifier', 0.4)])
def test_frozen_leading_blocks_go_forward_only(trainable, share):
    def flops(**changes):
        parts = tiny_parts(3, **changes)
        stage = Stage(parts.model, first=True, last=True, rule=parts.rule)

        def gradients(params, micro):
            loss, pull, _ = stage.vjp({'params': params, 'batch_stats': {}}, None, micro, np.float32(1))
            return pull(jax.numpy.ones_like(loss))

        keys = jax.random.split(jax.random.key(0), 4)
        image, label, mask = np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int32), np.ones(4, np.float32)
        micro = Micro(image, label, mask, keys, Coefficients(None, None))
        return jax.jit(gradients).lower(parts.packings.params.unpacked_shapes(), micro).cost_analysis()['flops']

    assert flops(optimizer__trainable=trainable) < share * flops()
