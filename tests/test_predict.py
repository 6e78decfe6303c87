"""Prediction on files and arrays: what evaluation sees is what the model is shown."""

import csv
import errno
import io
import json
import os

import jax
import numpy as np
import pytest
from PIL import Image

from efficientnet.errors import ConfigError, RunError
from efficientnet.predict import load, predict
from efficientnet.weights.class_names import imagenet, readable
from efficientnet.weights.trained import read_run, write_run
from input_pipeline import open_source
from input_pipeline.batches import evaluation_batches
from input_pipeline.digits import open_digits
from input_pipeline.errors import DataError
from input_pipeline.views import find_images, make_view
from tests.tiny import tiny_trained


@pytest.fixture(scope='module')
def source():
    return open_digits('test', 'input.test_split')


@pytest.fixture(scope='module')
def trained():
    return tiny_trained(precision__policy='16.16')


@pytest.fixture(scope='module')
def workdir(trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('predict') / 'run'
    write_run(workdir, trained)
    return workdir


@pytest.fixture(scope='module')
def model(workdir):
    return load(workdir, batch=4)


@pytest.fixture
def files(source, tmp_path):
    for number in range(6):
        Image.fromarray(source.images[number]).save(tmp_path / f'{number}.png')
    (tmp_path / 'half.png').write_bytes((tmp_path / '0.png').read_bytes()[:60])
    (tmp_path / 'notes.txt').write_text('no image')
    return tmp_path


def test_a_run_written_is_a_run_read(trained, workdir):
    found = read_run(workdir)
    jax.tree.map(np.testing.assert_array_equal, found.variables, trained.variables)
    assert jax.tree.map(lambda a: a.dtype, found.variables) == jax.tree.map(lambda a: a.dtype, trained.variables)
    assert (found.dataset, found.step, found.evaluation) == (trained.dataset, 7, {'test_accuracy': 0.5})
    with pytest.raises(ConfigError, match=r"--weights='averaged'.*no such average"):
        read_run(workdir, 'averaged')
    with pytest.raises(ConfigError, match='exists'):
        write_run(workdir, trained)


def test_probabilities_are_the_networks(model, trained, source):
    """Against the network applied by hand to what the evaluation's own pipeline gives."""
    (batch,) = evaluation_batches(source, image_size=8, batch=360)
    mean, std = (np.array(getattr(trained.config.augment, name), np.float32) for name in ('mean', 'std'))
    pixels = ((batch['image'][:6].astype(np.float32) - mean) / std).astype(np.float16)
    logits = np.asarray(jax.jit(trained.model().apply)(trained.variables, pixels), np.float64)
    want = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = model.classify(list(source.images[:6]), top=3)
    assert [len(guesses) for guesses in found] == [3] * 6
    for row, guesses in zip(want, found, strict=True):
        assert [guess['probability'] for guess in guesses] == pytest.approx(np.sort(row)[::-1][:3], abs=5e-3)
        assert [guess['probability'] for guess in guesses] == pytest.approx(
            [row[g['index']] for g in guesses], abs=5e-3
        )
        assert all(guess['name'] == f'class {guess["index"]}' for guess in guesses)


def test_arrays_and_files_and_batches_agree(model, source, files):
    paths = [files / f'{number}.png' for number in range(6)]
    by_path, by_array = model.classify(paths), model.classify(source.images[:6])
    for one, other in zip(by_path, by_array, strict=True):
        assert one == other
    with pytest.raises(DataError, match=r'half\.png'):
        model.classify([files / 'half.png'])
    picture = source.images[0]
    lists = [[picture.astype(np.float32)], [picture[..., 0]], [Image.fromarray(picture)], [None]]
    for wrong in (picture, 'one.png', None, (path for path in paths), *lists):
        with pytest.raises(DataError, match=r'uint8|list of'):
            model.classify(wrong)


def test_formats(workdir, files, capsys):
    outputs = {}
    for form in ('text', 'csv', 'json'):
        out = io.StringIO()
        names = [str(files), str(files / 'nothing.png'), str(files / 'notes.txt')]
        assert predict(workdir, names, form, 'raw', out) == 3
        outputs[form] = out.getvalue()
        skipped = capsys.readouterr()
        assert skipped.out == ''
        assert [line.split(': ')[0] for line in skipped.err.splitlines()] == [
            f'skipped {files / name}' for name in ('half.png', 'nothing.png', 'notes.txt')
        ]
    found = json.loads(outputs['json'])
    assert [entry['file'] for entry in found] == [str(files / f'{number}.png') for number in range(6)]
    assert all(set(entry) == {'file', 'top'} and len(entry['top']) == 5 for entry in found)
    rows = list(csv.DictReader(io.StringIO(outputs['csv'])))
    flat = [
        {'file': entry['file'], 'rank': str(rank), **{name: str(value) for name, value in guess.items()}}
        for entry in found
        for rank, guess in enumerate(entry['top'], start=1)
    ]
    assert rows == flat
    assert outputs['text'].splitlines()[0] == str(files / '0.png')
    assert outputs['text'].count('class ') == 30


def test_a_list_on_standard_input(workdir, files, monkeypatch):
    monkeypatch.setattr('sys.stdin', io.StringIO(f'{files / "1.png"}\r\n\n  \n{files / "0.png"}\n'))
    out = io.StringIO()
    assert predict(workdir, ['-'], 'json', 'raw', out) == 0
    assert [entry['file'] for entry in json.loads(out.getvalue())] == [str(files / '1.png'), str(files / '0.png')]


def test_nothing_to_look_at(workdir, tmp_path):
    with pytest.raises(DataError, match='no images are named'):
        predict(workdir, [], 'text', 'raw', io.StringIO())
    with pytest.raises(DataError, match='no images to look at'):
        predict(workdir, [str(tmp_path)], 'text', 'raw', io.StringIO())
    with pytest.raises(DataError, match='none of the images can be read'):
        predict(workdir, [str(tmp_path / 'none.png')], 'text', 'raw', io.StringIO())
    with pytest.raises(ConfigError, match='holds no run'):
        load(tmp_path)


class Full(io.StringIO):
    """A file on a disk without room."""

    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize('form', ['text', 'csv', 'json'])
def test_predictions_that_cannot_be_written(workdir, files, form):
    with pytest.raises(RunError, match='the predictions cannot be written: No space left'):
        predict(workdir, [str(files / '1.png')], form, 'raw', Full())


def test_a_folder_without_images_is_left_out(workdir, files, tmp_path, capsys):
    out, empty = io.StringIO(), tmp_path / 'empty'
    empty.mkdir()
    assert predict(workdir, [str(empty), str(files / '1.png')], 'json', 'raw', out) == 1
    assert [entry['file'] for entry in json.loads(out.getvalue())] == [str(files / '1.png')]
    assert capsys.readouterr().err.startswith(f'skipped {empty} holds no images (.jpg, ')


def test_photographs_are_seen_as_in_evaluation(tmp_path):
    folder = tmp_path / 'test' / 'a'
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (61, 97, 3), np.uint8)
    Image.fromarray(pixels).save(folder / 'wide.png')
    source = open_source('folder', 'test', str(tmp_path), train_split='test')
    for options in ({}, {'crop_ratio': 1.0}, {'crop_ratio': 0.5, 'resize': 'area'}):
        (batch,) = evaluation_batches(source, image_size=32, batch=1, **options)
        for picture in (folder / 'wide.png', pixels):
            np.testing.assert_array_equal(make_view(32, None, **options)(picture), batch['image'][0])


