"""The tf.data graph between a source and the host: read, decode, crop, flip, batch, prefetch.

Images held in memory are augmented a batch at a time; encoded ones in chunks, on all cores. A chunk with an
image that does not decode is done again one by one, with a blank in the place of what fails. That costs
nothing while all is well and leaves no state behind: what an epoch sees of a damaged file is a function of
(seed, epoch, index) as everything else is.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np

from input_pipeline import images as ops
from input_pipeline.quiet_tf import tf
from input_pipeline.sources import Source

_CHUNK = 16  # images: a nested dataset costs as much as half an image takes to decode

Tensors = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which examples a process reads, and what is done to their images.

    Attributes:
        examples: numbers of rows, int64 [k], counted from the process's first row of batch 0 → indices of
            examples, int64 [k] (−1: padding), and their seeds, uint32 [k, 2].
        batches: the batch numbers to produce.
        local_batch: rows of a batch that belong to this process.
        image_size: side of the images in pixels.
        crop: 'none', 'pad' or 'distorted'.
        pad: pixels on every side, for crop 'pad'.
        flip: mirror half of the images.
        prefetch: batches made ahead of the consumer.
    """

    examples: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    batches: range
    local_batch: int
    image_size: int
    crop: str = 'none'
    pad: int = 0
    flip: bool = False
    prefetch: int = 3


def host_batches(source: Source, plan: Plan) -> Iterator[dict[str, np.ndarray]]:
    """Runs the graph.

    Yields:
        'index' int64 [n] (−1: padding), 'seed' int64 [n, 2], 'image' uint8 [n, S, S, 3], 'label' int32 [n] and
        'mask' float32 [n], 0 for padding and for images that do not decode, which are blank; n is the local
        batch. The arrays are read-only views of TensorFlow's memory.
    """
    for tensors in _dataset(source, plan):
        yield {name: np.asarray(memoryview(tensor)) for name, tensor in tensors.items()}


@tf.autograph.experimental.do_not_convert  # plain TensorFlow throughout; converting only slows the start
def _dataset(source: Source, plan: Plan) -> tf.data.Dataset:
    cores = os.cpu_count() or 1
    one_by_one = source.image_shape is None or plan.crop == 'distorted'
    chunk = _CHUNK if one_by_one else plan.local_batch
    rows = range(plan.batches.start * plan.local_batch, plan.batches.stop * plan.local_batch)
    dataset = tf.data.Dataset.range(rows.start, rows.stop, chunk)
    dataset = dataset.map(_reader(source, plan, chunk, rows.stop), num_parallel_calls=cores, deterministic=True)
    if one_by_one:
        dataset = dataset.interleave(
            lambda rows: _view_chunk(rows, _view(source, plan), plan.image_size),
            cycle_length=2 * cores,  # twice, so that a slow chunk does not leave a core idle
            num_parallel_calls=2 * cores,
            deterministic=True,
        )
        dataset = dataset.unbatch().batch(plan.local_batch, drop_remainder=True)
    else:
        dataset = dataset.map(lambda rows: _augment_batch(rows, plan), num_parallel_calls=cores, deterministic=True)
    dataset = dataset.prefetch(plan.prefetch)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = cores
    options.threading.max_intra_op_parallelism = 1  # the images are the parallelism
    return dataset.with_options(options)


def _reader(source: Source, plan: Plan, count: int, stop: int) -> Callable[[tf.Tensor], Tensors]:
    """A graph function from the number of a row to `count` rows from there on, or as many as are below `stop`."""
    in_memory = source.image_shape is not None
    shape = source.image_shape or ()

    def read(first: np.int64) -> tuple[np.ndarray, ...]:
        indices, seeds = plan.examples(np.arange(first, min(first + count, stop)))
        present = indices >= 0
        images = np.zeros((len(indices), *shape), np.uint8) if in_memory else np.full(len(indices), b'', object)
        labels = np.zeros(len(indices), np.int32)
        images[present], labels[present] = source.read(indices[present])
        return indices, seeds.astype(np.int64), images, labels, present.astype(np.float32)

    dtypes = (tf.int64, tf.int64, tf.uint8 if in_memory else tf.string, tf.int32, tf.float32)
    names, shapes = ('index', 'seed', 'image', 'label', 'mask'), ((), (2,), shape, (), ())

    def graph(first: tf.Tensor) -> Tensors:
        rows = zip(names, tf.numpy_function(read, [first], dtypes), shapes, strict=True)
        return {name: tf.ensure_shape(tensor, (None, *shape)) for name, tensor, shape in rows}

    return graph


def _view(source: Source, plan: Plan) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """A graph function from one stored image and its seeds to the finished one, uint8 [S, S, 3]."""
    encoded, size = source.image_shape is None, plan.image_size

    def view(stored: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        if plan.crop == 'distorted':
            image = (ops.decode_distorted_crop if encoded else ops.distorted_crop)(stored, seed, size)
        else:
            image = ops.central_view(ops.decode(stored), size)
        if plan.crop == 'pad':
            return ops.random_window(image[None], seed[None], plan.pad, plan.flip)[0]
        return ops.random_flip(image, seed) if plan.flip else image

    return view


def _view_chunk(rows: Tensors, view: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], size: int) -> tf.data.Dataset:
    """One element: the chunk with its images viewed; should one fail, all of them singly, failures blank."""
    image = tf.TensorSpec((size, size, 3), tf.uint8)

    def view_all(rows: Tensors) -> Tensors:
        images = tf.map_fn(lambda pair: view(*pair), (rows['image'], rows['seed']), fn_output_signature=image)
        return rows | {'image': images}

    def view_or_blank(row: Tensors) -> tf.data.Dataset:
        viewed = tf.data.Dataset.from_tensors(row).map(
            lambda row: row | {'image': tf.ensure_shape(view(row['image'], row['seed']), image.shape)}
        )
        blank = row | {'image': tf.zeros(image.shape, tf.uint8), 'mask': tf.zeros(())}
        return viewed.ignore_errors().concatenate(tf.data.Dataset.from_tensors(blank)).take(1)

    together = tf.data.Dataset.from_tensors(rows).map(view_all).ignore_errors()
    singly = tf.data.Dataset.from_tensor_slices(rows).flat_map(view_or_blank).batch(_CHUNK)
    return together.concatenate(singly).take(1)


def _augment_batch(rows: Tensors, plan: Plan) -> Tensors:
    """Resizes, crops and flips the images of a whole batch that was held in memory."""
    images = rows['image']
    if images.shape[1:3] != (plan.image_size, plan.image_size):
        images = ops.resize(images, plan.image_size)
    if plan.crop == 'pad' or plan.flip:
        pad = plan.pad if plan.crop == 'pad' else 0
        images = ops.random_window(images, rows['seed'], pad, plan.flip)
    return rows | {'image': images}
