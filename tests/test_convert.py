"""Weights from elsewhere: the same logits as the library they come from, and one line for what does not fit."""

import functools

import jax
import numpy as np
import pytest

from efficientnet.convert import convert
from efficientnet.errors import RunError
from efficientnet.weights import read_run
from experiments.timm_import import import_timm

torch = pytest.importorskip('torch')
try:
    timm = import_timm()
except RunError as missing:
    pytest.skip(str(missing), allow_module_level=True)

SLOW = pytest.mark.slow


def randomised(network, seed=0):
    """The network with every parameter and running statistic drawn anew, so that none is 0 or 1."""
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
    return network.eval()


def saved(network, path):
    torch.save(network.state_dict(), path)
    return path


def logits(workdir, images):
    """Of normalised images NHWC, by the run."""
    trained = read_run(workdir)
    return np.asarray(jax.jit(trained.model().apply)(trained.variables, images))


def compare(network, workdir, size):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        want = network(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    got = logits(workdir, images)
    assert np.std(want) > 0.05
    # relative to the largest logit: these random networks' are of any size
    np.testing.assert_allclose(got / np.abs(want).max(), want / np.abs(want).max(), rtol=0, atol=1e-4)


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
    network = randomised(timm.create_model(name))
    trained = convert(saved(network, tmp_path / f'{name}.pth'), tmp_path / 'run')
    compare(network, tmp_path / 'run', 97 if another else trained.config.image_size)


@SLOW
@pytest.mark.parametrize('size', [224, 130])
def test_logits_of_groups_of_16_with_group_norm_are_timms(size, tmp_path):
    make = functools.partial(timm.models.efficientnet._gen_efficientnet, 'efficientnet_b0', group_size=16)
    network = randomised(make(norm_layer=group_norm(num_groups=4)))
    path = saved(network, tmp_path / 'efficientnet_b0.pth')
    convert(path, tmp_path / 'run', overrides=G16_GN)
    compare(network, tmp_path / 'run', size)
