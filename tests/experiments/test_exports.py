"""The table of exports: tested on what --mode=evaluate tests on, and mistakes are one line."""

import numpy as np
import pytest

import input_pipeline
from efficientnet.loop.assemble import assemble
from efficientnet.loop.settings import for_evaluation
from efficientnet.weights.trained import write_run
from experiments import exports
from tests.tiny import tiny_config, tiny_trained


def test_images_are_those_of_the_runs_evaluation():
    config = tiny_config(
        dataset='sample_photos', image_size=16, evaluation__crop_ratio=0.5, input__resize='area', replicas=4
    )
    config.augment.mixup_alpha, config.evaluation.batch = 0.1, 2
    (found,) = assemble(for_evaluation(config, 1), stored=True).evaluation_batches()
    source = input_pipeline.open_source('sample_photos', 'test')
    options = {'image_size': 16, 'batch': 2}
    (right,) = input_pipeline.evaluation_batches(source, resize='area', crop_ratio=0.5, **options)
    np.testing.assert_array_equal(found['image'], right['image'])
    (other,) = input_pipeline.evaluation_batches(source, **options)
    assert (found['image'] != other['image']).any()


def test_accuracy_counts_what_is_not_masked_and_any_class_of_a_set():
    images = np.eye(3, dtype=np.float32)  # the likeliest classes are 0, 1 and 2
    mask = np.array([1, 1, 0], np.float32)
    one = {'image': images, 'label': np.array([0, 2, 2], np.int32), 'mask': mask}
    assert exports.accuracy(lambda images: images, [one, one | {'mask': np.ones(3, np.float32)}]) == 3 / 5
    sets = {'image': images, 'label': np.array([[1, 0, 1], [0, 1, 0], [0, 0, 1]], np.uint8), 'mask': mask}
    assert exports.accuracy(lambda images: images, [sets]) == 1


def test_a_run_is_measured(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / 'run', tiny_trained())
    monkeypatch.setattr(exports, 'ROWS', (('safetensors', 'raw', ''),))
    exports.main([str(tmp_path / 'run')])
    assert '| safetensors | raw | as in the run | ' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (None, 'holds no run: there is no config.json in it'),
        ({'dataset': 'folder', 'input__dir': '/nowhere'}, '/nowhere'),
    ],
)
def test_errors_are_one_line(changes, message, tmp_path, capsys):
    if changes is not None:
        write_run(tmp_path / 'run', tiny_trained(**changes))
    with pytest.raises(SystemExit) as ended:
        exports.main([str(tmp_path / 'run')])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ')
    assert err.count('\n') == 1
    assert message in err
