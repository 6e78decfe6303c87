"""The folder of a run as files: what they are called, JSON that is whole or not there, and what a disk can say."""

import json
import pathlib
from typing import Any

from efficientnet.errors import ConfigError

CONFIG, CHECKPOINTS = 'config.json', 'checkpoints'
REPLACED = '.replaced'  # ends the name of a checkpoint until another is in its place


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    draft = path.with_suffix('.tmp')
    draft.write_text(json.dumps(values, indent=2) + '\n')
    draft.replace(path)


def read_stored(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the nested fields of the run in a folder.

    Raises:
        ConfigError: The file is damaged.
    """
    try:
        found = json.loads((workdir / CONFIG).read_text())
        if not isinstance(found, dict):
            raise ValueError(f'{type(found).__name__} instead of fields')
        return found
    except (OSError, ValueError) as error:
        raise ConfigError(f'{workdir / CONFIG} is damaged ({error}); restore it or give another folder') from error


def disk_problem(error: Exception) -> str | None:
    """Returns what is wrong with the disk, or None if the error is of something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore reports a full disk as a ValueError with such a text.
    return 'No space left on device' if 'No space left' in str(error) else None
