"""The two photographs that come with scikit-learn: real JPEGs in a package, to see a recipe for photographs start."""

import pathlib

import numpy as np

from input_pipeline.errors import DataError
from input_pipeline.folder import FolderSource

_SPLITS = ('train', 'validation', 'test')
_CLASSES = ('china', 'flower')


def open_sample_photos(split: str, field: str) -> FolderSource:
    """A temple and a flower, 427 × 640 pixels, each a class of its own; all splits are the same two.

    Args:
        split: 'train', 'validation' or 'test'.
        field: the config field that named the split.

    Raises:
        DataError: if there is no such split.
    """
    if split not in _SPLITS:
        raise DataError(f'{field} = {split!r} must be one of {", ".join(_SPLITS)} for dataset sample_photos')
    from sklearn import datasets  # here: a second to import, for one of the sources

    folder = pathlib.Path(datasets.__file__).parent / 'images'
    paths = tuple(str(folder / f'{name}.jpg') for name in _CLASSES)
    return FolderSource(f'sample_photos {split}', _CLASSES, paths, np.arange(len(paths), dtype=np.int32))