def test_images_of_a_data_set_in_memory_are_seen_whole(source):
    (batch,) = evaluation_batches(source, image_size=16, batch=360)
    view = make_view(16, (8, 8, 3))
    np.testing.assert_array_equal(view(source.images[7]), batch['image'][7])
    # Larger pictures of the same thing come down to the same 8 × 8 levels, give or take the rounding of one.
    large = np.kron(source.images[7], np.ones((30, 30, 1), np.uint8))
    wide = np.pad(large, ((0, 0), (50, 50), (0, 0)), constant_values=255)
    for picture in (large, wide):
        assert np.abs(view(picture).astype(int) - batch['image'][7]).mean() < 20


def test_names_of_imagenet():
    names = list(imagenet().values())
    assert (len(names), len(set(names))) == (1000, 1000)
    assert (names[0], names[207], names[985], names[999]) == ('tench', 'golden retriever', 'daisy', 'toilet tissue')
    assert readable(['n01440764', 'cat']) == ('tench', 'cat')


def test_names_that_no_file_can_have_are_left_out():
    long, zero = 'x' * 5000, 'a\0b'
    assert find_images([long, zero], pytest.fail) == [long, zero]
    view = make_view(8, None)
    with pytest.raises(ConfigError, match='holds no run'):
        load('x' * 300)
    with pytest.raises(DataError, match='too long'):
        view(long)
    with pytest.raises(DataError, match='null byte'):
        view(zero)
