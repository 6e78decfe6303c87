"""What leaves: the same weights bit for bit, and programs that run without this code."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from efficientnet.convert import convert
from efficientnet.errors import ConfigError
from efficientnet.export import (
    export,
    fold_batch_norm,
    in_policy,
    model_card,
    program,
    to_onnx,
    to_safetensors,
    to_stablehlo,
)
from efficientnet.predict import make_probabilities
from efficientnet.weights.trained import read_run, write_run
from tests.tiny import tiny_trained

# Runs in a folder without this code, with -I: neither PYTHONPATH nor the current folder are looked at.
SCRIPT = """
import importlib.util, sys
import jax.export, numpy as np
assert importlib.util.find_spec('efficientnet') is None
call = jax.jit(jax.export.deserialize(bytearray(open(sys.argv[1], 'rb').read())).call)
images = np.load(sys.argv[2])
np.savez(sys.argv[3], some=call(images[:3]), all=call(images))
"""


@pytest.fixture(scope='module')
def trained():
    return tiny_trained(model__norm='batch', model__group_size=4, precision__policy='32.32')


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)


@pytest.fixture(scope='module')
def want(trained, images):
    """Probabilities by the network itself, batch norm and all."""
    return np.asarray(jax.jit(make_probabilities(trained))(trained.variables, images))


def test_folding_batch_norm_changes_nothing(trained, images, want):
    folded, options = fold_batch_norm(trained)
    assert options == {'norm': 'folded'}
    assert 'batch_stats' not in folded.variables
    assert not any('scale' in layer for block in folded.variables['params'].values() for layer in block.values())
    np.testing.assert_allclose(jax.jit(program(trained))(images), want, rtol=1e-4, atol=1e-6)
    assert want.std() > 0.01
    group = tiny_trained()
    assert fold_batch_norm(group) == (group, {})


def test_stablehlo_runs_where_this_code_is_not(trained, images, want, tmp_path):
    (tmp_path / 'model').write_bytes(to_stablehlo(trained, {}))
    np.save(tmp_path / 'images.npy', images)
    command = [sys.executable, '-I', '-c', SCRIPT, 'model', 'images.npy', 'found.npz']
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    with np.load(tmp_path / 'found.npz') as found:
        np.testing.assert_allclose(found['all'], want, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found['some'], want[:3], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_onnx_runs_in_onnxruntime(trained, images, want):
    pytest.importorskip('jax2onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    for model, atol in ((trained, 1e-5), (tiny_trained(model__norm='group', model__group_size=16), 1e-5)):
        expected = np.asarray(jax.jit(make_probabilities(model))(model.variables, images))
        session = onnxruntime.InferenceSession(to_onnx(model, model_card(model)))
        for count in (1, 5):
            (found,) = session.run(None, {session.get_inputs()[0].name: images[:count]})
            np.testing.assert_allclose(found, expected[:count], atol=atol)
        card = json.loads(session.get_modelmeta().custom_metadata_map['model_card'])
        assert card['accuracy'] == {'test_accuracy': 0.5}


def test_safetensors_there_and_back_is_bit_identical(tmp_path):
    run = tiny_trained(precision__policy='16.16')
    write_run(tmp_path / 'run', run)
    (path,) = export(tmp_path / 'run', tmp_path / 'out.safetensors', 'safetensors')
    convert(path, tmp_path / 'again')
    back, before = read_run(tmp_path / 'again'), read_run(tmp_path / 'run')
    jax.tree.map(np.testing.assert_array_equal, back.variables, run.variables)
    assert all(leaf.dtype == np.float16 for leaf in jax.tree.leaves(back.variables['params']))
    assert back._replace(variables={}) == before._replace(variables={})
    with safetensors.safe_open(path, 'numpy') as file:
        card = json.loads(file.metadata()['model_card'])
    assert card['config']['precision']['policy'] == '16.16'
    assert card['dataset']['classes'] == [f'class {number}' for number in range(10)]
    assert card['accuracy'] == {'test_accuracy': 0.5}
    assert (card['weights'], card['step'], card['versions']['jax']) == ('raw', 7, jax.__version__)

    # What is there stays as it is, and nothing is left beside it.
    content = path.read_bytes()
    with pytest.raises(ConfigError, match=r'out\.safetensors exists'):
        export(tmp_path / 'run', path, 'safetensors')
    with pytest.raises(ConfigError, match='again exists'):
        convert(path, tmp_path / 'again')
    assert path.read_bytes() == content
    (tmp_path / 'half.safetensors').write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r'half\.safetensors is damaged or incomplete'):
        convert(tmp_path / 'half.safetensors', tmp_path / 'new')
    assert sorted(found.name for found in tmp_path.iterdir()) == ['again', 'half.safetensors', 'out.safetensors', 'run']


def test_an_average_stays_in_fp32_and_keeps_its_accuracy(tmp_path):
    """Averages have 32 bits where the run's weights have 16; as weights of a run of their own they lose none."""
    run = tiny_trained(precision__policy='16.16')
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32) / 3, run.variables['params'])
    average = run._replace(kind='averaged', variables=run.variables | {'params': params})
    (tmp_path / 'average.safetensors').write_bytes(to_safetensors(average, model_card(average)))
    convert(tmp_path / 'average.safetensors', tmp_path / 'kept')
    kept = read_run(tmp_path / 'kept')
    jax.tree.map(np.testing.assert_array_equal, kept.variables['params'], params)
    assert (kept.config.precision.policy, kept.kind, kept.evaluation) == ('16.32', 'raw', {'test_accuracy': 0.5})
    convert(tmp_path / 'average.safetensors', tmp_path / 'rounded', overrides={'precision.policy': '16.16'})
    rounded = read_run(tmp_path / 'rounded')
    assert all(leaf.dtype == np.float16 for leaf in jax.tree.leaves(rounded.variables['params']))
    assert rounded.evaluation == {}  # nobody has evaluated these


