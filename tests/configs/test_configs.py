"""Every recipe with every argument, against the published values; for some, one weight update is traced.

`pytest -s tests/configs/test_configs.py` shows steps, ends of the schedule and parameters of them all.
"""

import importlib
import itertools
from unittest import mock

import jax
import numpy as np
import pytest

from configs import arguments, finetune, imagenet_b4_g16, imagenet_rmsprop
from efficientnet.loop.assemble import assemble
from efficientnet.loop.programs import compile_update
from efficientnet.loop.settings import check_known, flatten
from efficientnet.model.costs import block_costs
from efficientnet.model.scaling import configured_spec
from efficientnet.parallel.layout import AXIS, make_layout
from efficientnet.parallel.stages import check_splits, parse_splits
from efficientnet.parallel.update import METRICS

EXAMPLES = 1281167

# As published, in the words of the reference.
HEADLINE = {'pod16': (8, 256), 'pod32': (16, 128), 'pod64': (32, 64), 'pod128': (64, 32), 'pod256': (128, 16)}
SIZES = {  # native and half resolution, mixup α, probability that cutmix leaves a micro-batch alone, dropout
    'b0': (224, 160, 0.1, 1.0, 0.2),
    'b1': (240, 176, 0.1, 0.95 * 1.55 - 0.96, 0.2),
    'b2': (260, 196, 0.1, 0.90 * 1.55 - 0.96, 0.3),
    'b3': (300, 204, 0.2, 0.90 * 1.55 - 0.96, 0.3),
    'b4': (380, 252, 0.2, 0.3575, 0.4),
    'b5': (456, 328, 0.2, 0.80 * 1.55 - 0.96, 0.4),
}
RMSPROP = """
b0 g1 native 12x8 2 3b | b1 g1 native 12x16 4 2b,4a,5c | b2 g1 native 12x16 4 2b,4a,5d
b3 g1 native 6x32 4 2b,4a,5d | b4 g1 native 3x64 4 2b,4b,6c | b5 g1 native 2x96 4 2c,4a,5g
b0 g16 native 12x8 2 3b | b1 g16 native 8x12 2 4b | b2 g16 native 12x16 4 2b,4a,5d
b3 g16 native 8x24 4 2b,4b,5e | b4 g16 native 4x48 4 2c,4c,6a | b5 g16 native 2x96 4 2e,4f,6e
b0 g16 half 24x4 2 4b | b1 g16 half 24x8 4 2b,4a,5d | b2 g16 half 24x8 4 2b,4a,5d
b3 g16 half 12x16 4 2b,4b,5e | b4 g16 half 8x24 4 2c,4c,6a | b5 g16 half 3x64 4 2e,4e,6c
"""
PARAMETERS = {
    'b0': (5288548, 5145556, 5913796),
    'b1': (7794184, 7420648, 8332120),
    'b2': (9109994, 8608754, 9504122),
    'b3': (12233232, 11480528, 12590896),
    'b4': (19341616, 17943552, 19328168),
    'b5': (30389784, 27697496, 28715320),
}
GROUPS = {'g1': (1, 6), 'g4': (4, 5), 'g16': (16, 4)}
NORMS = ('group', 'batch', 'layer_proxy')

RUNS = [
    *((imagenet_b4_g16, system) for system in (*HEADLINE, 'gpu8')),
    *((imagenet_rmsprop, ','.join(words)) for words in itertools.product(SIZES, GROUPS, NORMS, ('native', 'half'))),
    *((finetune, ','.join(words)) for words in itertools.product(SIZES, GROUPS, NORMS, ('head', 'block7', 'block6'))),
]


def flat(recipe, argument):
    return flatten(recipe.get_config(argument))


def layout_of(config, devices):
    return make_layout(
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        replicas=config.replicas,
        splits=() if config.splits == 'auto' else parse_splits(config.splits),
        devices=devices,
        recompute=config.recompute,
    )


def steps_of(config):
    return int(np.floor(EXAMPLES * config.epochs / config.global_batch))


