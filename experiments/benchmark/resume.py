"""What going on in the middle of an epoch costs on a data set of ImageNet's size: seconds, not a pass over the data.

The data set is made up: as many records in as many shards as ImageNet has for training, in the layout of its own
shards, each with the same picture of one pixel. So nothing here says how fast images are read; what is timed is
everything that depends on the number of records and files: finding where each record starts (once, and then from the
cache), the order of an epoch, and the first batch at any place in it. The made-up files are in the system's memory. A
disk that has not been read yet takes longer to find the records, by as long as it takes to seek that often.
"""

import os
import pathlib
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

from experiments.benchmark.setup import progress, table
from input_pipeline import order

RECORDS, SHARDS = 1_281_167, 1024  # of ImageNet's training split
_FILLING = 2**21  # bytes of the last record of a shard: together they make the shards large enough to be worth a cache
_ROUNDS = 3
_SEED = 0
ROWS = {
    'index': 'finding the records, the first time',
    'index_cached': 'opening the data set again',
    'order': 'order and random numbers of an epoch',
    'start': 'first batch of a run',
    'resume': 'first batch of a run that goes on in the middle of an epoch',
}


def run(args: Mapping[str, Any]) -> dict[str, Any]:
    """Measures the parts, in seconds: medians of three but for what happens once."""
    from input_pipeline import open_source, train_batches

    batch, count = args['batch'], args['records']
    with tempfile.TemporaryDirectory() as scratch, mock.patch.dict(os.environ, XDG_CACHE_HOME=scratch):
        folder = pathlib.Path(scratch) / 'shards'
        progress(f'making {count:,} records in {SHARDS:,} files')
        make_shards(folder, count)

        def opened() -> Any:
            return open_source('imagenet_tfrecords', 'train', str(folder))

        def first_batch(position: int) -> float:
            clear_order()
            batches = train_batches(
                source,
                image_size=args['image_size'],
                global_batch=batch,
                num_batches=10**9,
                seed=_SEED,
                start_batch=position,
            )
            return timed(lambda: next(batches))

        opened_at_once = timed(opened)
        again = [timed(opened) for _ in range(_ROUNDS)]
        source = opened()
        timed(lambda: next(train_batches(source, image_size=8, global_batch=1, num_batches=1, seed=0)))  # TensorFlow
        middle = (2 * count + count // 2) // batch
        seconds = {
            'index': opened_at_once,
            'index_cached': statistics.median(again),
            'order': statistics.median(order_seconds(count) for _ in range(_ROUNDS)),
            'start': statistics.median(first_batch(0) for _ in range(_ROUNDS)),
            'resume': statistics.median(first_batch(middle) for _ in range(_ROUNDS)),
        }
    return {'benchmark': 'input', 'flags': dict(args), 'records': count, 'files': SHARDS, 'seconds': seconds}


def make_shards(folder: pathlib.Path, count: int) -> None:
    """Writes `count` examples of one pixel as <folder>/train-00000-of-01024 and so on, as evenly as it goes.

    Checksums are left out, as they are when records are read.
    """
    from input_pipeline.imagenet import KEYS
    from input_pipeline.quiet_tf import tf

    features = tf.train.Features(
        feature={
            KEYS.image: tf.train.Feature(bytes_list=tf.train.BytesList(value=[_pixel()])),
            KEYS.label: tf.train.Feature(int64_list=tf.train.Int64List(value=[1])),
        }
    )
    example = tf.train.Example(features=features).SerializeToString()
    # A field that no Example has, as a hole in the file: it takes no room on the disk.
    filling = bytes([15 << 3 | 2]) + _varint(_FILLING)
    plain = _record(example, 0) + bytes(4)
    last = _record(example + filling, _FILLING)
    folder.mkdir()
    for number in range(SHARDS):
        records = (number + 1) * count // SHARDS - number * count // SHARDS
        with (folder / f'train-{number:05d}-of-{SHARDS:05d}').open('wb') as file:
            if records:
                start = file.write(plain * (records - 1) + last)
                file.truncate(start + _FILLING + 4)


def _pixel() -> bytes:
    from input_pipeline.quiet_tf import tf

    return tf.io.encode_png(tf.fill((1, 1, 3), tf.constant(99, tf.uint8))).numpy()


def _record(data: bytes, more: int) -> bytes:
    """The beginning of a record whose data go on for `more` bytes: length, no checksum, data."""
    return struct.pack('<Q', len(data) + more) + bytes(4) + data


def _varint(number: int) -> bytes:
    """A number as protocol buffers write it: seven bits a byte, the lowest first, 128 on all but the last."""
    low = bytes([number % 128 + 128]) if number >= 128 else bytes([number])
    return low + _varint(number // 128) if number >= 128 else low


def clear_order() -> None:
    """Forgets the orders that have been computed, as a process that starts has none."""
    order.epoch_order.cache_clear()
    order.augmentation_seeds.cache_clear()


def order_seconds(count: int) -> float:
    """How long the order of an epoch takes, and its random numbers."""
    clear_order()
    return timed(lambda: (order.epoch_order(_SEED, 1, count), order.augmentation_seeds(_SEED, 1, count)))


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def show(result: Mapping[str, Any]) -> str:
    """Returns the table."""
    rows = [('seconds', ''), *((ROWS[name], f'{value:.2f}') for name, value in result['seconds'].items())]
    return f'{result["records"]:,} records in {result["files"]:,} files, page cache warm\n\n{table(rows)}'
