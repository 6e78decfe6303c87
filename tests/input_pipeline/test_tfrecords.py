"""Finding and reading records by byte offset, against TensorFlow's own writer and reader."""

import os

import numpy as np
import pytest

from input_pipeline import DataError, tfrecords
from input_pipeline.quiet_tf import tf


def write(path, records):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return str(path)


def test_any_record_can_be_read_alone(tmp_path):
    records = [b'', b'a', bytes(1000), b'last']
    path = write(tmp_path / 'a', records)
    (starts,) = tfrecords.index_shards([path])
    assert len(starts) == 5
    for i in (3, 0, 2, 1):
        assert tfrecords.read_record(path, *starts[i : i + 2].tolist()) == records[i]


def test_an_empty_file_has_no_records(tmp_path):
    assert tfrecords.index_shards([write(tmp_path / 'a', [])])[0].tolist() == [0]


@pytest.mark.parametrize('cut', [1, 5, 18, 24])
def test_a_file_that_ends_within_a_record_is_incomplete(tmp_path, cut):
    path = write(tmp_path / 'a', [b'123', b'45678'])
    with open(path, 'r+b') as file:
        file.truncate(os.path.getsize(path) - cut)
    with pytest.raises(DataError, match=f'{path} is damaged or incomplete'):
        tfrecords.index_shards([path])


def test_the_index_of_large_data_is_cached_until_the_files_change(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(tfrecords, '_CACHE_FROM_BYTES', 1)
    paths = [write(tmp_path / name, [name.encode()] * (i + 1)) for i, name in enumerate('abc')]
    first = tfrecords.index_shards(paths)
    monkeypatch.setattr(tfrecords, '_index_shard', lambda path, field: np.array([0]))
    for old, new in zip(first, tfrecords.index_shards(paths), strict=True):
        np.testing.assert_array_equal(old, new)
    assert len(list((tmp_path / 'cache/efficientnet-jax').iterdir())) == 1
    os.utime(paths[0], (1, 1))
    assert tfrecords.index_shards(paths)[2].tolist() == [0]


@pytest.mark.parametrize('content', [b'', b'PK', b'half'])
def test_a_cache_that_is_damaged_is_made_anew(tmp_path, monkeypatch, content, caplog):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(tfrecords, '_CACHE_FROM_BYTES', 1)
    paths = [write(tmp_path / 'a', [b'x'])]
    (first,) = tfrecords.index_shards(paths)
    (cache,) = (tmp_path / 'cache/efficientnet-jax').iterdir()
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2] if content == b'half' else content)
    for warnings in (1, 1):  # the second time it is whole again
        (again,) = tfrecords.index_shards(paths)
        np.testing.assert_array_equal(again, first)
        assert caplog.text.count('cannot be read') == warnings
    assert list(cache.parent.iterdir()) == [cache]


def test_a_cache_that_cannot_be_written_is_said_and_done_without(tmp_path, monkeypatch, caplog):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    monkeypatch.setattr(tfrecords, '_CACHE_FROM_BYTES', 1)
    assert len(tfrecords.index_shards([write(tmp_path / 'a', [b'x'])])[0]) == 2
    assert 'cannot write' in caplog.text


def test_a_folder_in_the_place_of_a_shard(tmp_path):
    with pytest.raises(DataError, match=r'cannot read .*: Is a directory'):
        tfrecords.index_shards([str(tmp_path)])