def test_every_recipe_of_every_argument():
    """Known fields, a network whose groups divide, splits at blocks it has, a batch that divides; all 276 of them."""
    print(f'\n{"recipe":43}{"parameters":>12}{"steps":>9}{"peak rate":>12}  devices')
    for recipe, argument in RUNS:
        config = recipe.get_config(argument)
        check_known(config)
        spec = configured_spec(config.model, 1000)
        layout = layout_of(config, 64 if recipe is finetune else 256)  # that takes all there are
        check_splits(spec, layout.splits)
        assert layout.global_batch == config.global_batch
        parameters = sum(cost.parameters for cost in block_costs(spec, config.image_size, norm=config.model.norm))
        if config.model.norm != 'layer_proxy':
            assert parameters == PARAMETERS[spec.variant][(1, 4, 16).index(config.model.group_size)], argument
        name = recipe.__name__.removeprefix('configs.')
        peak = config.optimizer.rate_per_example * config.global_batch
        print(f'{name}:{argument:<{42 - len(name)}}{parameters:12,}{steps_of(config):9,}{peak:12.6f}  {layout.devices}')


@pytest.mark.parametrize('system', [*HEADLINE, 'gpu8'])
def test_headline(system):
    config = imagenet_b4_g16.get_config(system)
    layout = layout_of(config, 256)
    if system in HEADLINE:
        assert (layout.replicas, layout.accumulation) == HEADLINE[system]
        assert (layout.micro_batch, layout.splits) == (3, ('block4a',))
        assert layout.devices == int(system.removeprefix('pod'))
    else:
        assert (layout.replicas, layout.stages) == (8, 1)
    spec = configured_spec(config.model, 1000)
    assert (spec.variant, spec.dropout, config.image_size, steps_of(config)) == ('b4', 0.4, 380, 72983)
    expected = {
        'dataset': 'imagenet2012',
        'epochs': 350,
        'global_batch': 6144,
        'pipeline': 'grouped',
        'recompute': 'stage',
        'input.prefetch': 3,
        'model.group_size': 16,
        'model.expand_ratio': 4,
        'model.norm': 'group',
        'model.norm_groups': 4,
        'model.norm_layout': 'strided',
        'model.norm_epsilon': 1e-3,
        'model.survival': 0.8,
        'model.padding': 'same',
        'precision.policy': '16.16',
        'precision.rounding': 'stochastic',
        'precision.loss_scale': 'static',
        'precision.initial_loss_scale': 128,
        'optimizer.name': 'lars',
        'optimizer.rate_per_example': 2**-9.5,
        'optimizer.momentum': 0.885,
        'optimizer.weight_decay': 2.5e-6,
        'optimizer.trust_coefficient': 0.001,
        'optimizer.epsilon': 0,
        'optimizer.nesterov': False,
        'optimizer.trainable': '',
        'schedule.kind': 'polynomial',
        'schedule.power': 2,
        'schedule.end_ratio': 1e-5,
        'schedule.warmup': '70 epochs',
        'augment.crop': 'distorted',
        'augment.flip': True,
        'augment.mean': [123.68, 116.78, 103.94],
        'augment.std': [1, 1, 1],
        'augment.label_smoothing': 0.1,
        'augment.smoothing_over': 'others',
        'augment.mixup_alpha': 0.2,
        'augment.cutmix_probability': 0.6425,
        'averaging.epoch_decay': 0.97,
        'averaging.update_decay': 0,
        'init_from': '',
    }
    given = flatten(config)
    assert {name: given[name] for name in expected} == expected


@pytest.mark.parametrize('variant', SIZES)
def test_rmsprop(variant):
    native, half, alpha, alone, dropout = SIZES[variant]
    published = dict(_published(variant))
    for group, norm, resolution in itertools.product(GROUPS, NORMS, ('native', 'half')):
        config = imagenet_rmsprop.get_config(','.join((variant, group, norm, resolution)))
        given, layout = flatten(config), layout_of(config, 16)
        assert configured_spec(config.model, 1000).dropout == dropout
        assert 1 - given['augment.cutmix_probability'] == pytest.approx(alone)
        expected = {
            'image_size': native if resolution == 'native' else half,
            'epochs': 350,
            'global_batch': 768,
            'pipeline': 'grouped',
            'model.group_size': GROUPS[group][0],
            'model.expand_ratio': GROUPS[group][1],
            'model.norm': norm,
            'model.norm_groups': 4,
            'model.batch_norm_decay': 0.97,
            'model.survival': 0.8,
            'precision.policy': '16.32',
            'optimizer.name': 'rmsprop',
            'optimizer.rate_per_example': 2**-14,
            'optimizer.rms_decay': 0.953125,
            'optimizer.momentum': 0.9,
            'optimizer.epsilon': 1e-3,
            'optimizer.weight_decay': 1e-5,
            'schedule.kind': 'exponential',
            'schedule.decay_rate': 0.97,
            'schedule.warmup': '5 epochs',
            'augment.label_smoothing': 0.1,
            'augment.mixup_alpha': alpha,
            'averaging.epoch_decay': 0.97,
        }
        assert {name: given[name] for name in expected} == expected
        assert layout.devices == 16
        if norm == 'batch':
            assert (layout.stages, layout.micro_batch, given['model.batch_norm_sync']) == (1, 6, True)
        else:
            found = layout.micro_batch, layout.accumulation, layout.splits
            assert found == published.get((group, resolution), published['g1', 'native'])


