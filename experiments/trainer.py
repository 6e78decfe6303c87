"""A run of main.py in a process of its own: what sweeps and claims are made of.

In a process of its own because memory, compiled programs and crashes stay in it, because SIGTERM makes it save and
leave, and because its command can be typed again by hand. Its folder is all that is read of it.
"""

import contextlib
import csv
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from efficientnet.errors import ConfigError, plainly
from efficientnet.loop.settings import check_known

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = (sys.executable, str(ROOT / 'main.py'))
LOG = 'log.txt'  # in a run's folder: what it said
POLL = 0.5  # seconds between two looks at a run
PATIENCE = 120.0  # seconds for a run to save after SIGTERM


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: with a summary, with an error, or, with neither, because it was told to leave."""

    summary: dict[str, Any] | None = None  # of summary.json
    error: str | None = None  # one line
    status: int = 0  # of the process that ended with an error; below 0 the signal that killed it


def load_recipe(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Returns a recipe as main.py would have it.

    Args:
        path: Such as 'configs/digits.py'.
        overrides: Such as '--config.epochs=2'.

    Raises:
        ConfigError: It cannot be loaded, or a field is unknown or of another type.
    """
    found, argv = flags.FlagValues(), ['', f'--config={path}', *overrides]
    config_flags.DEFINE_config_file('config', None, 'Recipe.', lock_config=True, flag_values=found, sys_argv=argv)
    try:
        rest = found(argv)
        found.config.keys()  # a recipe that could not be loaded says so only when it is used
    except Exception as error:  # ml_collections raises AttributeError, TypeError, ValueError, … for a bad override
        said = plainly(error)
        raise ConfigError(said if path in said else f'{path}: {said}') from error
    if rest[1:]:
        raise ConfigError(f'unexpected argument {rest[1]!r}; flags start with --')
    if not isinstance(found.config, ml_collections.ConfigDict):
        raise ConfigError(f'{path} must return a ConfigDict, not {found.config!r}')
    check_known(found.config)
    return found.config


def make_folder(flag: str, folder: pathlib.Path) -> None:
    """Makes a folder that a command is to write to.

    Raises:
        ConfigError: It cannot be made; the flag it was given by is named.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f'--{flag}: folder {folder} cannot be made: {error.strerror}') from None


def check_file(flag: str, path: pathlib.Path) -> None:
    """Makes sure, before there is anything to write, that a file can be written.

    Raises:
        ConfigError: It cannot be; the flag it was given by is named.
    """
    if path.is_dir():
        raise ConfigError(f'--{flag}={path} is a folder; it must be a file')
    make_folder(flag, path.parent)
    draft = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise ConfigError(f'--{flag}={path} cannot be written: {error.strerror}') from None


def overrides(arguments: Sequence[str]) -> list[str]:
    """Returns what is left of a command line, if all of it sets fields of the recipe.

    Raises:
        ConfigError: An argument is something else.
    """
    for argument in arguments:
        if not argument.startswith('--config.'):
            raise ConfigError(f'unrecognized argument {argument!r}; a field is set by --config.FIELD=VALUE')
    return list(arguments)


def overridden(arguments: Sequence[str]) -> list[str]:
    """Returns the fields that overrides set: 'optimizer.nesterov' for --config.optimizer.nesterov[=VALUE]."""
    return [argument.partition('=')[0].removeprefix('--config.') for argument in arguments]


def override(field: str, value: Any) -> str:
    """Returns '--config.optimizer.momentum=0.9'."""
    return f'--config.{field}={value}'


def arguments(recipe: str, given: Sequence[str], changes: Mapping[str, Any], workdir: pathlib.Path) -> list[str]:
    """Returns what follows main.py on the command line of a run: changes win over the overrides that were given."""
    return [f'--config={recipe}', *given, *(override(*change) for change in changes.items()), f'--workdir={workdir}']


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[IO | None]:
    """Holds a run's folder, or yields None if another process does; the folder is made.

    The run's own process is given the lock too (see `run`): who finds the folder free can be sure that neither who
    started the run nor the run itself is alive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / '.held').open('w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock


def run(
    given: Sequence[str],
    workdir: pathlib.Path,
    lock: IO,
    *,
    leave: Callable[[list[float]], bool],
    program: Sequence[str] = PROGRAM,
) -> Outcome:
    """Runs the trainer to its end, or until it is told to leave.

    Args:
        given: Of `arguments`.
        workdir: The run's folder.
        lock: Of `held`.
        leave: Asked every half second with the test accuracies so far; True ends the run, which saves before. Told
            of all of them when it has ended.
        program: What is started; its summary.json and metrics.csv are the trainer's.
    """
    (workdir / 'summary.json').unlink(missing_ok=True)  # of a run that was interrupted while it summarised
    with (workdir / LOG).open('ab') as log:
        start = log.tell()
        # In a session of its own, so that Ctrl-C comes to it once, from here.
        process = subprocess.Popen(
            [*program, *given], cwd=ROOT, stdout=log, stderr=log, pass_fds=[lock.fileno()], start_new_session=True
        )
        asked = _wait(process, lambda: leave(evaluations(workdir)))
    leave(evaluations(workdir))
    if process.returncode == 0:
        return Outcome(summary=json.loads((workdir / 'summary.json').read_text()))
    if asked:
        return Outcome()
    code = process.returncode
    return Outcome(error=_last_line(workdir / LOG, start) if code > 0 else _death(code), status=code)


def evaluations(workdir: pathlib.Path) -> list[float]:
    """Returns the test accuracies in a run's metrics.csv, in order."""
    path = workdir / 'metrics.csv'
    if not path.exists():
        return []
    with path.open(newline='') as file:
        # A row that is being written lacks its last columns.
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return [float(row['test_accuracy']) for row in rows if row['test_accuracy']]


def _wait(process: subprocess.Popen, leave: Callable[[], bool]) -> bool:
    """Waits for a process to end; tells whether it was asked to."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL)
            return False
        if leave():
            break
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return True


def _death(code: int) -> str:
    return f'killed by {signal.Signals(-code).name}'


def _last_line(path: pathlib.Path, start: int) -> str:
    """The last thing that a run said, which for a mistake or an uncaught exception is what was wrong."""
    with path.open('rb') as log:
        log.seek(start)
        lines = log.read().decode(errors='replace').split('\n')
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else 'it said nothing'


def in_threads(count: int, work: Callable[[], None]) -> None:
    """Calls a function in each of several threads and waits for all; raises what the first of them raised."""
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work) for _ in range(count)]:
            future.result()
