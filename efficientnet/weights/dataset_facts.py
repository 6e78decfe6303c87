"""dataset.json of a run: what of its data set a trained model needs, so that it can be used without the data."""

import itertools
import json
import operator
import pathlib
from typing import Any, NamedTuple

from efficientnet.errors import ConfigError
from efficientnet.loop.files import write_json
from input_pipeline import Source

FILE = 'dataset.json'


class DatasetFacts(NamedTuple):
    """What is kept of a data set.

    Attributes:
        classes: Class names by label.
        image_shape: Of images held in memory, (H, W, 3); None if they are read encoded.
        num_examples: Of the training split; None where nobody knows, as of weights that were converted.
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, ...] | None
    num_examples: int | None = None


def facts_of(source: Source) -> DatasetFacts:
    """Returns the facts of an open training split."""
    return DatasetFacts(tuple(source.classes), source.image_shape, source.num_examples)


def write_facts(workdir: pathlib.Path, facts: DatasetFacts) -> None:
    """Writes dataset.json."""
    write_json(workdir / FILE, facts._asdict())


def read_facts(workdir: pathlib.Path) -> DatasetFacts:
    """Reads dataset.json; raises ConfigError if it is missing or damaged."""
    path = workdir / FILE
    try:
        return facts_of_json(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise ConfigError(f'{workdir} has no {FILE}; the command that trained this run writes it') from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{path} is damaged ({error}); the command that trained this run writes it') from error


def facts_of_json(found: Any) -> DatasetFacts:
    """Returns the facts as JSON has them; raises KeyError, TypeError or ValueError if it has others."""
    classes, shape, count = found['classes'], found['image_shape'], found.get('num_examples')
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError('its classes are not a list of names')
    if shape is not None:
        shape = tuple(map(operator.index, shape))
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f'its image_shape is {shape}')
    return DatasetFacts(tuple(classes), shape, None if count is None else operator.index(count))


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


def check_examples(workdir: pathlib.Path, facts: DatasetFacts) -> None:
    """Raises ConfigError if the run in `workdir` was made with more or fewer training images than these.

    Their number decides how many updates there are and the order of the images, of which some would be repeated and
    others skipped.
    """
    before, now = read_facts(workdir).num_examples, facts.num_examples
    if before not in (None, now):
        raise ConfigError(
            f'{workdir} holds a run on {before:,} training images, the data set has {now:,}; '
            'restore those, or give another --workdir'
        )
