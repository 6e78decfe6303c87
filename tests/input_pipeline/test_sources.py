"""Digits and image folders: what is in a split, in which order, and what is said when it cannot be."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from sklearn import datasets

from input_pipeline import OTHER_TEST, DataError, open_source
from input_pipeline.sources import WHOLE_IMAGE, ArraySource, CachedSource, Examples


def test_only_the_first_batch_imports_tensorflow():
    """Planning, partitioning and measuring need none, and a run is checked before the seconds that it takes."""
    code = """
import sys
import numpy as np
import input_pipeline
from input_pipeline.sources import ArraySource
source = ArraySource('zeros', ('a',), np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int32))
batches = input_pipeline.train_batches(source, image_size=8, global_batch=2, num_batches=1, seed=0)
input_pipeline.evaluation_batches(source, image_size=8, batch=2)
print(sorted({'tensorflow', 'sklearn', 'jax'} & set(sys.modules)))
next(batches)
print('tensorflow' in sys.modules)
"""
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert found.stdout.split('\n') == ['[]', 'True', '']


def test_digits_are_split_once_for_all_stratified_and_disjoint():
    train, test = open_source('digits', 'train'), open_source('digits', 'test')
    assert (train.num_examples, test.num_examples) == (1437, 360)
    assert train.classes == tuple('0123456789')
    whole = datasets.load_digits()
    share = np.bincount(test.labels) / np.bincount(whole.target)
    assert np.abs(share - 360 / 1797).max() < 0.006  # less than one example of a class away
    want = np.round(whole.images * 255 / 16).astype(np.uint8).reshape(-1, 64).tolist()
    got = np.concatenate([train.images, test.images])[..., 0].reshape(-1, 64).tolist()
    assert sorted(got) == sorted(want)
    digest = hashlib.sha256(test.images.tobytes() + test.labels.astype('<i4').tobytes()).hexdigest()
    assert digest[:16] == '0ff0db206f2cc83a'  # accuracies on another split cannot be compared


def test_digits_are_grey_rgb_bytes_over_the_full_range():
    source = open_source('digits', 'train')
    assert source.image_shape == (8, 8, 3)
    assert source.images.dtype == np.uint8
    assert (source.images.min(), source.images.max()) == (0, 255)
    assert (source.images == source.images[..., :1]).all()


def test_digits_know_two_splits():
    with pytest.raises(DataError, match=r"input.test_split = 'validation' must be one of train, test"):
        open_source('digits', 'validation')


@pytest.fixture
def folder(tmp_path):
    """train/{cat,dog}, test/dog; the contents of a file are its name."""
    for path in ('train/dog/b.jpg', 'train/dog/a.PNG', 'train/cat/x.jpeg', 'test/dog/t.jpg', 'train/cat/notes.txt'):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    return tmp_path


def test_a_folder_is_read_in_the_order_of_names(folder):
    source = open_source('folder', 'train', str(folder))
    assert source.classes == ('cat', 'dog')
    images, labels, _ = source.read(np.arange(3))
    assert images.tolist() == [b'train/cat/x.jpeg', b'train/dog/a.PNG', b'train/dog/b.jpg']
    assert labels.tolist() == [0, 1, 1]
    assert labels.dtype == np.int32
    assert source.locate(2) == str(folder / 'train/dog/b.jpg')


def test_classes_are_those_of_the_training_split(folder):
    test = open_source('folder', 'test', str(folder))
    assert test.classes == ('cat', 'dog')
    assert test.read(np.array([0]))[1].tolist() == [1]


def test_a_file_that_vanished_reads_as_nothing(folder):
    source = open_source('folder', 'train', str(folder))
    (folder / 'train/dog/b.jpg').unlink()
    assert source.read(np.array([2, 0]))[0].tolist() == [b'', b'train/cat/x.jpeg']


def test_folder_errors_name_what_was_looked_for(folder):
    layout = '<split>/<class>/<image>'
    with pytest.raises(DataError, match=f"input.dir = 'nowhere' is not a folder; expected .*{layout}"):
        open_source('folder', 'train', 'nowhere')
    with pytest.raises(DataError, match=f"input.test_split = 'val': there is no folder {folder}/val.*{layout}"):
        open_source('folder', 'val', str(folder))
    with pytest.raises(DataError, match=r'input.dir is empty; with dataset = .folder. it must name'):
        open_source('folder', 'train')
    (folder / 'test/bird').mkdir()
    with pytest.raises(DataError, match=r'input.test_split.*class folders that .*train lacks: bird'):
        open_source('folder', 'test', str(folder))
    (folder / 'empty/cat').mkdir(parents=True)
    with pytest.raises(DataError, match=r"input.train_split = 'empty': no images"):
        open_source('folder', 'empty', str(folder), train_split='empty')
    (folder / 'flat').mkdir()
    with pytest.raises(DataError, match=r"input.train_split = 'flat': .* has no class folders"):
        open_source('folder', 'flat', str(folder), train_split='flat')


@pytest.mark.parametrize('label', [-1, 2])
def test_labels_of_arrays_are_checked_at_once(label):
    with pytest.raises(DataError, match=f'toy: example 1 .*has label {label}, must be 0 to 1 with 2 classes'):
        ArraySource('toy', ('a', 'b'), np.zeros((3, 2, 2, 3), np.uint8), np.array([0, label, 9], np.int32))


class Counted:
    """A source of ten images of ten bytes that counts how often each is read; image 3 cannot be read."""

    name, classes, num_examples, image_shape, label_sets = 'counted', ('a',), 10, None, False

    def __init__(self):
        self.reads = []

    def read(self, indices):
        self.reads += indices.tolist()
        images = np.empty(len(indices), object)
        images[:] = [b'' if i == 3 else bytes([i]) * 10 for i in indices]
        return Examples(images, indices.astype(np.int32), [WHOLE_IMAGE] * len(indices))

    def locate(self, index):
        return f'place {index}'


def test_a_cache_keeps_the_first_that_fit_and_nothing_damaged():
    plain, counted = Counted(), Counted()
    cached = CachedSource(counted, 45)
    for indices in ([0, 1, 3], [1, 5, 0, 3], [7, 8, 9, 5, 1], [9, 9, 7]):
        got, want = cached.read(np.array(indices)), plain.read(np.array(indices))
        assert list(got.images) == list(want.images)
        np.testing.assert_array_equal(got.labels, want.labels)
        assert got.labels.dtype == np.int32
    assert counted.reads == [0, 1, 3, 5, 3, 7, 8, 9, 9, 9]  # four fit: 0, 1, 5, 7
    assert (cached.num_examples, cached.image_shape, cached.locate(4)) == (10, None, 'place 4')


def test_a_cache_has_a_limit():
    with pytest.raises(DataError, match=r'input.cache = -1 must be at least 0 GiB'):
        CachedSource(Counted(), -(2**30))


def test_errors_about_other_test_data_name_its_own_fields(tmp_path):
    for name, split, folder, fields in (
        ('nowhere', 'test', None, 'input.test_dataset'),
        ('folder', 'test', None, 'input.test_dir'),
        ('folder', 'test', 'missing', 'input.test_dir'),
        ('imagenet_tfrecords', 'validation', str(tmp_path / 'missing'), 'input.test_dir'),
        ('digits', 'validation', None, 'input.test_split'),
    ):
        with pytest.raises(DataError, match=f'^{fields} '):
            open_source(name, split, folder, fields=OTHER_TEST)
