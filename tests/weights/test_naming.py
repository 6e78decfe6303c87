import jax
import numpy as np
import pytest

from efficientnet.errors import ConfigError
from efficientnet.weights import architectures, naming
from efficientnet.weights.trained import shapes_of
from tests.tiny import tiny_trained


@pytest.fixture(scope='module')
def variables():
    return tiny_trained(model__norm='batch', model__variant='b0').variables


@pytest.mark.parametrize('scheme', naming.SCHEMES)
def test_there_and_back_is_the_same(variables, scheme):
    theirs = naming.to_theirs(variables, scheme)
    assert naming.detect(theirs) == (scheme, '')
    back = naming.to_ours(theirs, shapes_of(variables), scheme)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    assert len(set(theirs)) == len(theirs) == len(jax.tree.leaves(variables))


def test_names_and_axes_as_they_are_known(variables):
    """A few of each library's names, written down by hand, with one number of each array."""
    block1, block2 = (variables['params'][name] for name in ('block1a', 'block2a'))
    stats = variables['batch_stats']['block2a']['spatial_norm']
    i, j, c, o = 2, 0, 1, 3
    known = {
        'timm': {
            'blocks.0.0.conv_dw.weight': (block1['spatial']['kernel'][i, j, c, o], (o, c, i, j)),
            'blocks.0.0.conv_pw.weight': (block1['project']['kernel'][0, 0, c, o], (o, c, 0, 0)),
            'blocks.1.0.se.conv_reduce.weight': (block2['se_reduce']['kernel'][c, 1], (1, c, 0, 0)),
            'blocks.1.0.bn2.running_var': (stats['var'][c], (c,)),
            'classifier.weight': (variables['params']['head']['classifier']['kernel'][c, o], (o, c)),
        },
        'torchvision': {
            'features.1.0.block.0.0.weight': (block1['spatial']['kernel'][i, j, c, o], (o, c, i, j)),
            'features.1.0.block.1.fc1.bias': (block1['se_reduce']['bias'][0], (0,)),
            'features.2.0.block.3.0.weight': (block2['project']['kernel'][0, 0, c, o], (o, c, 0, 0)),
            'features.2.0.block.1.1.running_var': (stats['var'][c], (c,)),
        },
        'efficientnet_pytorch': {
            '_blocks.0._depthwise_conv.weight': (block1['spatial']['kernel'][i, j, c, o], (o, c, i, j)),
            '_blocks.1._bn1.running_var': (stats['var'][c], (c,)),
            '_fc.bias': (variables['params']['head']['classifier']['bias'][o], (o,)),
        },
        'tensorflow': {
            'blocks_0/conv2d/kernel': (block1['project']['kernel'][0, 0, c, o], (0, 0, c, o)),
            'blocks_1/conv2d_1/kernel': (block2['project']['kernel'][0, 0, c, o], (0, 0, c, o)),
            'blocks_0/depthwise_conv2d/depthwise_kernel': (block1['spatial']['kernel'][i, j, c, o], (i, j, o, c)),
            'blocks_1/se/conv2d/kernel': (block2['se_reduce']['kernel'][c, 1], (0, 0, c, 1)),
            'blocks_1/tpu_batch_normalization_1/moving_variance': (stats['var'][c], (c,)),
            'stem/tpu_batch_normalization/gamma': (variables['params']['stem']['norm']['scale'][c], (c,)),
        },
    }
    for scheme, places in known.items():
        theirs = naming.to_theirs(variables, scheme)
        for name, (value, index) in places.items():
            assert theirs[name][index] == value, (scheme, name)


def test_averages_and_optimizer_state_of_tensorflow(variables):
    theirs = naming.to_theirs(variables, 'tensorflow')
    raw = {f'efficientnet-b0/{name}': array for name, array in theirs.items()}
    averages = {f'{name}{naming.AVERAGE}': array + 1 for name, array in raw.items()}
    others = {'global_step': np.int64(3), 'efficientnet-b0/stem/conv2d/kernel/RMSProp_1': np.zeros(3)}
    found = raw | averages | others
    scheme, prefix = naming.detect(found)
    assert (scheme, prefix) == ('tensorflow', 'efficientnet-b0/')
    shapes = shapes_of(variables)
    for suffix, more in (('', 0), (naming.AVERAGE, 1)):
        got = naming.to_ours(found, shapes, scheme, prefix, suffix)
        jax.tree.map(lambda a, b, more=more: np.testing.assert_array_equal(a, b + more), got, variables)