@pytest.mark.parametrize(
    ('field', 'value'), [('seed', 7), ('augment.label_smoothing', 0.2), ('optimizer.name', 'sgd'), ('epochs', 2.0)]
)
def test_fields_of_training_are_not_dropped_without_a_word(tmp_path, field, value):
    (tmp_path / 'run.safetensors').write_bytes(to_safetensors(tiny_trained(), model_card(tiny_trained())))
    with pytest.raises(ConfigError, match=f'--config.{field}={value!r} is of training'):
        convert(tmp_path / 'run.safetensors', tmp_path / 'run', overrides={field: value})
    assert not (tmp_path / 'run').exists()
    kept = {'augment.mean': (1.0, 2.0, 3.0), 'evaluation.crop_ratio': 0.5, 'model.dropout': 0.1}
    convert(tmp_path / 'run.safetensors', tmp_path / 'run', overrides=kept)
    assert read_run(tmp_path / 'run').config.model.dropout == 0.1


def test_a_disk_without_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
    with pytest.raises(ConfigError, match=r'/run needs \d+ MB, but there are 0 MB free'):
        write_run(tmp_path / 'run', tiny_trained())
    assert not list(tmp_path.iterdir())


def test_policies():
    trained = tiny_trained()
    half = in_policy(trained, '16.16')
    assert all(leaf.dtype == np.float16 for leaf in jax.tree.leaves(half.variables['params']))
    assert (half.config.precision.policy, trained.config.precision.policy) == ('16.16', '32.32')
    assert in_policy(trained, '') is trained
    trained.variables['params']['head']['classifier']['bias'][0] = 1e6
    with pytest.raises(ConfigError, match='too large for float16'):
        in_policy(trained, '16.16')
    in_policy(trained, 'bf16.16')


