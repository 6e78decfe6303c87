"""The tf.data graph between a source and the host: read, decode, crop, flip, batch, prefetch.

Images held in memory are augmented a batch at a time; encoded ones one by one, on all cores. An image that does not
decode drops out of the stream, and a blank takes its place when the rows are put in their batches. That costs
nothing while all is well and leaves no state behind: what an epoch sees of a damaged file is a function of
(seed, epoch, index) as everything else is.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from input_pipeline import images as ops
from input_pipeline.quiet_tf import tf
from input_pipeline.sources import WHOLE_IMAGE, Source

_CHUNK = 16  # examples read at once: a call from TensorFlow into Python takes as long as reading several

Tensors = dict[str, tf.Tensor]
Rows = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which examples a process reads, and what is done to their images.

    Attributes:
        examples: numbers of rows, int64 [k], counted from the process's first row of batch 0 → indices of
            examples, int64 [k] (−1: padding), and their seeds, uint32 [k, 2].
        batches: the batch numbers to produce.
        local_batch: rows of a batch that belong to this process.
        image_size: side of the images in pixels.
        resize: method of `images.resize`.
        ratio: side of the evaluation view ÷ short side of what it is cut from.
        crop: 'none', 'pad' or 'distorted'.
        rule: which boxes, for crop 'distorted'.
        pad: pixels on every side, for crop 'pad'.
        flip: mirror half of the images.
        prefetch: batches made ahead of the consumer.
        label_set: number of classes in a label set; 0: an example has one label.
    """

    examples: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    batches: range
    local_batch: int
    image_size: int
    resize: str
    ratio: float
    crop: str = 'none'
    rule: ops.CropRule | None = None
    pad: int = 0
    flip: bool = False
    prefetch: int = 3
    label_set: int = 0

    @property
    def rows(self) -> range:
        """The numbers of the rows to produce."""
        return range(self.batches.start * self.local_batch, self.batches.stop * self.local_batch)


def host_batches(source: Source, plan: Plan) -> Iterator[Rows]:
    """Runs the graph.

    Yields:
        'index' int64 [n] (−1: padding), 'image' uint8 [n, S, S, 3], 'label' int32 [n] (of a source with label sets
        uint8 [n, classes]) and 'mask' float32 [n], 0 for padding and for images that do not decode, which are blank
        and have label 0 or an empty set; n is the local batch. The arrays are read-only views of TensorFlow's memory.
    """
    batches = ({name: np.asarray(memoryview(t)) for name, t in tensors.items()} for tensors in _dataset(source, plan))
    for batch in _in_their_places(batches, plan):
        indices, _ = plan.examples(batch['row'])
        yield {'index': indices, **{name: batch[name] for name in ('image', 'label', 'mask')}}


def _in_their_places(batches: Iterable[Rows], plan: Plan) -> Iterator[Rows]:
    """Puts rows into batches of n by their numbers, and a blank row for each that is missing.

    Args:
        batches: rows in their order, 'row' int64 [k] being their numbers, with gaps; any number of them at a time.
        plan: what rows there are to be.

    Yields:
        As they came, without a copy, while nothing is missing.
    """
    n = plan.local_batch
    starts = iter(range(plan.rows.start, plan.rows.stop, n))
    first, left = next(starts, None), None
    for batch in batches:
        whole = left is None or not len(left['row'])
        left = batch if whole else {name: np.concatenate([left[name], batch[name]]) for name in batch}
        while len(left['row']) and left['row'][-1] >= first + n - 1:
            own, left = _cut(left, first + n)
            yield _filled(own, first, plan)
            first = next(starts, None)
    while first is not None:  # the last rows are missing
        own, left = _cut(left or _no_rows(plan), first + n)
        yield _filled(own, first, plan)
        first = next(starts, None)


def _cut(rows: Rows, stop: int) -> tuple[Rows, Rows]:
    """The rows before number `stop`, and the others."""
    place = np.searchsorted(rows['row'], stop)
    return {name: c[:place] for name, c in rows.items()}, {name: c[place:] for name, c in rows.items()}


def _no_rows(plan: Plan) -> Rows:
    image = np.empty((0, plan.image_size, plan.image_size, 3), np.uint8)
    label = np.empty((0, plan.label_set), np.uint8) if plan.label_set else np.empty(0, np.int32)
    return {'row': np.empty(0, np.int64), 'image': image, 'label': label}


def _filled(rows: Rows, first: int, plan: Plan) -> Rows:
    """The batch whose first row is number `first`, from those of its rows that are there."""
    n = plan.local_batch
    if len(rows['row']) == n:
        return rows | {'mask': np.ones(n, np.float32)}
    places = rows['row'] - first
    batch = {'mask': np.zeros(n, np.float32), 'row': np.arange(first, first + n)}
    batch['mask'][places] = 1
    for name in ('image', 'label'):
        batch[name] = np.zeros((n, *rows[name].shape[1:]), rows[name].dtype)
        batch[name][places] = rows[name]
    return batch


