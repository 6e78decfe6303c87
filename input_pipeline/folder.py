"""Image folders: <dir>/<split>/<class>/<image>, the layout that needs no preparation."""

import dataclasses
import pathlib

import numpy as np

from input_pipeline.errors import DataError
from input_pipeline.sources import TRAIN, WHOLE_IMAGE, Examples, Fields

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif')


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """A split in files: one path and one label an example, read when asked for."""

    name: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: np.ndarray
    image_shape: None = None
    label_sets: bool = False

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.paths)

    def read(self, indices: np.ndarray) -> Examples:
        """Bytes of the files, empty where one cannot be read, and their labels."""
        images = np.empty(len(indices), object)
        images[:] = [_bytes_or_nothing(self.paths[index]) for index in indices]
        return Examples(images, self.labels[indices], [WHOLE_IMAGE] * len(indices))

    def locate(self, index: int) -> str:
        """Path of the image."""
        return self.paths[index]


def open_folder(
    root: pathlib.Path, split: str, train_split: str, classes: tuple[str, ...] | None, fields: Fields
) -> FolderSource:
    """Lists a split's images, classes and files in the order of their names.

    Args:
        root: the folder of both splits.
        split: folder to read below it.
        train_split: folder whose class folders number the classes, for every split.
        classes: names that do so instead, those of the data set that is trained on.
        fields: what the config calls root and split.

    Returns:
        The source.

    Raises:
        DataError: if a folder is missing or empty, or holds a class that the training split lacks.
    """
    known = classes or tuple(_class_folders(root, train_split, fields._replace(split=TRAIN.split)))
    folders = _class_folders(root, split, fields)
    unknown = sorted(set(folders) - set(known))
    if unknown:
        raise DataError(
            f'{fields.split} = {split!r}: {root / split} has class folders that'
            f' {"the training data" if classes else root / train_split} lacks:'
            f' {", ".join(unknown[:5])}; the classes are those of the training split, {", ".join(known[:3])} …'
        )
    paths, labels = [], []
    for name in folders:
        files = [path for path in (root / split / name).iterdir() if path.suffix.lower() in EXTENSIONS]
        paths += sorted(map(str, files))
        labels += [known.index(name)] * len(files)
    if not paths:
        kinds = ', '.join(EXTENSIONS)
        raise DataError(f'{fields.split} = {split!r}: no images ({kinds}) below {root / split}/<class>/')
    return FolderSource(f'folder {root / split}', known, tuple(paths), np.array(labels, np.int32))


def _class_folders(root: pathlib.Path, split: str, fields: Fields) -> list[str]:
    layout = f'<{fields.dir}>/<split>/<class>/<image>.jpg'
    if not root.is_dir():
        raise DataError(f'{fields.dir} = {str(root)!r} is not a folder; expected {layout}')
    if not (root / split).is_dir():
        raise DataError(f'{fields.split} = {split!r}: there is no folder {root / split}; expected {layout}')
    names = sorted(p.name for p in (root / split).iterdir() if p.is_dir() and not p.name.startswith('.'))
    if not names:
        raise DataError(f'{fields.split} = {split!r}: {root / split} has no class folders; expected {layout}')
    return names


def _bytes_or_nothing(path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError:
        return b''
