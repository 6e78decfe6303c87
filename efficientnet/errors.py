"""What stands for "the user can mend this", and the one line that every command then ends with."""

import re
import sys
from typing import NoReturn


class ConfigError(Exception):
    """A setting that cannot work; the message names the field, its value and what would be right."""


class RunError(Exception):
    """A run that cannot go on (weights stay non-finite, disk full); the message says how to go on."""


class DivergedError(RunError):
    """Updates that stay non-finite: what a recipe does, wherever it runs."""


def status(problem: object) -> int:
    """Returns the exit status of a command that ends with a problem: 4 if a run diverged, else 2."""
    return 4 if isinstance(problem, DivergedError) else 2


def leave(problem: object) -> NoReturn:
    """Ends a command with what is wrong as one line on standard error, and the problem's status."""
    print('error: ' + ' '.join(str(problem).split()), file=sys.stderr)
    sys.exit(status(problem))


def plainly(error: Exception) -> str:
    """Returns what a flag's error says; of the traceback of a recipe, which ml_collections quotes, the last line."""
    unread = re.search(r"""failure to load: .*\[Errno \d+\] (.*): ['"](.*)['"]""", str(error), re.DOTALL)
    if unread:  # the recipe, or a file that it opens
        return f'--config: {unread[2]} cannot be read: {unread[1]}'
    missing = error.args[0] if isinstance(error, AttributeError) and error.args else error
    if isinstance(missing, KeyError):  # whose text is quoted, with its line breaks
        return f'--config has no field {missing.args[0]}'
    where, traceback, _ = str(error).partition('Error whilst parsing config file:')
    return where + str(error).strip().splitlines()[-1].removeprefix('ValueError: ') if traceback else where