def test_numbers_that_a_run_cannot_hold_are_refused(tmp_path):
    trained = tiny_trained()
    kernel = trained.variables['params']['head']['classifier']['kernel']
    for value, dtype, policy, words in (
        (np.nan, np.float32, '32.32', 'head.classifier.kernel has numbers that are not finite in float32'),
        (1e30, np.float32, '16.16', 'head.classifier.kernel has numbers that are not finite in float16'),
        (1, np.int32, '32.32', 'head.classifier.kernel is int32, not a float format'),
        (1, np.complex64, '32.32', 'head.classifier.kernel is complex64, not a float format'),
    ):
        head = trained.variables['params']['head'] | {'classifier': {'kernel': np.full(kernel.shape, value, dtype)}}
        head['classifier']['bias'] = trained.variables['params']['head']['classifier']['bias']
        wrong = trained._replace(variables=trained.variables | {'params': trained.variables['params'] | {'head': head}})
        (tmp_path / 'wrong.safetensors').write_bytes(to_safetensors(wrong, model_card(wrong)))
        with pytest.raises(ConfigError, match=words):
            convert(tmp_path / 'wrong.safetensors', tmp_path / 'run', overrides={'precision.policy': policy})
        assert [path.name for path in tmp_path.iterdir()] == ['wrong.safetensors']


def test_a_model_card_that_makes_no_sense_is_refused(tmp_path):
    trained = tiny_trained()
    for change, words in (
        ({'step': 'abc'}, 'its model card is damaged'),
        ({'step': 2**40}, 'its model card is damaged'),
        ({'step': -1}, 'its model card is damaged'),
        ({'accuracy': 5}, 'its model card is damaged'),
        ({'accuracy': {'test_accuracy': 'high'}}, 'its model card is damaged'),
        ({'weights': 'best'}, 'its model card is damaged'),
        ({'dataset': {'classes': ['a'], 'image_shape': [8, 8]}}, r'its image_shape is \(8, 8\)'),
        ({'dataset': {'classes': ['a'], 'image_shape': [0, 8, 3]}}, r'its image_shape is \(0, 8, 3\)'),
        ({'dataset': {'classes': ['a'], 'image_shape': 'zz'}}, 'its model card is damaged'),
        ({'dataset': {'classes': ['a', 7], 'image_shape': None}}, 'not a list of names'),
    ):
        (tmp_path / 'wrong.safetensors').write_bytes(to_safetensors(trained, model_card(trained) | change))
        with pytest.raises(ConfigError, match=words):
            convert(tmp_path / 'wrong.safetensors', tmp_path / 'run')
    (tmp_path / 'wrong.safetensors').write_bytes(to_safetensors(trained, model_card(trained)))
    for size in (0, -4):
        with pytest.raises(ConfigError, match=f'image_size={size} must be at least 1 pixel'):
            convert(tmp_path / 'wrong.safetensors', tmp_path / 'run', overrides={'image_size': size})
    with pytest.raises(ConfigError, match='File name too long'):
        convert(tmp_path / 'wrong.safetensors', tmp_path / ('x' * 300))
    assert [path.name for path in tmp_path.iterdir()] == ['wrong.safetensors']


def test_variances_below_0_are_refused(trained, tmp_path):
    stats = jax.tree.map(np.negative, trained.variables['batch_stats'])
    wrong = trained._replace(variables=trained.variables | {'batch_stats': stats})
    (tmp_path / 'wrong.safetensors').write_bytes(to_safetensors(wrong, model_card(wrong)))
    with pytest.raises(ConfigError, match='has variances below 0'):
        convert(tmp_path / 'wrong.safetensors', tmp_path / 'run')


def test_folders_that_are_files_are_named(tmp_path):
    write_run(tmp_path / 'run', tiny_trained())
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match=r'file/out.safetensors cannot be written: .*/file is no folder'):
        export(tmp_path / 'run', tmp_path / 'file' / 'out.safetensors', 'safetensors')
    with pytest.raises(ConfigError, match=r'/out must end in \.safetensors'):
        export(tmp_path / 'run', tmp_path / 'out', 'safetensors')
    with pytest.raises(ConfigError, match=r'RUN=.*none holds no run'):
        export(tmp_path / 'none', tmp_path / 'out.safetensors', 'safetensors')
