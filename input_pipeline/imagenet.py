"""ImageNet's original TFRecord shards, `train-00000-of-01024` and so on, which carry the annotated boxes.

This is the layout that the scripts of TensorFlow's first Inception models write and that many clusters still have.
Labels count from 1 there; the classes are the 1,000 WordNet numbers in their order, as in TFDS.
"""

import importlib.util
import pathlib
import re

from input_pipeline.errors import DataError
from input_pipeline.records import Keys, Part, RecordSource, open_records
from input_pipeline.sources import Fields

KEYS = Keys(
    image='image/encoded',
    label='image/class/label',
    first_label=1,
    boxes=tuple(f'image/object/bbox/{side}' for side in ('ymin', 'xmin', 'ymax', 'xmax')),
)

_SHARD = re.compile(r'(.+)-(\d{5})-of-(\d{5})')


def open_shards(root: pathlib.Path, split: str, fields: Fields) -> RecordSource:
    """Opens a split.

    Args:
        root: the shards lie in it, or in a folder of the split's name below it.
        split: first part of the files' names, 'train' or 'validation' as a rule.
        fields: what the config calls root and split.

    Returns:
        The source.

    Raises:
        DataError: if there are no such files, or not all of them.
    """
    if not root.is_dir():
        raise DataError(f'{fields.dir} = {str(root)!r} is not a folder; expected <{fields.dir}>/train-00000-of-01024')
    folder = root / split if (root / split).is_dir() else root
    shards = [found for path in folder.iterdir() if (found := _SHARD.fullmatch(path.name))]
    mine = sorted(shard.group() for shard in shards if shard[1] == split)
    if not mine:
        known = ', '.join(sorted({shard[1] for shard in shards})) or 'none at all'
        raise DataError(f'{fields.split} = {split!r}: no shards {split}-00000-of-… in {folder}; splits there: {known}')
    total = int(mine[0][-5:])
    missing = sorted({f'{split}-{i:05d}-of-{total:05d}' for i in range(total)} ^ set(mine))
    if missing:
        raise DataError(
            f'{fields.split} = {split!r}: {folder} has {len(mine)} shards that do not make up {total}: missing or not'
            f' of this set: {", ".join(missing[:5])}'
        )
    parts = [Part(str(folder / name)) for name in mine]
    return open_records(f'imagenet_tfrecords {split}', class_names(), KEYS, parts, fields.dir)


def class_names() -> tuple[str, ...]:
    """The 1,000 classes, as WordNet numbers such as n01440764, from the list that TFDS brings along."""
    package = importlib.util.find_spec('tensorflow_datasets').submodule_search_locations[0]  # seconds to import
    return tuple((pathlib.Path(package) / 'datasets/imagenet2012/labels.txt').read_text().split())
