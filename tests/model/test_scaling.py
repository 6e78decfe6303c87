import dataclasses
import json
import math
import re

import pytest

from efficientnet.errors import ConfigError
from efficientnet.model.scaling import VARIANTS, block_names, boundary_shape, model_spec, round_width


def test_b4_g16_is_the_reference_network():
    spec = model_spec('b4', group_size=16)
    assert (spec.stem_channels, spec.head_channels, spec.dropout, VARIANTS['b4'].resolution) == (48, 1792, 0.4, 380)
    last_of_stage = {block.name[5]: block for block in spec.blocks}
    assert [b.out_channels for b in last_of_stage.values()] == [24, 32, 56, 112, 160, 272, 448]
    assert [sum(b.name[5] == s for b in spec.blocks) for s in '1234567'] == [2, 4, 4, 6, 6, 8, 2]
    assert len(spec.blocks) == 32
    by_name = {block.name: block for block in spec.blocks}
    # 24 channels are one group of 24, not groups of 16
    assert (by_name['block1b'].mid_channels, by_name['block1b'].groups) == (24, 1)
    assert (by_name['block1a'].mid_channels, by_name['block1a'].groups) == (48, 3)
    assert (by_name['block7b'].mid_channels, by_name['block7b'].groups) == (1792, 112)
    assert (by_name['block2a'].se_channels, by_name['block4a'].se_channels) == (6, 14)


@pytest.mark.parametrize('variant', VARIANTS)
def test_channels_and_names_follow_on(variant):
    spec = model_spec(variant, group_size=1)
    names = block_names(spec)
    assert names[0] == 'stem'
    assert names[1] == 'block1a'
    assert names[-1] == 'head'
    assert len(set(names)) == len(names) == len(spec.blocks) + 2
    channels = spec.stem_channels
    for block in spec.blocks:
        assert block.in_channels == channels
        assert block.groups == block.mid_channels
        assert block.residual == (block.stride == 1 and block.in_channels == block.out_channels)
        channels = block.out_channels
    assert math.prod(block.stride for block in spec.blocks) == 16


@pytest.mark.parametrize('multiplier', [0.1, 0.25, 0.33, 0.5, 0.7, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0])
@pytest.mark.parametrize('channels', [16, 24, 32, 40, 80, 112, 192, 320, 1280])
def test_round_width(channels, multiplier):
    rounded = round_width(channels, multiplier)
    assert rounded % 8 == 0
    assert rounded >= max(8, 0.9 * channels * multiplier)
    # nearest multiple of 8, or the one above where the nearest loses more than 10 %
    assert rounded - max(channels * multiplier, 8) <= 8
    below = rounded - 8
    assert below < 8 or abs(below - channels * multiplier) >= 4 or below < 0.9 * channels * multiplier


def test_head_width_has_no_floor():
    assert model_spec('b0', width=0.5, group_size=1).head_channels == 640


def test_survival_falls_linearly_from_one():
    spec = model_spec('b0', survival=0.8)
    count = len(spec.blocks)
    assert spec.blocks[0].survival == 1
    assert [b.survival for b in spec.blocks] == pytest.approx([1 - 0.2 * b / count for b in range(count)])
    assert all(b.survival == 1 for b in model_spec('b0', survival=1.0).blocks)


def test_overrides():
    spec = model_spec('b0', width=0.5, depth=0.5, classes=10, stem_stride=1, dropout=0.0, expand_ratio=2)
    assert [block.name for block in spec.blocks] == [
        'block1a', 'block2a', 'block3a', 'block4a', 'block4b',
        'block5a', 'block5b', 'block6a', 'block6b', 'block7a',
    ]  # fmt: skip
    assert spec.blocks[1].mid_channels == 2 * spec.blocks[1].in_channels
    assert (spec.classes, spec.stem_stride, spec.dropout) == (10, 1, 0.0)
    assert model_spec('b0', group_size=4).blocks[1].mid_channels == 16 * 5


def test_strides_of_the_stages():
    spec = model_spec('b0', depth=0.5, stem_stride=1, strides=[1, 2, 1, 2, 1, 1, 1])
    assert [block.name for block in spec.blocks if block.stride == 2] == ['block2a', 'block4a']
    assert boundary_shape(spec, 'head', 32) == (8, 8, 320)
    by_name = {block.name: block for block in model_spec('b0', strides=(1, 2, 1, 2, 2, 1, 1)).blocks}
    assert (by_name['block5a'].stride, by_name['block5b'].stride) == (2, 1)
    assert model_spec('b0', strides=(1, 2, 2, 2, 1, 2, 1)) == model_spec('b0')


@pytest.mark.parametrize(
    'strides', [(), (1, 2, 2, 2, 1, 2), (1, 2, 2, 2, 1, 2, 1, 1), (1, 2, 3, 2, 1, 2, 1), (0,) * 7, (1.0,) * 7]
)
def test_strides_out_of_range(strides):
    with pytest.raises(ConfigError, match=rf'^strides={re.escape(str(strides))} must be 7 numbers, each 1 or 2'):
        model_spec('b0', strides=strides)


def test_b6_in_groups_of_16_names_block_and_remedy():
    with pytest.raises(ConfigError, match=r'group_size=16.*block1a of b6 has 56') as error:
        model_spec('b6', group_size=16)
    assert '\n' not in str(error.value)
    proposed = json.loads(str(error.value).split('fit: ')[1])
    assert 16 not in proposed
    assert {1, 4, 8} <= set(proposed)
    for size in proposed:
        model_spec('b6', group_size=size, expand_ratio=4)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('group_size', 0), ('group_size', 2.0), ('expand_ratio', 0), ('width', 0.0), ('width', math.nan),
        ('width', math.inf), ('depth', -1.0), ('depth', 7.0), ('classes', 0), ('stem_stride', 3),
        ('dropout', 1.0), ('dropout', -0.1), ('survival', 0.0), ('survival', 1.1),
    ],
)  # fmt: skip
def test_out_of_range(field, value):
    with pytest.raises(ConfigError, match=f'^{field}={value}'):
        model_spec('b0', **{field: value})


def test_unknown_variant_and_group_size_without_ratio():
    with pytest.raises(ConfigError, match=r"variant='b8'.*b0, b1"):
        model_spec('b8')
    with pytest.raises(ConfigError, match=r'expand_ratio.*group_size=8'):
        model_spec('b0', group_size=8)
    assert model_spec('b0', group_size=8, expand_ratio=4).blocks[0].groups == 4


def test_spec_is_frozen_and_hashable():
    spec = model_spec()
    assert hash(spec) == hash(model_spec())
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.classes = 10


def test_boundary_shape():
    spec = model_spec('b4')
    assert boundary_shape(spec, 'stem', 380) == (380, 380, 3)
    assert boundary_shape(spec, 'block4a', 380) == (48, 48, 56)
    assert boundary_shape(spec, 'head', 380) == (12, 12, 448)
    assert boundary_shape(model_spec('b0', stem_stride=1), 'head', 33) == (3, 3, 320)
    with pytest.raises(ConfigError, match='block8a'):
        boundary_shape(spec, 'block8a', 380)
