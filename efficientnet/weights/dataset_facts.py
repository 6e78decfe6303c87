"""dataset.json of a run: what of its data set a trained model needs, so that it can be used without the data."""

import itertools
import json
import pathlib
from typing import NamedTuple

from efficientnet.errors import ConfigError
from efficientnet.loop.reporting import write_json
from input_pipeline import Source

FILE = 'dataset.json'


class DatasetFacts(NamedTuple):
    """Class names by label, and the shape (H, W, 3) of images held in memory, None if they are read encoded."""

    classes: tuple[str, ...]
    image_shape: tuple[int, ...] | None


def facts_of(source: Source) -> DatasetFacts:
    """Returns the facts of an open data set."""
    return DatasetFacts(tuple(source.classes), source.image_shape)


def write_facts(workdir: pathlib.Path, facts: DatasetFacts) -> None:
    """Writes dataset.json."""
    write_json(workdir / FILE, facts._asdict())


def read_facts(workdir: pathlib.Path) -> DatasetFacts:
    """Reads dataset.json; raises ConfigError if it is missing or damaged."""
    path = workdir / FILE
    try:
        found = json.loads(path.read_text())
        return DatasetFacts(tuple(found['classes']), found['image_shape'] and tuple(found['image_shape']))
    except FileNotFoundError as error:
        raise ConfigError(f'{workdir} has no {FILE}; the command that trained this run writes it') from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{path} is damaged ({error}); the command that trained this run writes it') from error


def check_classes(workdir: pathlib.Path, facts: DatasetFacts) -> None:
    """Raises ConfigError if the run in `workdir`, where there is one, was made with other classes than these."""
    if not (workdir / FILE).exists():
        return
    before, now = read_facts(workdir).classes, facts.classes
    if before != now:
        pairs = enumerate(itertools.zip_longest(before, now))
        index, (old, new) = next((index, pair) for index, pair in pairs if pair[0] != pair[1])
        raise ConfigError(
            f'{workdir} holds a run with {len(before)} classes, the data set has {len(now)}; the first that differs '
            f'is class {index}: {old!r} there, {new!r} now'
        )
