"""What stands for "the user can mend this", and the one line that every command then ends with."""

import sys
from typing import NoReturn


class ConfigError(Exception):
    """A setting that cannot work; the message names the field, its value and what would be right."""


class RunError(Exception):
    """A run that cannot go on (weights stay non-finite, disk full); the message says how to go on."""


def leave(problem: object) -> NoReturn:
    """Ends a command with what is wrong as one line on standard error, and status 2."""
    print('error: ' + ' '.join(str(problem).split()), file=sys.stderr)
    sys.exit(2)
