"""Where examples come from. Every source can read any example by its index, at any time, from any thread.

That is the whole contract, and what makes order, sharding and resumption arithmetic (`order.py`). A source
either holds all its images in memory, of one shape, or reads them encoded.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from input_pipeline.errors import DataError


class Source(Protocol):
    """A split of a data set.

    Attributes:
        name: of data set and split, for messages.
        classes: class names; a label is an index into them.
        num_examples: number of examples.
        image_shape: (H, W, 3) of the images held in memory, None if they are read encoded.
    """

    name: str
    classes: tuple[str, ...]

    @property
    def num_examples(self) -> int: ...  # noqa: D102

    @property
    def image_shape(self) -> tuple[int, int, int] | None: ...  # noqa: D102

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads examples.

        Args:
            indices: int64 [k], each of 0 … num_examples − 1.

        Returns:
            Images, uint8 [k, H, W, 3] or an object array [k] of bytes, empty where they cannot be read; and
            labels, int32 [k].
        """

    def locate(self, index: int) -> str:
        """Where a person finds the example: a path, or a file and the number of a record."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """A split in memory: images uint8 [N, H, W, 3], labels int32 [N]."""

    name: str
    classes: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray

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

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of the given examples."""
        return self.images[indices], self.labels[indices]

    def locate(self, index: int) -> str:
        """The example's number is all there is."""
        return f'{self.name} example {index}'


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


def open_source(name: str, split: str, data_dir: str | None = None, *, train_split: str = 'train') -> Source:
    """Opens a split of a data set.

    Args:
        name: 'digits' or 'sample_photos' (scikit-learn's, no download), 'folder' (data_dir/<split>/<class>/<image>)
            or the name of a TFDS data set, with its config if need be: 'name/config'.
        split: name of the split; TFDS understands 'train[:90%]' and the like.
        data_dir: where the images or the prepared TFDS data lie; None: TFDS' own default.
        train_split: the run's training split. Its folders define the classes of 'folder', and errors about
            any other split speak of input.test_split.

    Returns:
        A source that can be read at any index.

    Raises:
        DataError: if there is no such data set, split or folder, or it cannot be used; says what would do.
    """
    field = 'input.train_split' if split == train_split else 'input.test_split'
    if name == 'digits':
        from input_pipeline import digits as kind

        source = kind.open_digits(split, field)
    elif name == 'sample_photos':
        from input_pipeline import sample_photos as kind

        source = kind.open_sample_photos(split, field)
    elif name == 'folder':
        from input_pipeline import folder as kind

        if data_dir is None:
            raise DataError("input.dir = None must name a folder when dataset is 'folder'")
        source = kind.open_folder(pathlib.Path(data_dir).expanduser(), split, train_split, field)
    else:
        from input_pipeline import tfds_source as kind

        source = kind.open_tfds(name, split, data_dir, field)
    if source.num_examples == 0:
        raise DataError(f'{field} = {split!r} of {name} has no examples')
    return source
