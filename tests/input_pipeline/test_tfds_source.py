"""TFDS data sets read at any index, compared with what tfds.load gives for the same files."""

import os
import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from input_pipeline import DataError, evaluation_batches, open_source, records, tfds_source
from input_pipeline.quiet_tf import tf


def picture(i, shape):
    return np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Twenty pictures a split; the config says of what kind."""

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS = [  # noqa: RUF012 - TFDS wants a list here
        tfds.core.BuilderConfig(name=name)
        for name in ('photos', 'fixed', 'grey', 'deep', 'regression', 'unlabelled', 'real', 'offline')
    ]

    def _info(self):
        shape = {'photos': (None, None, 3), 'real': (None, None, 3), 'grey': (6, 5, 1)}.get(
            self.builder_config.name, (6, 5, 3)
        )
        dtype = np.uint16 if self.builder_config.name == 'deep' else np.uint8
        label = tfds.features.ClassLabel(names=['ant', 'bee', 'cow'])
        if self.builder_config.name == 'regression':
            label = tfds.features.Scalar(np.int64)
        features = {'image': tfds.features.Image(shape=shape, dtype=dtype), 'label': label, 'id': np.int64}
        if self.builder_config.name == 'unlabelled':
            del features['label']
        if self.builder_config.name == 'real':
            features |= {'original_label': features.pop('label'), 'real_label': tfds.features.Sequence(label)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        if self.builder_config.name == 'offline':
            raise ConnectionError(f'no route to host in {downloader.MAX_RETRIES} retries\nand more')
        return {'train': self._generate_examples(0), 'test': self._generate_examples(100)}

    def _generate_examples(self, first):
        feature = self.info.features['image']
        for i in range(first, first + 20):
            shape = (10 + i % 7, 12 + i % 5, 3) if feature.shape[0] is None else feature.shape
            image = picture(i, shape).astype(feature.np_dtype)
            example = {'image': image, 'label': i % 3, 'id': i, 'original_label': i % 3}
            example['real_label'] = ([], [i % 3], [2, 0], [1])[i % 4]
            yield i, {name: example[name] for name in self.info.features}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    root = str(tmp_path_factory.mktemp('tfds'))
    sharded = tfds.download.DownloadConfig(num_shards=3)
    for name in ('photos', 'fixed', 'grey', 'deep', 'regression', 'unlabelled', 'real'):
        tfds.builder(f'tiny/{name}', data_dir=root).download_and_prepare(download_config=sharded)
    return root


def plain(name, split, root):
    examples = tfds.load(name, split=split, data_dir=root, read_config=tfds.ReadConfig(interleave_cycle_length=1))
    return [(example['image'], int(example['label'])) for example in examples.as_numpy_iterator()]


@pytest.mark.parametrize('split', ['train', 'test', 'train[10%:]', 'train[:35%]+test[2:5]', 'train[19:]'])
def test_records_of_any_split_are_those_of_tfds_load(prepared, split):
    source = open_source('tiny/photos', split, prepared)
    want = plain('tiny/photos', split, prepared)
    assert isinstance(source, records.RecordSource)
    assert source.classes == ('ant', 'bee', 'cow')
    assert source.num_examples == len(want)
    backwards = np.arange(len(want))[::-1]
    encoded, labels, _ = source.read(backwards)
    assert labels.dtype == np.int32
    for index, contents, label in zip(backwards, encoded, labels, strict=True):
        np.testing.assert_array_equal(tf.io.decode_image(contents), want[index][0])
        assert label == want[index][1]


def test_reassessed_labels(prepared):
    # As in imagenet2012_real: every class of real_label is right, and an image without any is not counted.
    source = open_source('tiny/real', 'test', prepared)
    examples = tfds.load('tiny/real', split='test', data_dir=prepared, shuffle_files=False)
    want = []
    for example in examples.as_numpy_iterator():
        want.append(np.isin([0, 1, 2], example['real_label']).astype(int).tolist())
    got = source.read(np.arange(20)).labels
    assert got.dtype == np.uint8
    assert sorted(got.tolist()) == sorted(want)
    (batch,) = evaluation_batches(source, image_size=8, batch=20)
    np.testing.assert_array_equal(batch['label'], got)
    assert batch['mask'].tolist() == got.any(axis=1).tolist()
    assert batch['mask'].sum() == 15


def test_a_set_with_a_class_that_is_none_is_a_damaged_record(prepared, tmp_path):
    def change(number, feature):
        if number == 2:
            feature['real_label'].int64_list.value[:] = [1, 3]

    path = rewritten(prepared, tmp_path, change, 'real')
    source = open_source('tiny/real', 'train', str(tmp_path))
    damaged = {}
    list(evaluation_batches(source, image_size=8, batch=20, damaged_limit=1, damaged=damaged))
    assert damaged == {2: f'{path} record 2'}


@pytest.mark.parametrize('name', ['tiny/fixed', 'tiny/grey'])
@pytest.mark.parametrize('split', ['train', 'test[25%:75%]'])
def test_fixed_shapes_are_decoded_into_memory(prepared, name, split, monkeypatch):
    monkeypatch.setattr(tfds_source, '_DECODE_CHUNK', 6)
    source = open_source(name, split, prepared)
    want = plain(name, split, prepared)
    assert source.image_shape == (6, 5, 3)
    np.testing.assert_array_equal(source.images, np.stack([np.broadcast_to(i, (6, 5, 3)) for i, _ in want]))
    assert source.labels.tolist() == [label for _, label in want]


def test_too_large_for_memory_is_read_as_records(prepared, monkeypatch):
    monkeypatch.setattr(tfds_source, '_MEMORY_LIMIT', 20 * 6 * 5 * 3 - 1)
    assert open_source('tiny/fixed', 'train', prepared).image_shape is None


@pytest.mark.parametrize(
    ('name', 'split', 'message'),
    [
        ('tiny/photos', 'validation', r"input.test_split = 'validation' must be one of train, test, or a part"),
        ('tiny/photos', 'train[10%', r"input.test_split = 'train\[10%' must be one of train, test"),
        ('tiny/photos', 'train[:0]', r"input.test_split = 'train\[:0\]' of tiny/photos has no examples"),
        ('tiny/unlabelled', 'train', r"has features \['id', 'image'\], needs 'image' and 'label'"),
        ('tiny/regression', 'train', r"'label' must be a tfds.features.ClassLabel"),
        ('tiny/deep', 'train', r"'image' must be a uint8 tfds.features.Image"),
        ('tiny/none', 'train', r"dataset = 'tiny/none': .*none not found"),
        ('imagenet_tfrecord', 'train', r"'imagenet_tfrecord' is unknown; nearest: .*imagenet_tfrecords"),
        ('cifar01', 'train', r"dataset = 'cifar01' is unknown; nearest: .*cifar10"),
        ('no name!', 'train', r"dataset = 'no name!'"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(prepared, name, split, message):
    with pytest.raises(DataError, match=message) as caught:
        open_source(name, split, prepared)
    assert '\n' not in str(caught.value)


def test_what_cannot_be_prepared_says_how(tmp_path, caplog):
    message = (
        f"dataset = 'tiny/offline' is not prepared in input.dir = {tmp_path} and preparing it failed"
        f' (no route to host in 4 retries); try: tfds build tiny/offline --data_dir={tmp_path}'
    )
    with pytest.raises(DataError) as caught:
        open_source('tiny/offline', 'train', str(tmp_path))
    assert str(caught.value) == message
    assert [record.getMessage() for record in caplog.records if record.name.startswith('input_pipeline')] == [
        f'tiny/offline is not prepared in {tmp_path}: TFDS now downloads and prepares it'
    ]
    assert downloader.MAX_RETRIES > 4


def test_a_folder_that_is_not_there_gets_no_download(tmp_path):
    typo = tmp_path / 'typo'
    with pytest.raises(DataError, match=f'input.dir = {re.escape(str(typo))} is no folder'):
        open_source('tiny/fixed', 'train', str(typo))
    assert not typo.exists()


def test_what_is_missing_is_prepared(tmp_path):
    assert open_source('tiny/fixed', 'train', str(tmp_path)).num_examples == 20


def test_another_process_was_faster(tmp_path, monkeypatch):
    prepare = tfds_source._prepare

    def late(builder):
        prepare(tfds.builder('tiny/fixed', data_dir=str(tmp_path)))
        raise OSError('cannot rename: the folder is there')

    monkeypatch.setattr(tfds_source, '_prepare', late)
    assert open_source('tiny/fixed', 'train', str(tmp_path)).num_examples == 20


def rewritten(root, tmp_path, change, name='photos'):
    """A copy of the prepared pictures in which `change` has edited or replaced examples of the first file."""
    shutil.copytree(os.path.join(root, 'tiny'), tmp_path / 'tiny')
    path = min((tmp_path / f'tiny/{name}/1.0.0').glob('*train*'))
    records = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    with tf.io.TFRecordWriter(str(path)) as writer:
        for number, record in enumerate(records):
            example = tf.train.Example.FromString(record)
            replaced = change(number, example.features.feature)
            writer.write(replaced or example.SerializeToString())
    return path


@pytest.mark.parametrize('label', [-1, 3, 2**40])
def test_a_label_without_a_class_stops_the_run(prepared, tmp_path, label):
    def change(number, feature):
        if number == 2:
            feature['label'].int64_list.value[0] = label

    path = rewritten(prepared, tmp_path, change)
    source = open_source('tiny/photos', 'train', str(tmp_path))
    message = rf'tiny/photos train: example 2 \({path} record 2\) has label .*, must be 0 to 2 with 3 classes'
    with pytest.raises(DataError, match=message):
        list(evaluation_batches(source, image_size=8, batch=4))


def test_damaged_records_are_skipped_and_named(prepared, tmp_path, caplog):
    def change(number, feature):
        if number == 1:
            feature['image'].bytes_list.value[0] = feature['image'].bytes_list.value[0][:40]
        if number == 3:
            del feature['label']
        return b'no example' if number == 4 else None

    path = rewritten(prepared, tmp_path, change)
    source = open_source('tiny/photos', 'train', str(tmp_path))
    batches = list(evaluation_batches(source, image_size=8, batch=20, damaged_limit=3))
    assert np.flatnonzero(batches[0]['mask'] == 0).tolist() == [1, 3, 4]
    assert [f'{path} record {i}' in caplog.text for i in range(5)] == [False, True, False, True, True]


def test_files_that_are_cut_short_or_missing_are_found_at_once(prepared, tmp_path):
    path = rewritten(prepared, tmp_path, lambda number, feature: None)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(DataError, match=f'{path} is damaged or incomplete'):
        open_source('tiny/photos', 'train', str(tmp_path))
    path.write_bytes(b'')
    with pytest.raises(DataError, match=f'{path} has 0 records where dataset_info.json says'):
        open_source('tiny/photos', 'train', str(tmp_path))
    path.unlink()
    with pytest.raises(DataError, match=f'input.dir: cannot read {path}'):
        open_source('tiny/photos', 'train', str(tmp_path))


def test_an_image_in_memory_of_the_wrong_shape_is_an_error(prepared, tmp_path):
    shutil.copytree(os.path.join(prepared, 'tiny'), tmp_path / 'tiny')
    fixed, photos = (sorted((tmp_path / f'tiny/{name}/1.0.0').glob('*train*')) for name in ('fixed', 'photos'))
    for old, new in zip(fixed, photos, strict=True):
        shutil.copy(new, old)
    with pytest.raises(DataError, match='tiny/fixed train: a damaged image, or one that is not 6 × 5 pixels'):
        open_source('tiny/fixed', 'train', str(tmp_path))
