"""What stands for "the user can mend this", and the one line that every command then ends with."""

import contextlib
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from input_pipeline.errors import DataError


class ConfigError(Exception):
    """A setting that cannot work; the message names the field, its value and what would be right."""


class RunError(Exception):
    """A run that cannot go on (weights stay non-finite, disk full); the message says how to go on."""


class DivergedError(RunError):
    """Updates that stay non-finite: what a recipe does, wherever it runs."""


MISTAKES = (ConfigError, DataError, RunError)  # that a user can mend


def status(problem: object) -> int:
    """Returns the exit status of a command that ends with a problem: 4 if a run diverged, else 2."""
    return 4 if isinstance(problem, DivergedError) else 2


def leave(problem: object) -> NoReturn:
    """Ends a command with what is wrong as one line on standard error, and the problem's status."""
    print('error: ' + ' '.join(str(problem).split()), file=sys.stderr)
    sys.exit(status(problem))


def mute_stdout() -> None:
    """Sends nowhere what is still to be printed: whoever read it has left, or it cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def one_line(speaks: Callable[[Exception], bool] = lambda _: True) -> Iterator[None]:
    """Ends a command with one line for what the user can mend, and quietly on Ctrl-C, or if nobody reads on.

    Args:
        speaks: Whether this process is the one to say what is wrong.
    """
    if sys.stdout is None:  # it was closed, as by >&-
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every terminal has ×, and a path need not be text at all
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        yield
        _flush()
    except MISTAKES as error:
        try:
            sys.stdout.flush()
        except OSError:  # what is left there can't be written, which the error says
            mute_stdout()
        if speaks(error):
            leave(error)
        sys.exit(status(error))
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        mute_stdout()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f'standard output cannot be written: {error.strerror}') from error


def plainly(error: Exception) -> str:
    """Returns what a flag's error says; of the traceback of a recipe, which ml_collections quotes, the last line."""
    unread = re.search(r"""failure to load: .*\[Errno \d+\] (.*): ['"](.*)['"]""", str(error), re.DOTALL)
    if unread:  # the recipe, or a file that it opens
        return f'--config: {unread[2]} cannot be read: {unread[1]}'
    line = _line_of_recipe(error)
    missing = error.args[0] if isinstance(error, AttributeError) and error.args else error
    if isinstance(missing, KeyError) and missing.args and (missing is not error or not line):
        said = str(missing.args[0])  # which names the field first, may then list all others, and may end with a guess
        name, guess = re.search(r'["\'](.*?)["\']', said), re.search(r'Did you mean "(.*?)"', said)
        told = repr(name[1] if name else said) + (f'; did you mean {guess[1]!r}?' if guess else '')
        return f'{line}: ' * bool(line) + f'--config has no field {told}'
    where, quoted, _ = str(error).partition('Error whilst parsing config file:')
    if quoted:
        said = str(error).strip().splitlines()[-1]
        if 'get_config() takes 0 positional arguments' in said:
            return f'{where.strip()} this recipe takes nothing behind a colon'
        if said.startswith('ValueError: '):  # raised for people, as in configs/arguments.py
            return where + said.removeprefix('ValueError: ')
        return f'{line or where.strip(": ")}: {said}'
    if line:
        return f'{line}: {type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}'
    return where


def _line_of_recipe(error: BaseException | None) -> str:
    """Returns where in a recipe, or in what it calls, an error arose: 'PATH, line N', or '' if not there."""
    if isinstance(error, SyntaxError):
        return f'{error.filename}, line {error.lineno}'
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        loaders = [place for place, frame in enumerate(frames) if frame.filename.endswith('config_flags.py')]
        for frame in reversed(frames[loaders[-1] + 1 :] if loaders else []):
            if '-packages' not in frame.filename and not frame.filename.startswith('<'):
                return f'{frame.filename}, line {frame.lineno}'
        error = error.__context__
    return ''
