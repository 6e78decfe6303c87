"""Starting from another run's weights: which are taken, what is drawn anew, and what does not fit."""

import json
import shutil

import jax
import numpy as np
import pytest

from efficientnet.errors import ConfigError
from efficientnet.loop.checkpoints import Checkpoints
from efficientnet.loop.train import train
from efficientnet.parallel.train_state import unpack_state
from efficientnet.weights.initial import fit_weights, read_weights
from tests.tiny import tiny_config, tiny_parts

FILL = {'params': 1, 'epoch_average': 2, 'update_average': 3, 'batch_stats': 4}
SOURCE = {'model__norm': 'batch', 'precision__policy': '16.16', 'averaging__update_decay': 0.9}


def save(folder, parts, *, epochs_averaged=0, classes=10, fill=FILL, change=lambda params: None):
    """Makes a run of these parts whose weights of every kind are one number of their own."""
    state = unpack_state(jax.device_get(parts.init_state()), parts.packings)
    trees = {name: jax.tree.map(lambda x, n=n: np.full_like(x, n), getattr(state, name)) for name, n in fill.items()}
    state = state._replace(**trees)
    classifier = state.params['head']['classifier']
    for name, array in classifier.items():
        classifier[name] = array[..., :classes]
    change(state.params)
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(parts.config.to_dict()))
    checkpoints = Checkpoints(folder / 'checkpoints', keep=1)
    checkpoints.save(4, state._replace(epochs_averaged=np.int32(epochs_averaged)), {}, None)
    checkpoints.close()
    return folder


@pytest.fixture(scope='module')
def parts():
    return tiny_parts(1, **SOURCE)


@pytest.fixture(scope='module')
def run(tmp_path_factory, parts):
    return save(tmp_path_factory.mktemp('runs') / 'source', parts, epochs_averaged=1)


def fit(found, parts):
    return fit_weights(found, parts.packings, parts.config, parts.rule.policy.master)


@pytest.mark.parametrize(
    ('kind', 'taken', 'value'),
    [('auto', 'averaged', 2), ('averaged', 'averaged', 2), ('update_average', 'update_average', 3), ('raw', 'raw', 1)],
)
def test_kinds_of_weights(run, parts, kind, taken, value):
    found = read_weights(run, kind)
    assert (found.step, found.kind) == (4, taken)
    variables, line = fit(found, parts)
    assert {float(leaf.mean()) for leaf in jax.tree.leaves(variables['params'])} == {value}
    statistics = {float(leaf.mean()) for leaf in jax.tree.leaves(variables['batch_stats'])}
    assert statistics == {4 if taken == 'raw' else value}
    assert f'{run}, step 4, weights {taken.replace("_", " ")}, the classifier too' in line


def test_no_average_before_an_epoch_has_ended(tmp_path, parts):
    found = save(tmp_path / 'run', parts)
    assert read_weights(found).kind == 'update_average'
    with pytest.raises(ConfigError, match=r"init_weights='averaged': .* has no such average at step 4; take raw"):
        read_weights(found, 'averaged')


def test_a_damaged_checkpoint_is_stepped_over_and_named(tmp_path, run):
    shutil.copytree(run, tmp_path / 'run')
    folder = tmp_path / 'run' / 'checkpoints'
    shutil.copytree(folder / '4', folder / '9')
    for path in (folder / '9' / 'facts').rglob('*'):
        if path.is_file():
            path.write_bytes(b'{')
    found = read_weights(tmp_path / 'run')
    assert found.step == 4
    assert len(found.complaints) == 1
    assert f'{folder}/9 is damaged' in found.complaints[0]
    shutil.rmtree(folder / '4')
    with pytest.raises(ConfigError, match='no whole one is left: give another folder'):
        read_weights(tmp_path / 'run')


def test_no_average_at_all(tmp_path):
    found = save(tmp_path / 'run', tiny_parts(1, averaging__epoch_decay=0.0))
    assert read_weights(found).kind == 'raw'
    with pytest.raises(ConfigError, match='update_average'):
        read_weights(found, 'update_average')


def test_another_resolution_policy_layout_and_stride(run):
    """The state that training starts from has the other run's numbers everywhere, steps and momentum anew."""
    changes = {'image_size': 16, 'precision__policy': '32.32', 'splits': 'head', 'model__stem_stride': 2}
    parts = tiny_parts(1, model__norm='batch', model__dropout=0.0, optimizer__trainable='head', **changes)
    start, _ = fit(read_weights(run, 'raw'), parts)
    state = unpack_state(jax.device_get(parts.init_state(start)), parts.packings)
    assert {(float(leaf.mean()), leaf.dtype.name) for leaf in jax.tree.leaves(state.params)} == {(1, 'float32')}
    assert {float(leaf.mean()) for leaf in jax.tree.leaves(state.epoch_average['params'])} == {1}
    assert {float(leaf.mean()) for leaf in jax.tree.leaves(state.batch_stats)} == {4}
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.optimizer))
    assert state.step == 0


