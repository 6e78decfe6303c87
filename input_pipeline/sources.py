"""Where examples come from. Every source can read any example by its index, at any time, from any thread.

That is the whole contract, and what makes order, sharding and resumption arithmetic (`order.py`). A source
either holds all its images in memory, of one shape, or reads them encoded.
"""

import dataclasses
import pathlib
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from input_pipeline.errors import DataError

WHOLE_IMAGE = np.array([[0, 0, 1, 1]], np.float32)  # the box of an image that nobody has annotated
WHOLE_IMAGE.flags.writeable = False

EMBEDDED = ('digits', 'sample_photos')  # data sets that need no folder
OWN = (*EMBEDDED, 'folder', 'imagenet_tfrecords')  # those that are not TFDS'


class Examples(NamedTuple):
    """What `Source.read` gives for k indices.

    Attributes:
        images: uint8 [k, H, W, 3], or an object array [k] of bytes, empty where they cannot be read.
        labels: int32 [k]; of a source with label sets uint8 [k, classes], 1 for every class that is right, and none
            at all for an example that is not to be counted.
        boxes: k arrays float32 [m, 4], m ≥ 1: top, left, bottom, right of what the image shows, in parts of its
            sides; `WHOLE_IMAGE` where nothing is annotated.
    """

    images: np.ndarray
    labels: np.ndarray
    boxes: Sequence[np.ndarray]


class Source(Protocol):
    """A split of a data set.

    Attributes:
        name: of data set and split, for messages.
        classes: class names; a label is an index into them.
        num_examples: number of examples.
        image_shape: (H, W, 3) of the images held in memory, None if they are read encoded.
        label_sets: whether an example has a set of right classes in place of one label; such a split is for testing.
    """

    name: str
    classes: tuple[str, ...]
    label_sets: bool

    @property
    def num_examples(self) -> int: ...  # noqa: D102

    @property
    def image_shape(self) -> tuple[int, int, int] | None: ...  # noqa: D102

    def read(self, indices: np.ndarray) -> Examples:
        """Reads the examples int64 [k], each of 0 … num_examples − 1."""

    def locate(self, index: int) -> str:
        """Where a person finds the example: a path, or a file and the number of a record."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """A split in memory: images uint8 [N, H, W, 3], labels int32 [N]."""

    name: str
    classes: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray
    label_sets: bool = False

    def __post_init__(self):
        check_labels(self, np.arange(self.num_examples), self.labels)

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and 3."""
        return self.images.shape[1:]

    def read(self, indices: np.ndarray) -> Examples:
        """The given examples."""
        return Examples(self.images[indices], self.labels[indices], [WHOLE_IMAGE] * len(indices))

    def locate(self, index: int) -> str:
        """The example's number is all there is."""
        return f'{self.name} example {index}'


@dataclasses.dataclass(frozen=True, eq=False)
class CachedSource:
    """A source of encoded images that keeps what it has read in memory, up to a limit, for the passes to come.

    Every pass comes in another order, in which every example is as likely to be next as any other. So nothing is
    ever thrown out for something else: the first that fit stay. What could not be read is tried again.

    Attributes:
        source: that is read.
        limit: bytes of encoded images to keep, in this process.
        kept: the examples kept, by index: bytes, label and boxes.
    """

    source: Source
    limit: int
    kept: dict[int, tuple[bytes, np.int32, np.ndarray]] = dataclasses.field(default_factory=dict)
    _used: list[int] = dataclasses.field(default_factory=lambda: [0])  # one number, which changes
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __post_init__(self):
        if self.limit < 0:
            raise DataError(f'input.cache = {self.limit / 2**30:g} must be at least 0 GiB')

    def __getattr__(self, name: str) -> object:
        """Everything but reading is the source's: name, classes, num_examples, image_shape, label_sets, locate."""
        return getattr(self.source, name)

    def read(self, indices: np.ndarray) -> Examples:
        """The given examples, from memory where they are there."""
        missing = [index for index in indices.tolist() if index not in self.kept]
        found = dict(zip(missing, zip(*self.source.read(np.array(missing, np.int64)), strict=True), strict=True))
        for index, example in found.items():
            self._keep(index, example)
        images, labels = np.empty(len(indices), object), np.empty(len(indices), np.int32)
        boxes = []
        for row, index in enumerate(indices.tolist()):
            images[row], labels[row], box = found[index] if index in found else self.kept[index]
            boxes.append(box)
        return Examples(images, labels, boxes)

    def _keep(self, index: int, example: tuple[bytes, np.int32, np.ndarray]) -> None:
        with self._lock:
            size = len(example[0])
            if size and index not in self.kept and self._used[0] + size <= self.limit:
                self.kept[index] = example
                self._used[0] += size


