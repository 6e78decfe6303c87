"""Examples in TFRecord files, read at any index: the source behind TFDS data sets and ImageNet's own shards."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from google.protobuf.message import DecodeError

from input_pipeline import tfrecords
from input_pipeline.errors import DataError
from input_pipeline.quiet_tf import tf
from input_pipeline.sources import WHOLE_IMAGE, Examples


@dataclasses.dataclass(frozen=True)
class Keys:
    """Names of the features of a `tf.train.Example`.

    Attributes:
        image: the encoded image.
        label: its class, or the classes that are all right, counted from `first_label` on.
        first_label: number of the first class.
        label_sets: whether there may be any number of such classes, none included.
        boxes: top, left, bottom and right of the annotated boxes, in parts of the sides; none if there are none.
    """

    image: str = 'image'
    label: str = 'label'
    first_label: int = 0
    label_sets: bool = False
    boxes: tuple[str, str, str, str] | tuple[()] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """Some records of a file, `take` from the one after `skip` on; `total` are said to be in it, if that is known."""

    path: str
    skip: int = 0
    take: int | None = None
    total: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource:
    """A split in TFRecord files.

    Attributes:
        name: of data set and split.
        classes: class names.
        keys: where in an example the image and the rest are.
        paths: the files.
        shards: int32 [N], the file of each example.
        numbers: int64 [N], its record number in the file.
        spans: int64 [N, 2], the bytes of the file that the record takes up, from and to.
    """

    name: str
    classes: tuple[str, ...]
    keys: Keys
    paths: tuple[str, ...]
    shards: np.ndarray
    numbers: np.ndarray
    spans: np.ndarray
    image_shape: None = None

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.shards)

    def read(self, indices: np.ndarray) -> Examples:
        """Encoded images, empty where the record cannot be read, with labels and boxes."""
        encoded, labels, boxes = np.empty(len(indices), object), [], []
        for row, index in enumerate(indices):
            encoded[row], label, found = self._read_one(index)
            labels.append(label)
            boxes.append(found)
        return Examples(encoded, self._joined(labels), boxes)

    @property
    def label_sets(self) -> bool:
        """Whether an example has a set of right classes."""
        return self.keys.label_sets

    def _joined(self, labels: Sequence[Sequence[int]]) -> np.ndarray:
        """The labels of k examples as `Examples` has them."""
        if not self.label_sets:
            # A label beyond 32 bits is as wrong as any that is too large: clipped, it is still found to be so.
            return np.clip(np.array([own[0] for own in labels], np.int64), -1, 2**31 - 1).astype(np.int32)
        sets = np.zeros((len(labels), len(self.classes)), np.uint8)
        for row, own in enumerate(labels):
            sets[row, list(own)] = 1
        return sets

    def _read_one(self, index: int) -> tuple[bytes, Sequence[int], np.ndarray]:
        try:
            record = tfrecords.read_record(self.paths[self.shards[index]], *self.spans[index].tolist())
            feature = tf.train.Example.FromString(record).features.feature
            return feature[self.keys.image].bytes_list.value[0], self._labels(feature), self._boxes(feature)
        except (OSError, DecodeError, IndexError):  # unreadable, no Example, or one without such features
            return b'', (0,), WHOLE_IMAGE

    def _labels(self, feature: dict[str, tf.train.Feature]) -> Sequence[int]:
        values = feature[self.keys.label].int64_list.value
        if not self.label_sets:
            return (values[0] - self.keys.first_label,)
        labels = [value - self.keys.first_label for value in values]
        if not all(0 <= label < len(self.classes) for label in labels):
            raise IndexError(labels)  # no set of our classes can hold it: the record is damaged
        return labels

    def _boxes(self, feature: dict[str, tf.train.Feature]) -> np.ndarray:
        """The annotated boxes, without what sticks out of the image and without those that are empty."""
        sides = [feature[key].float_list.value for key in self.keys.boxes if key in feature]
        if len(sides) < 4 or len({len(side) for side in sides}) > 1:
            return WHOLE_IMAGE
        boxes = np.clip(np.array(sides, np.float32).T, 0, 1)
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
        return boxes if len(boxes) else WHOLE_IMAGE

    def locate(self, index: int) -> str:
        """File, and number of the record in it."""
        return f'{self.paths[self.shards[index]]} record {self.numbers[index]}'


def open_records(name: str, classes: tuple[str, ...], keys: Keys, parts: Sequence[Part], field: str) -> RecordSource:
    """Finds the records of a split.

    Args:
        name: of data set and split.
        classes: class names.
        keys: of the examples.
        parts: of which files the split consists, in order.
        field: the config field that named their folder.

    Returns:
        The source.

    Raises:
        DataError: if a file is missing, cut short, or holds another number of records than it should.
    """
    paths = tuple(dict.fromkeys(part.path for part in parts))
    number_of = {path: number for number, path in enumerate(paths)}
    starts = tfrecords.index_shards(paths, field)
    shards, numbers, spans = [np.empty(0, np.int32)], [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)]
    for part in parts:
        start = starts[number_of[part.path]]
        if part.total not in (None, len(start) - 1):
            raise DataError(
                f'{field}: {part.path} has {len(start) - 1} records where dataset_info.json says {part.total};'
                ' prepare the data set again'
            )
        number = np.arange(part.skip, len(start) - 1 if part.take is None else part.skip + part.take)
        shards.append(np.full(len(number), number_of[part.path], np.int32))
        numbers.append(number)
        spans.append(np.stack([start[number], start[number + 1]], axis=1))
    return RecordSource(name, classes, keys, paths, *map(np.concatenate, (shards, numbers, spans)))