def test_another_scaling_of_pixels_is_said(run):
    parts = tiny_parts(1, model__norm='batch', augment__mean=(0.0, 0.0, 0.0))
    _, line = fit(read_weights(run), parts)
    assert line.endswith(
        'pixels are scaled otherwise: augment.mean=(123.68, 116.78, 103.94) there, (0.0, 0.0, 0.0) here'
    )


def test_other_classes_draw_a_new_classifier(tmp_path, parts):
    found = save(tmp_path / 'run', parts, classes=7)
    start, line = fit(read_weights(found, 'raw'), parts)
    assert 'a new classifier' in line
    drawn, made = (
        unpack_state(jax.device_get(parts.init_state(given)), parts.packings).params for given in (None, start)
    )
    for name in ('kernel', 'bias'):
        np.testing.assert_array_equal(made['head']['classifier'][name], drawn['head']['classifier'][name])
    assert made['head']['classifier']['kernel'].std() > 0
    del made['head']['classifier']
    assert {float(leaf.mean()) for leaf in jax.tree.leaves(made)} == {1}


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'blocks': 2}, [r'block2a/expand/kernel \(1, 1, 8, 32\) is only here', r'and \d+ more']),
        (
            {'model__width': 0.5},
            [
                r'block1a/project/kernel is \(1, 1, 8, 8\) there, \(1, 1, 16, 8\) here',
                r'model\.width=0\.25 there, 0\.5',
            ],
        ),
        ({'model__norm': 'group'}, [r'block1a/project_norm/mean \(8,\) is only there', r"norm='batch' there, 'group'"]),
        ({'model__padding': 'symmetric'}, [r"would compute something else here \(model\.padding='same' there, 'symm"]),
        ({'model__norm_epsilon': 1e-5}, [r'model\.norm_epsilon=0\.001 there, 1e-05 here']),
    ],
)
def test_what_does_not_fit(run, changes, words):
    parts = tiny_parts(**({'blocks': 1, 'model__norm': 'batch'} | changes))
    for word in words:
        with pytest.raises(ConfigError, match=word) as caught:
            fit(read_weights(run, 'raw'), parts)
    assert str(caught.value).startswith(f'init_from={run} ')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('value', [1e5, np.nan])
def test_numbers_that_the_format_cannot_hold(tmp_path, value):
    def change(params):
        params['stem']['conv']['kernel'][0, 0, 0, 0] = value

    options = {'averaging__epoch_decay': 0.0}
    found = save(tmp_path / 'run', tiny_parts(1, **options), change=change)
    with pytest.raises(ConfigError, match='stem/conv/kernel has numbers that float16 cannot hold'):
        fit(read_weights(found), tiny_parts(1, precision__policy='16.16', **options))


def test_no_run(tmp_path, run):
    with pytest.raises(ConfigError, match=rf'init_from={tmp_path}/none holds no run: there is no config\.json in it'):
        read_weights(tmp_path / 'none')
    (tmp_path / 'weights.safetensors').write_text('')
    with pytest.raises(ConfigError, match=r'is a file; make a run of it: python -m efficientnet\.convert'):
        read_weights(tmp_path / 'weights.safetensors')
    (tmp_path / 'empty').mkdir()
    shutil.copy(run / 'config.json', tmp_path / 'empty')
    with pytest.raises(ConfigError, match='holds no checkpoint'):
        read_weights(tmp_path / 'empty')
    assert not (tmp_path / 'empty' / 'checkpoints').exists()  # nothing is made in another run's folder
    with pytest.raises(ConfigError, match=r"init_weights='best' is unknown; choose one of auto, averaged"):
        read_weights(run, 'best')


def test_a_run_that_starts_from_another(tmp_path, monkeypatch, capsys):
    """A wrong path leaves no trace; the frozen part is the other run's at the end; going on needs no other run."""

    def go(**changes):
        monkeypatch.setattr('efficientnet.loop.train.assemble', lambda config, **_: tiny_parts(1, **options, **changes))
        train(tiny_config(), tmp_path / 'run')
        return capsys.readouterr().out

    source = tmp_path / 'source'
    options = {'steps': 1, 'averaging__epoch_decay': 0.0, 'evaluation__batch': 360}
    changes = {'optimizer__trainable': 'head/classifier', 'init_from': str(source)}
    with pytest.raises(ConfigError, match='holds no run'):
        go(**changes)
    assert not (tmp_path / 'run').exists()
    save(source, tiny_parts(1, **options), fill={})
    assert f'start    {source}, step 4, weights raw, the classifier too' in go(**changes)
    before, after = (read_weights(tmp_path / name).variables['params'] for name in ('source', 'run'))
    moved = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert moved == {'head/classifier/kernel', 'head/classifier/bias'}
    shutil.rmtree(source)
    assert 'checkpoint of step 1 of 1' in go(**changes)
    with pytest.raises(ConfigError, match=r"init_from: .*source' there, 'other' now"):
        go(**changes | {'init_from': 'other'})