class Fields(NamedTuple):
    """What a config calls the things a split is opened by, for messages."""

    dataset: str
    dir: str
    split: str


TRAIN = Fields('dataset', 'input.dir', 'input.train_split')
TEST = Fields('dataset', 'input.dir', 'input.test_split')
OTHER_TEST = Fields('input.test_dataset', 'input.test_dir', 'input.test_split')


def check_labels(source: Source, indices: Sequence[int] | np.ndarray, labels: np.ndarray) -> None:
    """Compares labels with the classes that the source has.

    Args:
        source: the source of the labels.
        indices: int64 [k], whose labels these are.
        labels: int32 [k].

    Raises:
        DataError: for the first label that names no class.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= len(source.classes)))
    if len(wrong):
        raise DataError(
            f'{source.name}: example {indices[wrong[0]]} ({source.locate(int(indices[wrong[0]]))}) has label'
            f' {labels[wrong[0]]}, must be 0 to {len(source.classes) - 1} with {len(source.classes)} classes'
        )


def open_source(
    name: str,
    split: str,
    data_dir: str | None = None,
    *,
    train_split: str = 'train',
    classes: tuple[str, ...] | None = None,
    fields: Fields | None = None,
) -> Source:
    """Opens a split of a data set.

    Args:
        name: 'digits' or 'sample_photos' (scikit-learn's, no download), 'folder' (data_dir/<split>/<class>/<image>),
            'imagenet_tfrecords' (data_dir/<split>-00000-of-01024) or the name of a TFDS data set, with its config
            if need be: 'name/config'.
        split: name of the split; TFDS understands 'train[:90%]' and the like.
        data_dir: where the images or the prepared TFDS data lie; None: TFDS' own default.
        train_split: the run's training split; its folders define the classes of 'folder'.
        classes: of 'folder' in place of those, where another data set is trained on.
        fields: what errors call the first three; None: `TRAIN` for the training split, else `TEST`.

    Returns:
        A source that can be read at any index.

    Raises:
        DataError: if there is no such data set, split or folder, or it cannot be used; says what would do.
    """
    fields = fields or (TRAIN if split == train_split else TEST)
    if name == 'digits':
        from input_pipeline import digits as kind

        source = kind.open_digits(split, fields.split)
    elif name == 'sample_photos':
        from input_pipeline import sample_photos as kind

        source = kind.open_sample_photos(split, fields.split)
    elif name == 'folder':
        from input_pipeline import folder as kind

        if data_dir is None:
            raise DataError(f'{fields.dir} is empty; with {fields.dataset} = {name!r} it must name a folder')
        source = kind.open_folder(pathlib.Path(data_dir).expanduser(), split, train_split, classes, fields)
    elif name == 'imagenet_tfrecords':
        from input_pipeline import imagenet as kind

        if data_dir is None:
            raise DataError(f'{fields.dir} is empty; with {fields.dataset} = {name!r} it must name a folder')
        source = kind.open_shards(pathlib.Path(data_dir).expanduser(), split, fields)
    else:
        from input_pipeline import tfds_source as kind

        source = kind.open_tfds(name, split, data_dir, fields)
    if source.num_examples == 0:
        raise DataError(f'{fields.split} = {split!r} of {name} has no examples')
    return source
