"""TFDS data sets at any index: small fixed-size images decoded once into memory, all others read as records.

`tfds.load` streams, so resuming at batch b means reading b batches, and its order depends on how files are
interleaved. Reading by byte offset has neither trouble, and the files stay those that `tfds build` prepares.
"""

import concurrent.futures
import dataclasses
import difflib
import os
import pathlib

import numpy as np
from google.protobuf.message import DecodeError

from input_pipeline import images, tfrecords
from input_pipeline.errors import DataError
from input_pipeline.quiet_tf import tf
from input_pipeline.sources import ArraySource

import tensorflow_datasets as tfds  # isort: skip  # after quiet_tf, which it would import unquietly

_MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images
_DECODE_CHUNK = 512  # images


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource:
    """A split in TFRecord files, each example a `tf.train.Example` with 'image' (encoded) and 'label'.

    Attributes:
        name: of data set and split.
        classes: class names.
        paths: the files.
        shards: int32 [N], the file of each example.
        numbers: int64 [N], its record number in the file.
        spans: int64 [N, 2], the bytes of the file that the record takes up, from and to.
    """

    name: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    shards: np.ndarray
    numbers: np.ndarray
    spans: np.ndarray
    image_shape: None = None

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.shards)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encoded images, empty where the record cannot be read, and labels."""
        encoded, labels = np.empty(len(indices), object), np.zeros(len(indices), np.int64)
        for row, index in enumerate(indices):
            encoded[row], labels[row] = self._read_one(index)
        # A label beyond 32 bits is as wrong as any that is too large: clipped, it is still found to be so.
        return encoded, np.clip(labels, -1, 2**31 - 1).astype(np.int32)

    def _read_one(self, index: int) -> tuple[bytes, int]:
        try:
            record = tfrecords.read_record(self.paths[self.shards[index]], *self.spans[index].tolist())
            feature = tf.train.Example.FromString(record).features.feature
            return feature['image'].bytes_list.value[0], feature['label'].int64_list.value[0]
        except (OSError, DecodeError, IndexError):  # unreadable, no Example, or one without such features
            return b'', 0

    def locate(self, index: int) -> str:
        """File, and number of the record in it."""
        return f'{self.paths[self.shards[index]]} record {self.numbers[index]}'


def open_tfds(name: str, split: str, data_dir: str | None, field: str) -> ArraySource | RecordSource:
    """Opens a TFDS split, prepared or preparable.

    Args:
        name: data set, 'name' or 'name/config'.
        split: split or part of one, such as 'train[:90%]'.
        data_dir: folder with the prepared data; None: TFDS' default.
        field: the config field that named the split.

    Returns:
        An ArraySource if all images have one known shape and fit into 4 GiB, else a RecordSource.

    Raises:
        DataError: if data set or split are unknown, it cannot be prepared, or holds no labelled uint8 images.
    """
    builder = _prepared_builder(name, data_dir)
    features = builder.info.features
    if not {'image', 'label'} <= set(features or ()):
        raise DataError(f"dataset = {name!r} has features {sorted(features or ())}, needs 'image' and 'label'")
    image, label = features['image'], features['label']
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise DataError(f"dataset = {name!r}: 'image' must be a uint8 tfds.features.Image, not {image}")
    if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        raise DataError(f"dataset = {name!r}: 'label' must be a tfds.features.ClassLabel, not {label}")
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise DataError(f'dataset = {name!r} is prepared as {builder.info.file_format}; only tfrecord is read')
    source = _record_source(builder, f'{name} {split}', tuple(label.names), split, field)
    height, width = image.shape[:2]
    if height and width and source.num_examples * height * width * 3 <= _MEMORY_LIMIT:
        return _decode_all(source, (height, width, 3))
    return source


def _prepared_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = ['digits', 'folder', *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, known) or ['digits', 'folder', 'cifar10', 'imagenet2012']
        raise DataError(f'dataset = {name!r} is unknown; nearest: {", ".join(near)}') from error
    except (ValueError, AssertionError) as error:  # no such config or version; not a name at all
        raise DataError(f'dataset = {name!r}: {_first_line(error)}') from error
    if builder.info.splits:
        return builder
    try:
        builder.download_and_prepare()
    except Exception as error:  # whatever a download, a parser or a disk may raise
        folder = pathlib.Path(builder.data_dir).parents[builder.info.full_name.count('/')]  # without name/version
        raise DataError(
            f'dataset = {name!r} is not prepared in input.dir = {folder} and preparing it failed'
            f' ({_first_line(error)}); try: tfds build {name} --data_dir={folder}'
        ) from error
    return builder


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip(' :.')


def _record_source(
    builder: tfds.core.DatasetBuilder, name: str, classes: tuple[str, ...], split: str, field: str
) -> RecordSource:
    try:
        instructions = builder.info.splits[split].file_instructions
    except (ValueError, KeyError) as error:
        known = ', '.join(builder.info.splits)
        raise DataError(f'{field} = {split!r} must be one of {known}, or a part such as train[:90%]') from error
    paths = tuple(dict.fromkeys(instruction.filename for instruction in instructions))
    starts = dict(zip(paths, tfrecords.index_shards(paths), strict=True))
    shards, numbers, spans = [np.empty(0, np.int32)], [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)]
    for part in instructions:
        start = starts[part.filename]
        if len(start) - 1 != part.examples_in_shard:
            raise DataError(
                f'input.dir: {part.filename} has {len(start) - 1} records where dataset_info.json says'
                f' {part.examples_in_shard}; prepare the data set again'
            )
        number = np.arange(part.skip, part.skip + part.take)
        shards.append(np.full(part.take, paths.index(part.filename), np.int32))
        numbers.append(number)
        spans.append(np.stack([start[number], start[number + 1]], axis=1))
    return RecordSource(name, classes, paths, *map(np.concatenate, (shards, numbers, spans)))


def _decode_all(source: RecordSource, shape: tuple[int, int, int]) -> ArraySource:
    spec = tf.TensorSpec(shape, tf.uint8)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def decode(encoded: tf.Tensor) -> tf.Tensor:
        one = lambda contents: tf.ensure_shape(images.decode(contents), shape)  # noqa: E731
        return tf.map_fn(one, encoded, fn_output_signature=spec)

    pixels, labels = (
        np.empty((source.num_examples, *shape), np.uint8),
        np.empty(source.num_examples, np.int32),
    )

    def fill(first: int) -> None:
        rows = np.arange(first, min(first + _DECODE_CHUNK, source.num_examples))
        encoded, labels[rows] = source.read(rows)
        try:
            pixels[rows] = decode(tf.constant(encoded.tolist())).numpy()
        except tf.errors.InvalidArgumentError as error:
            raise DataError(
                f'{source.name}: a damaged image, or one that is not {shape[0]} × {shape[1]} pixels, between'
                f' {source.locate(rows[0])} and {source.locate(rows[-1])}; prepare the data set again'
            ) from error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, source.num_examples, _DECODE_CHUNK)))
    return ArraySource(source.name, source.classes, pixels, labels)