def test_every_tensor_is_accounted_for(variables):
    theirs = naming.to_theirs(variables, 'timm')
    theirs['classifier.weight'] = theirs['classifier.weight'][:, :-1]
    theirs['extra.weight'] = np.zeros((2, 3))
    theirs['bn1.num_batches_tracked'] = np.int64(1)
    del theirs['blocks.1.0.se.conv_expand.bias']
    with pytest.raises(ConfigError) as error:
        naming.to_ours(theirs, shapes_of(variables), 'timm')
    for words in (
        '1 missing: blocks.1.0.se.conv_expand.bias (',
        '1 unexpected: extra.weight (2, 3)',
        '1 of another shape: classifier.weight (10, 319), not (10, 320)',
    ):
        assert words in str(error.value)


def test_tensors_of_something_else():
    with pytest.raises(ConfigError, match=r'not the tensors of an EfficientNet.*layer1\.0\.conv1\.weight'):
        naming.detect(['layer1.0.conv1.weight', 'fc.bias'])


@pytest.mark.parametrize(
    ('scheme', 'name', 'expected'),
    [
        ('timm', 'efficientnet_b0', ('symmetric', 1e-5, 224, 0.875, 123.675)),
        ('timm', 'efficientnet_b3.ra2_in1k', ('symmetric', 1e-5, 288, 0.904, 123.675)),
        ('timm', 'tf_efficientnet_b3', ('same', 1e-3, 300, 0.904, 123.675)),
        ('timm', 'tf_efficientnet_b4.ap_in1k', ('same', 1e-3, 380, 0.922, 127.5)),
        ('timm', 'tf_efficientnet_b4_ap', ('same', 1e-3, 380, 0.922, 127.5)),
        ('efficientnet_pytorch', 'efficientnet_b1_ap', ('same', 1e-3, 240, 0.882, 127.5)),
        ('tensorflow', 'efficientnet-b1_ap', ('same', 1e-3, 240, 0.882, 127.5)),
        ('timm', 'tf_efficientnet_lite2', ('same', 1e-3, 260, 0.89, 127.5)),
        ('torchvision', 'efficientnet_b4', ('symmetric', 1e-5, 380, 0.99, 123.675)),
        ('torchvision', 'efficientnet_b7', ('symmetric', 1e-3, 600, 1.0, 123.675)),
        ('tensorflow', 'efficientnet-b1', ('same', 1e-3, 240, 0.882, 123.675)),
        ('efficientnet_pytorch', 'efficientnet_lite0', ('same', 1e-3, 224, 0.875, 127.0)),
    ],
)
def test_conventions_come_with_the_name(scheme, name, expected):
    fields = architectures.fields_of(scheme, name)
    names = ('model.padding', 'model.norm_epsilon', 'image_size', 'evaluation.crop_ratio')
    found = [*(fields[own] for own in names), fields['augment.mean'][0]]
    assert found[0] == expected[0]
    assert found[1:] == pytest.approx(list(expected[1:]), rel=1e-3)


def test_names_in_file_names():
    find = architectures.find_name
    assert find('efficientnet-lite0-57934424') == 'efficientnet_lite0'
    assert find('efficientnet_b4_ra2_320-7eb33cd5') == 'efficientnet_b4'
    assert find('', 'model', 'tf_efficientnet_b0.aa_in1k') == 'tf_efficientnet_b0'
    assert find('tf_efficientnet_b0.ap_in1k') == find('tf_efficientnet_b0_ap-f262efe1') == 'tf_efficientnet_b0_ap'
    assert find('adv-efficientnet-b0-b64d5a18') == 'efficientnet_b0_ap'
    assert find('tf_efficientnet_b0_aa-827b6e33') == find('tf_efficientnet_b0_apart') == 'tf_efficientnet_b0'
    assert find('efficientnet_b3_g8_gn') == 'efficientnet_b3_g8_gn'
    assert find('resnet50', 'efficientnetv2_s') is None


@pytest.mark.parametrize(
    ('scheme', 'name'),
    [
        ('timm', 'efficientnet_b8'),
        ('timm', 'efficientnet_b10'),
        ('timm', 'efficientnet_b0_nonsense'),
        ('timm', 'efficientnet_b0_g8_gnx'),
        ('timm', 'efficientnet_b1_gn'),
        ('timm', 'efficientnet_b0_ap'),
        ('torchvision', 'efficientnet_b0_ap'),
        ('torchvision', 'efficientnet_lite0'),
    ],
)
def test_unknown_architectures(scheme, name):
    with pytest.raises(ConfigError, match=f"--architecture='{name}' is not known"):
        architectures.fields_of(scheme, name)
