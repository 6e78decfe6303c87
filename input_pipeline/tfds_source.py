"""TFDS data sets at any index: small fixed-size images decoded once into memory, all others read as records.

`tfds.load` streams, so resuming at batch b means reading b batches, and its order depends on how files are
interleaved. Reading by byte offset has neither trouble, and the files stay those that `tfds build` prepares.
"""

import concurrent.futures
import difflib
import logging
import os
import pathlib
from unittest import mock

import numpy as np

from input_pipeline import images
from input_pipeline.errors import DataError
from input_pipeline.quiet_tf import tf
from input_pipeline.records import Keys, Part, RecordSource, open_records
from input_pipeline.sources import OWN, ArraySource, Fields

import tensorflow_datasets as tfds  # isort: skip  # after quiet_tf, which it would import unquietly
from tensorflow_datasets.core.download import downloader  # isort: skip

log = logging.getLogger(__name__)

# What imagenet2012_real has in place of a label: people found every class that is on an image, or none. Any of them
# is right, and images without any are left out (Beyer et al., arXiv 2006.07159, section 3).
REAL = 'real_label'
# Of a download that cannot start. Each waits twice as long as the one before: four are 3 seconds, TFDS' ten are 3:24.
_RETRIES = 4
_MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images
_DECODE_CHUNK = 512  # images


def open_tfds(name: str, split: str, data_dir: str | None, fields: Fields) -> ArraySource | RecordSource:
    """Opens a TFDS split, prepared or preparable.

    Args:
        name: data set, 'name' or 'name/config'.
        split: split or part of one, such as 'train[:90%]'.
        data_dir: folder with the prepared data; None: TFDS' default.
        fields: what the config calls the first three, in another order.

    Returns:
        An ArraySource if all images have one known shape and fit into 4 GiB, else a RecordSource.

    Raises:
        DataError: if data set or split are unknown, it cannot be prepared, or holds no labelled uint8 images.
    """
    builder = _prepared_builder(name, data_dir, fields)
    features, keys = builder.info.features, Keys()
    if REAL in set(features or ()):
        keys = Keys(label=REAL, label_sets=True)
    if not {'image', keys.label} <= set(features or ()):
        raise DataError(f"{fields.dataset} = {name!r} has features {sorted(features or ())}, needs 'image' and 'label'")
    image, label = features['image'], features[keys.label]
    if keys.label_sets:
        label = label.feature
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise DataError(f"{fields.dataset} = {name!r}: 'image' must be a uint8 tfds.features.Image, not {image}")
    if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        raise DataError(f"{fields.dataset} = {name!r}: 'label' must be a tfds.features.ClassLabel, not {label}")
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise DataError(f'{fields.dataset} = {name!r} is prepared as {builder.info.file_format}; only tfrecord is read')
    source = _record_source(builder, f'{name} {split}', tuple(label.names), keys, split, fields)
    height, width = image.shape[:2]
    if height and width and not source.label_sets and source.num_examples * height * width * 3 <= _MEMORY_LIMIT:
        return _decode_all(source, (height, width, 3))
    return source


def _prepared_builder(name: str, data_dir: str | None, fields: Fields) -> tfds.core.DatasetBuilder:
    if data_dir and '://' not in data_dir and not os.path.isdir(data_dir):
        raise DataError(f'{fields.dir} = {data_dir} is no folder; if {name} is to be downloaded into it, make it first')
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = [*OWN, *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, known) or ['digits', 'folder', 'cifar10', 'imagenet2012']
        raise DataError(f'{fields.dataset} = {name!r} is unknown; nearest: {", ".join(near)}') from error
    except (ValueError, AssertionError) as error:  # no such config or version; not a name at all
        raise DataError(f'{fields.dataset} = {name!r}: {_first_line(error)}') from error
    if builder.info.splits:
        return builder
    folder = pathlib.Path(builder.data_dir).parents[builder.info.full_name.count('/')]  # without name/version
    log.warning('%s is not prepared in %s: TFDS now downloads and prepares it', name, folder)
    try:
        _prepare(builder)
    except Exception as error:  # whatever a download, a parser or a disk may raise
        again = tfds.builder(name, data_dir=data_dir)
        if again.info.splits:  # another process was faster, and ours then in its way
            return again
        raise DataError(
            f'{fields.dataset} = {name!r} is not prepared in {fields.dir} = {folder} and preparing it failed'
            f' ({_first_line(error)}); try: tfds build {name} --data_dir={folder}'
        ) from error
    return builder


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Has TFDS prepare a data set, but give a download up within seconds and without a line for every retry."""
    chatter = logging.getLogger('urllib3.connectionpool')
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with mock.patch.object(downloader, 'MAX_RETRIES', _RETRIES):  # TFDS has no option for it
            builder.download_and_prepare()
    finally:
        chatter.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip(' :.')


def _record_source(
    builder: tfds.core.DatasetBuilder, name: str, classes: tuple[str, ...], keys: Keys, split: str, fields: Fields
) -> RecordSource:
    try:
        instructions = builder.info.splits[split].file_instructions
    except (ValueError, KeyError) as error:
        known = ', '.join(builder.info.splits)
        raise DataError(f'{fields.split} = {split!r} must be one of {known}, or a part such as train[:90%]') from error
    parts = [Part(part.filename, part.skip, part.take, part.examples_in_shard) for part in instructions]
    return open_records(name, classes, keys, parts, fields.dir)


def _decode_all(source: RecordSource, shape: tuple[int, int, int]) -> ArraySource:
    pixels, labels = (
        np.empty((source.num_examples, *shape), np.uint8),
        np.empty(source.num_examples, np.int32),
    )

    def decode_one(contents: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(images.decode(contents), shape)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def decode(encoded: tf.Tensor) -> tf.Tensor:  # five times as fast as a call for every image
        return tf.map_fn(decode_one, encoded, fn_output_signature=tf.TensorSpec(shape, tf.uint8))

    def fill(first: int) -> None:
        rows = np.arange(first, min(first + _DECODE_CHUNK, source.num_examples))
        encoded, labels[rows], _ = source.read(rows)
        try:
            pixels[rows] = decode(encoded.tolist())
        except tf.errors.InvalidArgumentError as error:
            raise DataError(
                f'{source.name}: a damaged image, or one that is not {shape[0]} × {shape[1]} pixels, between'
                f' {source.locate(rows[0])} and {source.locate(rows[-1])}; prepare the data set again'
            ) from error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, source.num_examples, _DECODE_CHUNK)))
    return ArraySource(source.name, source.classes, pixels, labels)
