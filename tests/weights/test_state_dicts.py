"""Files of weights that need no PyTorch."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from efficientnet.errors import ConfigError
from efficientnet.weights import naming
from efficientnet.weights.state_dicts import read
from input_pipeline.quiet_tf import tf


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A TensorFlow checkpoint as the original code names things: a variable, its average, a counter."""
    prefix = tmp_path_factory.mktemp('tensorflow') / 'model.ckpt'
    name = 'efficientnet-b0/stem/conv2d/kernel'
    names = [name, name + naming.AVERAGE, 'global_step']
    arrays = [np.full((3, 3, 3, 32), 1.5, np.float32), np.full((3, 3, 3, 32), 2.5, np.float32), np.int64(7)]
    tf.raw_ops.SaveV2(prefix=str(prefix), tensor_names=names, shape_and_slices=[''] * 3, tensors=arrays)
    return prefix, dict(zip(names, arrays, strict=True))


@pytest.mark.parametrize(('kind', 'found'), [('auto', 'averaged'), ('averaged', 'averaged'), ('raw', 'raw')])
def test_tensorflow(checkpoint, kind, found):
    prefix, arrays = checkpoint
    got = read(prefix, kind)
    assert (got.kind, got.metadata) == (found, {})
    assert got.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(got.arrays[name], array)
    assert naming.detect(got.arrays) == ('tensorflow', 'efficientnet-b0/')


def test_a_tensorflow_checkpoint_without_its_data(checkpoint, tmp_path):
    prefix, _ = checkpoint
    copy = tmp_path / 'model.ckpt.index'
    copy.write_bytes(prefix.with_name('model.ckpt.index').read_bytes())
    with pytest.raises(ConfigError, match='no whole TensorFlow checkpoint'):
        read(tmp_path / 'model.ckpt')
    copy.write_bytes(b'nothing of the kind')
    with pytest.raises(ConfigError, match='no whole TensorFlow checkpoint'):
        read(tmp_path / 'model.ckpt')


def test_safetensors(tmp_path):
    path = tmp_path / 'some.safetensors'
    arrays = {'one': np.arange(6, dtype=np.float16).reshape(2, 3), 'two': np.array(3, np.int64)}
    save_file(arrays, path, {'note': 'here'})
    got = read(path)
    assert (got.kind, got.metadata) == ('raw', {'note': 'here'})
    assert {name: (leaf.dtype, leaf.tolist()) for name, leaf in got.arrays.items()} == {
        name: (leaf.dtype, leaf.tolist()) for name, leaf in arrays.items()
    }
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ConfigError, match='damaged or incomplete'):
        read(path)
    path.write_bytes(b'')
    with pytest.raises(ConfigError, match='damaged or incomplete'):
        read(path)


@pytest.mark.parametrize('name', ['none.safetensors', 'none', 'note.txt'])
def test_what_is_none(name, tmp_path):
    (tmp_path / 'note.txt').write_text('no weights')
    with pytest.raises(ConfigError, match=name):
        read(tmp_path / name)
