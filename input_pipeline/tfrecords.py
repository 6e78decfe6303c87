"""Random access to TFRecord files: where each record starts, and reading one without those before it.

A record is its length (8 bytes, little endian), a checksum of that (4), the data, and a checksum of the data
(4). Hopping from length to length finds all records while touching 8 bytes of each. For large data sets
(ImageNet: 1.3 million records in 1,024 files) the result is kept in the user's cache folder, under the
names, sizes and modification times of the files. Checksums are not verified: TensorFlow offers no function
for it, and in Python it would take longer than decoding the image.
"""

import concurrent.futures
import hashlib
import logging
import os
import pathlib
import struct
import tempfile
import zipfile
from collections.abc import Sequence

import numpy as np

from input_pipeline.errors import DataError

log = logging.getLogger(__name__)

_HEADER, _FOOTER = 12, 4
_CACHE_FROM_BYTES = 2**30  # smaller data sets are indexed in less than a second
_THREADS = 32  # they wait for the disk


def index_shards(paths: Sequence[str], field: str = 'input.dir') -> list[np.ndarray]:
    """Finds the records of TFRecord files.

    Args:
        paths: the files.
        field: the config field that named their folder.

    Returns:
        For each file int64 [records + 1]: the byte at which each record starts, and the size of the file.

    Raises:
        DataError: if a file is missing or cannot be read, or ends within a record.
    """
    try:
        stats = [os.stat(path) for path in paths]
    except OSError as error:
        raise DataError(f'{field}: cannot read {error.filename}: {error.strerror}') from error
    large = sum(stat.st_size for stat in stats) >= _CACHE_FROM_BYTES
    cache = _cache_path(paths, stats)
    saved = _load(cache, len(paths)) if large else None
    if saved is not None:
        return saved
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        shards = list(pool.map(lambda path: _index_shard(path, field), paths))
    if large:
        _save(cache, shards)
    return shards


def read_record(path: str, start: int, stop: int) -> bytes:
    """The data of the record that takes up bytes start … stop − 1 of a file; raises OSError if it cannot."""
    descriptor = os.open(path, os.O_RDONLY)  # opening takes 5 µs; 1,024 open files would be too many for some
    try:
        return os.pread(descriptor, stop - start - _HEADER - _FOOTER, start + _HEADER)
    finally:
        os.close(descriptor)


def _index_shard(path: str, field: str) -> np.ndarray:
    starts = [0]
    try:
        with open(path, 'rb', buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while starts[-1] + _HEADER + _FOOTER <= size:
                (length,) = struct.unpack('<Q', os.pread(file.fileno(), 8, starts[-1]))
                starts.append(starts[-1] + _HEADER + length + _FOOTER)
    except OSError as error:
        raise DataError(f'{field}: cannot read {path}: {error.strerror}') from error
    if starts[-1] != size:
        raise DataError(f'{field}: {path} is damaged or incomplete, record {len(starts) - 1} does not fit into it')
    return np.array(starts, np.int64)


def _cache_path(paths: Sequence[str], stats: Sequence[os.stat_result]) -> pathlib.Path:
    files = [(os.path.abspath(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]
    key = hashlib.sha256(repr(files).encode()).hexdigest()[:32]
    root = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    return root / 'efficientnet-jax' / f'tfrecord_index_{key}.npz'


def _load(cache: pathlib.Path, files: int) -> list[np.ndarray] | None:
    """Reads an index; None if there is none, or none that can be read."""
    try:
        with cache.open('rb') as file, np.load(file) as saved:
            return [saved[f'arr_{i}'] for i in range(files)]
    except FileNotFoundError:
        return None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:  # cut short, or another user's
        log.warning('the index of the records is built anew: %s cannot be read (%s)', cache, error)
        return None


def _save(cache: pathlib.Path, shards: Sequence[np.ndarray]) -> None:
    """Writes beside and renames, as processes may start together; a failure is no reason to stop."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
            draft = pathlib.Path(folder) / cache.name
            np.savez(draft, *shards)
            draft.replace(cache)
    except OSError as error:
        log.warning('the index of the records will be built anew each time: cannot write %s (%s)', cache, error)
