"""The runs of the claims: one of main.py for each setting and seed, in a folder of its own, and a row for each.

A run is done when its folder has outcome.json, and it is done again when what it would be given has changed. One that
was killed goes on from its checkpoint. Several commands, on several machines too, may share a folder.

A run that diverges has said something of its setting, and is done; those that would start from its weights count as
diverged too and are not trained. One that is refused (no data, no room, a field out of range) or killed has not: the
former ends everything, since all others would be refused too, and after the latter the others go on; the same command
then tries again.
"""

import csv
import dataclasses
import io
import json
import math
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from efficientnet.errors import ConfigError, DivergedError, status
from experiments import trainer
from experiments.claims.table import Scale, Setting

OUTCOME = 'outcome.json'
REFUSED, DIVERGED = status(ConfigError()), status(DivergedError())  # of a run's process
COLUMNS = (
    'setting',
    'seed',
    'test_accuracy',
    'test_accuracy_averaged',  # of the weights averaged over epochs
    'test_loss',
    'seconds',  # in updates, those of the run that it starts from included; neither compilation nor evaluation
    'images_per_second',
    'steps',
    'skipped',
    'parameters',
    'classes',
    'device',
    'jax',
    'error',  # of a run that diverged
    'command',
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a setting and a seed."""

    name: str  # of the setting
    setting: Setting
    seed: int
    scale: Scale
    folder: pathlib.Path  # of all runs of the scale
    more: Sequence[str] = ()  # --config.FIELD=VALUE for all, such as where the data is

    @property
    def workdir(self) -> pathlib.Path:
        """Its folder."""
        words = ''.join(letter if letter.isalnum() or letter == '.' else ' ' for letter in self.name.lower())
        return self.folder / '-'.join(words.split()) / f'seed{self.seed}'

    def start(self, every: Mapping[str, Setting]) -> 'Run | None':
        """Returns the run whose weights it starts with, if any."""
        name = self.setting.starts_from
        return dataclasses.replace(self, name=name, setting=every[name]) if name else None

    def arguments(self, every: Mapping[str, Setting]) -> list[str]:
        """Returns its flags of main.py."""
        common = self.scale.changes | {'global_batch': self.scale.batches[0]}
        given = [trainer.override(*change) for change in common.items() if change[0] not in self.setting.changes]
        changes = dict(self.setting.changes)
        start = self.start(every)
        if start:
            changes['init_from'] = start.workdir
        changes['seed'] = self.seed
        devices = [f'--cpu_devices={self.setting.cpu_devices}'] if self.setting.cpu_devices else []
        return trainer.arguments(self.scale.recipe, [*given, *self.more], changes, self.workdir) + devices


def plan(
    scale: Scale, every: Mapping[str, Setting], names: Iterable[str], folder: pathlib.Path, more: Sequence[str]
) -> list[Run]:
    """Returns the runs of some settings, all of seed 0 first: a table half done then says something of each."""
    names = list(names)
    return [Run(name, every[name], seed, scale, folder, more) for seed in range(scale.seeds) for name in names]


class Runner:
    """Works through runs, in several threads or processes at a time."""

    def __init__(
        self,
        runs: Sequence[Run],
        every: Mapping[str, Setting],
        *,
        stop: Callable[[], bool],
        say: Callable[[str], None],
        program: Sequence[str] = trainer.PROGRAM,
    ) -> None:
        self._waiting, self._every = list(runs), every
        self._stop, self._say, self._program = stop, say, program
        self._turn = threading.Condition()
        self._refused = False
        self._running: set[pathlib.Path] = set()

    def work(self) -> None:
        """Takes one run after the other until none is left or told to stop.

        Raises:
            ConfigError: A run was refused.
        """
        while (run := self._next()) is not None:
            try:
                self._do(run)
            finally:
                with self._turn:
                    self._running.discard(run.workdir)
                    self._turn.notify_all()

    def _next(self) -> Run | None:
        """The next run; waits while all that are left start from one that is under way."""
        with self._turn:
            while self._waiting and not self._leaves():
                for run in self._waiting:
                    start = run.start(self._every)
                    if not (start and start.workdir in self._running):
                        self._waiting.remove(run)
                        self._running.add(run.workdir)
                        return run
                self._turn.wait(trainer.POLL)
        return None

    def _leaves(self) -> bool:
        return self._refused or self._stop()

    def _do(self, run: Run) -> None:
        given, start = run.arguments(self._every), run.start(self._every)
        if read(run, self._every) is not None:
            return
        before = read(start, self._every) if start else {'seconds': 0.0, 'error': None}
        if before is None:
            self._say(f'{run.name}, seed {run.seed}: has to wait for {start.name}; the same command goes on with it')
            return
        with trainer.held(run.workdir) as lock:
            if lock is None:
                self._say(f'{run.name}, seed {run.seed}: another process is at it')
                return
            _forget_other(run.workdir, given)
            if before['error']:
                outcome = trainer.Outcome(error=f'{start.name} diverged', status=DIVERGED)
            else:
                outcome = trainer.run(given, run.workdir, lock, leave=lambda _: self._leaves(), program=self._program)
            if outcome == trainer.Outcome():
                self._say(f'{run.name}, seed {run.seed}: stopped; the same command goes on with it')
                return
            if outcome.error and outcome.status != DIVERGED:
                if outcome.status == REFUSED:
                    self._refused = True
                    raise ConfigError(f'{run.name}, seed {run.seed}: {outcome.error.removeprefix("error: ")}')
                self._say(f'{run.name}, seed {run.seed}: {outcome.error}; the same command tries again')
                return
            row = _row(run, given, outcome, before['seconds'])
            _write_whole(run.workdir / OUTCOME, json.dumps({'arguments': given, 'row': row}, indent=2))
            if run.name not in {setting.starts_from for setting in self._every.values()}:
                shutil.rmtree(run.workdir / 'checkpoints', ignore_errors=True)  # nobody will use the weights
        self._say(f'{run.name}, seed {run.seed}: ' + (row['error'] or f'{row["test_accuracy"]:.2%}'))


def read(run: Run, every: Mapping[str, Setting]) -> dict[str, Any] | None:
    """Returns the row of a run that is done with the arguments it would be given now, else None."""
    found = _read_json(run.workdir / OUTCOME)
    if not isinstance(found, dict) or found.get('arguments') != run.arguments(every):
        return None
    row = found.get('row')
    return row if isinstance(row, dict) and set(row) == set(COLUMNS) else None


def write_rows(rows: Iterable[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Writes rows as CSV.

    Raises:
        ConfigError: The file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    try:
        _write_whole(path, text.getvalue())
    except OSError as error:
        raise ConfigError(f'--results={path} cannot be written: {error.strerror}') from None


def read_rows(path: pathlib.Path, every: Iterable[str]) -> list[dict[str, Any]]:
    """Reads rows as `write_rows` writes them, numbers as numbers.

    Args:
        path: Of the file.
        every: Names of the settings there may be.

    Raises:
        ConfigError: The file cannot be read, or is not one of these; file, line and column are named.
    """
    rows, seen, every = [], set(), set(every)
    try:
        if not path.read_bytes().endswith(b'\n'):
            raise ConfigError(f'{path} is cut short: its last line does not end')
        with path.open(newline='', encoding='utf-8') as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ConfigError(f'{path} must begin with the columns {",".join(COLUMNS)}')
            for texts in reader:
                row = _row_of(texts, f'{path}, line {reader.line_num}')
                key = row['setting'], row['seed']
                if row['setting'] not in every:
                    raise ConfigError(f'{path}, line {reader.line_num}: no claim has a setting={row["setting"]!r}')
                if key in seen:
                    raise ConfigError(f'{path}, line {reader.line_num}: {key[0]!r} with seed {key[1]} comes twice')
                seen.add(key)
                rows.append(row)
    except OSError as error:
        raise ConfigError(f'{path} cannot be read: {error.strerror}') from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f'{path} is no CSV: {error}') from None
    if not rows:
        raise ConfigError(f'{path} holds no runs')
    return rows


def collect(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Returns the rows by setting and seed."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row['setting'], {})[row['seed']] = row
    return found


def _row(run: Run, given: Sequence[str], outcome: trainer.Outcome, before: float) -> dict[str, Any]:
    # Paths are of this machine; a reader gives his own.
    command = ' '.join(f"'{word}'" if ' ' in word else word for word in given if str(run.folder) not in word)
    row = dict.fromkeys(COLUMNS) | {'setting': run.name, 'seed': run.seed, 'error': outcome.error}
    row |= {'command': f'python main.py {command}', 'classes': run.scale.classes}
    if outcome.summary:
        row |= {name: outcome.summary[name] for name in COLUMNS if name in outcome.summary}
        images = outcome.summary['steps'] * outcome.summary['global_batch']
        row['seconds'] = images / outcome.summary['images_per_second'] + before
    return row


def _forget_other(workdir: pathlib.Path, given: Sequence[str]) -> None:
    """Empties the folder of a run that was begun with other arguments."""
    path = workdir / 'arguments.json'
    if _read_json(path) == list(given):
        return
    for entry in workdir.iterdir():
        if entry.name != '.held':
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    path.write_text(json.dumps(list(given)))


def _write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one."""
    draft = path.with_suffix('.tmp')
    draft.write_text(text)
    draft.replace(path)


def _read_json(path: pathlib.Path) -> Any:
    """What a file of a run says; None if it is not there or damaged, upon which the run is done again."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _row_of(texts: Mapping[str, str], where: str) -> dict[str, Any]:
    """The row of a line of CSV; `where` is for errors."""
    if None in texts or None in texts.values():
        raise ConfigError(f'{where} must have {len(COLUMNS)} values, as many as there are columns')
    row = {}
    for name, text in texts.items():
        try:
            row[name] = _value(name, text)
        except (ValueError, OverflowError):
            raise ConfigError(f'{where}: {name}={text!r} must be a number') from None
        if name.startswith('test_accuracy') and text and not 0 <= row[name] <= 1:
            raise ConfigError(f'{where}: {name}={text!r} must be from 0 to 1')
        least = 1 if name == 'classes' else 0
        if isinstance(row[name], int | float) and not least <= row[name] < math.inf:
            raise ConfigError(f'{where}: {name}={text!r} must be a number of at least {least}')
    if row['test_accuracy'] is None and not row['error']:
        raise ConfigError(f'{where}: without an error there must be a test_accuracy')
    return row


def _value(name: str, text: str) -> Any:
    if name in ('setting', 'device', 'jax', 'error', 'command'):
        return text
    if name in ('seed', 'classes'):
        return int(text)
    number = float(text) if text else None
    return int(number) if name in ('steps', 'skipped', 'parameters') and text else number
