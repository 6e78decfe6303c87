"""Weights from elsewhere: the same logits as the library they come from, and one line for what does not fit."""

import functools
import pickle

import jax
import numpy as np
import pytest

from efficientnet.convert import convert
from efficientnet.errors import ConfigError, RunError
from efficientnet.weights import architectures, naming
from efficientnet.weights.class_names import imagenet
from efficientnet.weights.dataset_facts import DatasetFacts
from efficientnet.weights.trained import Trained, read_run, variable_shapes, write_run
from experiments.timm_import import import_timm
from tests.tiny import tiny_trained

torch = pytest.importorskip('torch')
try:
    timm = import_timm()
except RunError as missing:
    pytest.skip(str(missing), allow_module_level=True)

SLOW = pytest.mark.slow


def images_of(size):
    """Two normalised random images, NHWC."""
    return np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)


def run(network, size):
    return network(torch.from_numpy(images_of(size).transpose(0, 3, 1, 2)))


def randomised(network, size, seed=0):
    """The network with every parameter drawn anew, so that none is 0 or 1, and the statistics of `images_of(size)`.

    Under other statistics activations grow from layer to layer, and their rounding with them.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.rand, generator=generator)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith('num_batches_tracked'):
                continue
            if tensor.ndim > 1:
                fan = tensor[0].numel()
                values = torch.randn(tensor.shape, generator=generator) * (2 / fan) ** 0.5
            elif name.endswith(('running_var', 'weight')):
                values = 0.5 + draw(tensor.shape)
            else:
                values = 0.6 * draw(tensor.shape) - 0.3
            tensor.copy_(values)
        network.eval()  # or the statistics would be those of branches dropped at random
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
                module.train()
        run(network, size)
    return network.eval()


def saved(network, path):
    torch.save(network.state_dict(), path)
    return path


def logits(workdir, images):
    """Of normalised images NHWC, by the run."""
    trained = read_run(workdir)
    model = trained.model().clone(conv_method='native')  # compiles fastest
    return np.asarray(jax.jit(model.apply)(trained.variables, images))


def compare(network, workdir, size):
    with torch.no_grad():
        want = run(network, size).numpy()
    got = logits(workdir, images_of(size))
    assert np.std(want) > 0.05
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def group_norm(**options):
    return functools.partial(timm.layers.GroupNormAct, **options)


NETWORKS = {  # what timm is asked for, what convert is told
    'efficientnet_b0': ({}, {}),
    'tf_efficientnet_b0': ({}, {}),
    'efficientnet_b1': ({}, {}),
    'efficientnet_b2': ({}, {}),
    'efficientnet_b3': ({}, {}),
    'efficientnet_b4': ({}, {}),
    'efficientnet_lite0': ({}, {}),
    'tf_efficientnet_lite2': ({}, {}),
    'efficientnet_b0_gn': ({}, {}),
    'efficientnet_b0_g8_gn': ({}, {}),
    'efficientnet_b0_g16_evos': ({}, {}),
    'efficientnet_b3_g8_gn': ({}, {}),
}
G16_GN = {'model.group_size': 16, 'model.norm': 'group', 'model.norm_layout': 'contiguous'}


@SLOW
@pytest.mark.parametrize('another', [False, True], ids=['native', 'another'])
@pytest.mark.parametrize('name', NETWORKS)
def test_logits_are_timms(name, another, tmp_path):
    network = timm.create_model(name)
    size = 97 if another else network.default_cfg['input_size'][-1]
    randomised(network, size)
    convert(saved(network, tmp_path / f'{name}.pth'), tmp_path / 'run')
    compare(network, tmp_path / 'run', size)


@SLOW
@pytest.mark.parametrize('size', [224, 130])
def test_logits_of_groups_of_16_with_group_norm_are_timms(size, tmp_path):
    make = functools.partial(timm.models.efficientnet._gen_efficientnet, 'efficientnet_b0', group_size=16)
    network = randomised(make(norm_layer=group_norm(num_groups=4)), size)
    path = saved(network, tmp_path / 'efficientnet_b0.pth')
    convert(path, tmp_path / 'run', overrides=G16_GN)
    compare(network, tmp_path / 'run', size)


@SLOW
@pytest.mark.parametrize('name', ['efficientnet_b0', 'efficientnet_b5'])
def test_logits_are_torchvisions(name, tmp_path):
    import torchvision

    network = randomised(getattr(torchvision.models, name)(weights=None), 100)
    convert(saved(network, tmp_path / f'{name}.pth'), tmp_path / 'run')
    compare(network, tmp_path / 'run', 100)


@pytest.mark.parametrize('name', ['efficientnet_b1', 'tf_efficientnet_lite2', 'efficientnet_b3_g8_gn'])
def test_names_and_shapes_are_timms(name):
    with torch.device('meta'):
        theirs = {own: tuple(leaf.shape) for own, leaf in timm.create_model(name).state_dict().items()}
    config = tiny_trained().config
    with config.unlocked():
        config.model.width = config.model.depth = 0.0
        config.model.stem_stride = 2
    fields = architectures.fields_of('timm', name)
    config.update_from_flattened_dict(fields)
    shapes = variable_shapes(Trained(config, DatasetFacts(tuple(imagenet()), None), {}, 'raw', 0, {}))
    places = naming.entries(shapes, 'timm')
    ours = {place.name: place.their_shape(shapes[own]) for own, place in places.items()}
    assert ours == {own: shape for own, shape in theirs.items() if not own.endswith('num_batches_tracked')}


@pytest.fixture(scope='module')
def small():
    """timm's network of the width and depth of tests/tiny.py's, and what to tell convert of it."""
    make = timm.models.efficientnet._gen_efficientnet
    network = randomised(make('efficientnet_b0', channel_multiplier=0.25, depth_multiplier=0.1, num_classes=7), 33)
    return network, {'model.width': 0.25, 'model.depth': 0.1, 'image_size': 32}


@pytest.fixture
def names(tmp_path):
    (tmp_path / 'names.txt').write_text(''.join(f'thing {number}\n' for number in range(7)))
    return tmp_path / 'names.txt'


def test_a_small_network_of_timms(small, names, tmp_path):
    network, overrides = small
    path = saved(network, tmp_path / 'efficientnet_b0.pth')
    trained = convert(path, tmp_path / 'run', classes=names, overrides=overrides)
    assert trained.dataset.classes == tuple(f'thing {number}' for number in range(7))
    compare(network, tmp_path / 'run', 33)
    nested = tmp_path / 'efficientnet_b0_last.pth'
    torch.save({'epoch': 3, 'state_dict': {}, 'state_dict_ema': network.state_dict()}, nested)
    assert convert(nested, tmp_path / 'averaged', classes=names, overrides=overrides).kind == 'averaged'


def test_what_is_exported_loads_in_timm(small, tmp_path):
    from safetensors.torch import load_file

    from efficientnet.export import export

    network, _ = small
    run = tiny_trained(model__norm='batch', model__padding='symmetric', model__norm_epsilon=1e-5, classes=7)
    with run.config.unlocked():
        run.config.model.stem_stride, run.config.model.group_size, run.config.model.expand_ratio = 2, 1, 6
    run = run._replace(
        variables=naming.to_ours(
            {own: leaf.numpy() for own, leaf in network.state_dict().items()}, variable_shapes(run), 'timm'
        )
    )
    write_run(tmp_path / 'run', run)
    export(tmp_path / 'run', tmp_path / 'out.safetensors', 'safetensors')
    found = load_file(tmp_path / 'out.safetensors')
    want = network.state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[own], leaf) for own, leaf in want.items() if 'num_batches' not in own)
    network.load_state_dict(found, strict=True)


class Malice:
    """Leaves a file behind if it is unpickled by running what it asks for."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), 'w'))


