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


def plainly(error: Exception) -> str:
    """Returns what a flag's error says; of the traceback of a recipe, which ml_collections quotes, the last line."""
    missing = error.args[0] if isinstance(error, AttributeError) and error.args else error
    if isinstance(missing, KeyError):  # whose text is quoted, with its line breaks
        return f'--config has no field {missing.args[0]}'
    where, traceback, _ = str(error).partition('Error whilst parsing config file:')
    return where + str(error).strip().splitlines()[-1].removeprefix('ValueError: ') if traceback else where
