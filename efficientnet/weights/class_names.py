"""Class names for people: ImageNet's data sets number their classes by WordNet's ids, such as n01440764."""

import functools
import pathlib
from collections.abc import Sequence

TABLE = pathlib.Path(__file__).with_name('imagenet_classes.txt')  # one 'id name' a line, in ImageNet-1k's order


@functools.cache
def imagenet() -> dict[str, str]:
    """Returns {'n01440764': 'tench', …}, the 1,000 classes of ImageNet-1k in order.

    Source: ids of the ILSVRC 2012 development kit, the first of WordNet's words for each.
    """
    return dict(line.split(' ', 1) for line in TABLE.read_text().splitlines())


def readable(classes: Sequence[str]) -> tuple[str, ...]:
    """Replaces those that are ids of ImageNet-1k by their names and leaves the others alone."""
    return tuple(imagenet().get(name, name) for name in classes)