@tf.autograph.experimental.do_not_convert  # plain TensorFlow throughout; converting only slows the start
def _dataset(source: Source, plan: Plan) -> tf.data.Dataset:
    """Batches of 'row', 'image' and 'label', in order and without the rows that have no image."""
    cores = os.cpu_count() or 1
    parallel = {'num_parallel_calls': cores, 'deterministic': True}
    one_by_one = source.image_shape is None or plan.crop == 'distorted'
    chunk = min(_CHUNK, plan.local_batch) if one_by_one else plan.local_batch
    dataset = tf.data.Dataset.range(plan.rows.start, plan.rows.stop, chunk)
    dataset = dataset.map(_reader(source, plan, chunk), **parallel)
    if one_by_one:
        dataset = dataset.unbatch().map(_view(source, plan), **parallel).ignore_errors()
        dataset = dataset.batch(plan.local_batch)
    else:
        dataset = dataset.map(lambda rows: _augment_batch(rows, plan), **parallel)
    dataset = dataset.prefetch(plan.prefetch)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = cores
    options.threading.max_intra_op_parallelism = 1  # the images are the parallelism
    return dataset.with_options(options)


def _reader(source: Source, plan: Plan, count: int) -> Callable[[tf.Tensor], Tensors]:
    """A graph function from the number of a row to the examples of `count` rows from there on, without padding."""
    in_memory = source.image_shape is not None
    shape = source.image_shape or ()

    def read(first: np.int64) -> tuple[np.ndarray, ...]:
        rows = np.arange(first, min(first + count, plan.rows.stop))
        indices, seeds = plan.examples(rows)
        present = indices >= 0
        images, labels, boxes = source.read(indices[present])
        return rows[present], seeds[present].astype(np.int64), images, labels, _padded(boxes)

    label_dtype, label_shape = (tf.uint8, (plan.label_set,)) if plan.label_set else (tf.int32, ())
    dtypes = (tf.int64, tf.int64, tf.uint8 if in_memory else tf.string, label_dtype, tf.float32)
    names, shapes = ('row', 'seed', 'image', 'label', 'boxes'), ((), (2,), shape, label_shape, (None, 4))

    def graph(first: tf.Tensor) -> Tensors:
        columns = zip(names, tf.numpy_function(read, [first], dtypes), shapes, strict=True)
        return {name: tf.ensure_shape(column, (None, *shape)) for name, column, shape in columns}

    return graph


def _padded(boxes: list[np.ndarray]) -> np.ndarray:
    """Makes as many boxes of all images, float32 [k, m, 4], by repeating an image's first: that changes no crop."""
    most = max(map(len, boxes), default=1)
    if most == 1:
        return np.stack(boxes) if boxes else WHOLE_IMAGE[:0, None]
    return np.stack([np.concatenate([own, np.repeat(own[:1], most - len(own), axis=0)]) for own in boxes])


def _view(source: Source, plan: Plan) -> Callable[[Tensors], Tensors]:
    """A graph function from a stored image with its seeds and boxes to the finished one, uint8 [S, S, 3]."""
    encoded, size = source.image_shape is None, plan.image_size

    def view(row: Tensors) -> Tensors:
        stored, seed = row['image'], row['seed']
        if plan.crop == 'distorted':
            crop = ops.decode_distorted_crop if encoded else ops.distorted_crop
            image = crop(stored, seed, row['boxes'], size, plan.rule, plan.resize)
        else:
            image = ops.central_view(ops.decode(stored), size, plan.ratio, plan.resize)
        if plan.crop == 'pad':
            image = ops.random_window(image[None], seed[None], plan.pad, plan.flip)[0]
        elif plan.flip:
            image = ops.random_flip(image, seed)
        return {'row': row['row'], 'label': row['label'], 'image': tf.ensure_shape(image, (size, size, 3))}

    return view


def _augment_batch(rows: Tensors, plan: Plan) -> Tensors:
    """Resizes, crops and flips the images of a whole batch that was held in memory."""
    images = rows['image']
    if images.shape[1:3] != (plan.image_size, plan.image_size):
        images = ops.resize(images, plan.image_size, plan.resize)
    if plan.crop == 'pad' or plan.flip:
        pad = plan.pad if plan.crop == 'pad' else 0
        images = ops.random_window(images, rows['seed'], pad, plan.flip)
    return {'row': rows['row'], 'label': rows['label'], 'image': images}