def test_bad_files_are_one_line_and_write_nothing(small, names, tmp_path):
    network, overrides = small
    good = saved(network, tmp_path / 'efficientnet_b0.pth')
    content = good.read_bytes()
    cut = tmp_path / 'efficientnet_b0_cut.pth'
    cut.write_bytes(content[: len(content) // 2])
    malicious = tmp_path / 'efficientnet_b0_bad.pth'
    malicious.write_bytes(pickle.dumps({'conv_stem.weight': Malice(tmp_path / 'harm')}))
    zipped = tmp_path / 'efficientnet_b0_zip.pth'
    torch.save({'conv_stem.weight': Malice(tmp_path / 'harm')}, zipped)
    unnamed = saved(network, tmp_path / 'model.pth')
    short = tmp_path / 'short.txt'
    short.write_text('one\ntwo\n')
    blank = tmp_path / 'blank.txt'
    blank.write_text('one\n\nthree\nfour\nfive\nsix\nseven\n')
    plain = 'is no plain tensor of floats'

    def odd(name, change):
        path = tmp_path / f'efficientnet_b0_{name}.pth'
        torch.save(change(dict(network.state_dict())), path)
        return path

    for source, options, words in (
        (cut, {}, 'damaged'),
        (malicious, {}, 'could run code'),
        (zipped, {}, 'could run code'),
        (tmp_path / 'none.pth', {}, 'No such file'),
        (tmp_path / 'none', {}, 'no such file'),
        (unnamed, {}, '--architecture='),
        (unnamed, {'architecture': 'resnet50'}, "--architecture='resnet50' is not known"),
        (good, {'architecture': 'efficientnet_b1', 'overrides': {}}, 'do not fit this architecture'),
        (good, {'classes': None}, 'the classifier has 7 classes; name them'),
        (good, {'classes': short}, 'has 2 lines, the classifier has 7'),
        (good, {'kind': 'averaged'}, "no weights 'averaged'"),
        (good, {'classes': blank}, 'line 2 is empty, must be the name of a class'),
        (
            odd('float8', lambda tensors: tensors | {'conv_stem.weight': torch.zeros(3).to(torch.float8_e5m2)}),
            {},
            plain,
        ),
        (odd('sparse', lambda tensors: tensors | {'classifier.bias': torch.zeros(7).to_sparse()}), {}, plain),
        (odd('numbers', lambda tensors: {0: torch.zeros(1)}), {}, 'no dictionary of tensors with names'),
        (odd('scalar', lambda tensors: tensors | {'classifier.bias': torch.zeros(())}), {}, 'one number a class'),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            convert(source, tmp_path / 'run', **({'classes': names, 'overrides': overrides} | options))
        assert '\n' not in str(error.value)
        assert not (tmp_path / 'run').exists(), source
    assert not (tmp_path / 'harm').exists()
    assert not list(tmp_path.glob('.run*'))