def _published(variant):
    rows = [row.split() for line in RMSPROP.strip().splitlines() for row in line.split('|')]
    for name, group, resolution, batches, shards, splits in rows:
        if name == variant:
            micro_batch, accumulation = map(int, batches.split('x'))
            blocks = tuple(f'block{split}' for split in splits.split(','))
            assert len(blocks) + 1 == int(shards)
            assert micro_batch * accumulation * (16 // int(shards)) == 768
            yield (group, resolution), (micro_batch, accumulation, blocks)


@pytest.mark.parametrize('part', ['head', 'block7', 'block6'])
def test_finetune(part):
    for variant, group, norm in itertools.product(SIZES, GROUPS, NORMS):
        given = flat(finetune, f'{part},{variant},{group},{norm}')
        before = flat(imagenet_rmsprop, f'{variant},{group},{norm},half')
        trained = {'head': 'head', 'block7': 'head,block7*', 'block6': 'head,block7*,block6*'}[part]
        expected = {
            'init_from': f'runs/{variant}-{group}-{norm}-half',
            'init_weights': 'averaged',
            'image_size': SIZES[variant][0],
            'epochs': 2,
            'global_batch': 512,
            'optimizer.trainable': trained,
            'optimizer.rms_decay': 1 - 512 / 2**14,
            'schedule.kind': 'cosine',
            'schedule.end_ratio': 0,
            'augment.crop': 'none',
            'augment.flip': False,
        }
        assert {name: given[name] for name in expected} == expected
        assert given['image_size'] % 32 == before['image_size'] % 32
        same = [name for name in given if name.startswith(('model.', 'precision.')) and name[6:] != 'batch_norm_sync']
        same += ['augment.mixup_alpha', 'augment.cutmix_probability', 'augment.label_smoothing', 'augment.mean']
        assert {name: given[name] for name in same} == {name: before[name] for name in same}


@pytest.mark.parametrize(
    ('recipe', 'argument'),
    [
        (imagenet_b4_g16, 'pod48'),
        (imagenet_b4_g16, 'pod16,pod32'),
        (imagenet_rmsprop, 'b6'),
        (imagenet_rmsprop, 'b2,g8'),
        (imagenet_rmsprop, 'b2,b2'),
        (imagenet_rmsprop, 'b2,g16,group,halfway'),
        (finetune, 'b2,block5'),
        (finetune, 'b2,half'),
    ],
)
def test_a_bad_argument_lists_what_is_possible(recipe, argument):
    with pytest.raises(ValueError, match='is not understood; behind the colon stand words of') as caught:
        recipe.get_config(argument)
    first = 'pod16|pod32|pod64|pod128|pod256|gpu8|runlocal' if recipe is imagenet_b4_g16 else 'b0|b1|b2|b3|b4|b5, g16|'
    assert str(caught.value).startswith(repr(argument))
    assert first in str(caught.value)


def test_words_in_any_order():
    assert arguments.parse('c,a', ('a', 'b'), ('d', 'c')) == ('a', 'c')
    assert arguments.parse('', ('a', 'b'), ('d', 'c')) == ('a', 'd')
    orders = [imagenet_rmsprop.get_config(','.join(words)) for words in itertools.permutations(['b1', 'g4', 'half'])]
    assert all(config == orders[0] for config in orders)


class ImageNet:
    """A data set of ImageNet's size without any images."""

    name, num_examples, image_shape, label_sets = 'imagenet', EXAMPLES, None, False
    classes = tuple(map(str, range(1000)))


class Devices:
    """In the place of a Grid of more devices than there are: traces where that one compiles."""

    def __init__(self, layout):
        self.layout, self.devices = layout, [None] * layout.devices

    def compile(self, function, *shapes, **options):
        trace = jax.make_jaxpr(function, axis_env=[(AXIS, self.layout.devices)], return_shape=True)
        return trace(*shapes)[1]


def assembled(recipe, argument, devices, depth):
    with (
        mock.patch('input_pipeline.open_source', return_value=ImageNet()),
        mock.patch('efficientnet.loop.assemble.Grid', Devices),
        mock.patch.object(jax, 'device_count', return_value=devices),
    ):
        config = importlib.import_module(recipe.__name__).get_config(argument)
        config.model.depth = depth
        return assemble(config)


def rates(parts, *steps):
    return [float(parts.rule.learning_rate(np.int32(step))) for step in steps]


TRACED = [
    (imagenet_b4_g16, 'pod256', 256),
    (finetune, 'b0,head', 64),
]
ONE_BLOCK = 0.1  # in each of the seven stages; the recipes say 0, the variant's own depth
ALSO_TRACED = [
    *TRACED,
    (imagenet_b4_g16, 'gpu8', 8),
    (imagenet_rmsprop, 'b0,g1,batch,half', 16),
    (imagenet_rmsprop, 'b0,g16,layer_proxy,half', 16),
    (imagenet_rmsprop, 'b1,g4,batch', 16),
    (imagenet_rmsprop, 'b2,g1,group', 16),
    (imagenet_rmsprop, 'b3,g16,group,half', 16),
    (imagenet_rmsprop, 'b4,g4,layer_proxy', 16),
    (imagenet_rmsprop, 'b5,g16,group', 16),
    (finetune, 'b2,g4,batch,block6', 16),
]


@pytest.mark.parametrize(
    ('recipe', 'argument', 'devices', 'depth'),
    [*((*run, ONE_BLOCK) for run in TRACED), *(pytest.param(*run, 0, marks=pytest.mark.slow) for run in ALSO_TRACED)],
    ids=lambda value: getattr(value, '__name__', None),  # a recipe's
)
def test_one_update_is_traced(recipe, argument, devices, depth):
    """All devices there would be, nothing compiled: every field is read, every shape fits."""
    parts = assembled(recipe, argument, devices, depth)
    layout = parts.grid.layout
    after, metrics = compile_update(parts)
    before = jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), parts.state_shapes())
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == before
    assert metrics.shape == (len(METRICS),)
    spec = configured_spec(parts.config.model, 1000)
    costs = block_costs(spec, parts.config.image_size, norm=parts.config.model.norm)
    assert parts.packings.params.size == sum(cost.parameters for cost in costs)
    assert layout.devices == devices
    total = parts.total_steps
    first, last = rates(parts, 1, total)
    print(f'\n{argument}: {parts.packings.params.size:,} parameters, {total:,} steps, rates {first:.3e} … {last:.3e}')
    if recipe is imagenet_b4_g16:
        peak = 8.48528137
        assert total == 72983
        # Warm-up over 14,596 updates, then (peak − end)(1 − (n − W) / (T − W))² + end.
        middle = (14596 + 72983) // 2
        left = (72983 - middle) / (72983 - 14596)
        expected = [peak / 14596, peak, peak * (1 - 1e-5) * left**2 + peak * 1e-5, peak * 1e-5]
        np.testing.assert_allclose(rates(parts, 1, 14596, middle, 72983), expected, rtol=1e-5)
    elif recipe is imagenet_rmsprop:
        assert total == 583865
        expected = [0.046875 * 0.97**2, 0.046875 * 0.97**146]
        np.testing.assert_allclose(rates(parts, 8340, total), expected, rtol=1e-4)
    else:
        # The reference's own: warm-up of 5 epochs and cosine over 2, both from the first update.
        n = np.arange(1, total + 1)
        reference = 0.25 * n / (2.5 * total) * (1 + np.cos(np.pi * n / total)) / 2
        ours = jax.vmap(parts.rule.learning_rate)(n.astype(np.int32))
        assert np.abs(ours - reference).max() < reference.max() / 8
        assert parts.config.replicas == devices
        trained = {name.split('/')[0] for name in set(parts.packings.params.names) - parts.rule.frozen}
        assert all(
            name.startswith(('head', 'block7', 'block6')[: 3 if 'block6' in argument else 1]) for name in trained
        )
        assert 'head' in trained
