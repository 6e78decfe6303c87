"""Trials of a study: handed out to workers, run, pruned, recorded, and taken up again after a kill.

A trial is a run of main.py in a folder of its own. Optuna's storage says which trials there are; whether somebody
works on one is said by the lock on its folder, which the system lets go of however a process ends. A trial that the
storage calls running and whose folder is free was abandoned: it is marked as failed, and a new one takes over its
values and its folder, where the run goes on from its checkpoint.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import ml_collections
import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from efficientnet.errors import ConfigError, status
from efficientnet.loop.settings import flatten
from experiments import trainer
from experiments.sweep import studies

FOLDER, ERROR = 'folder', 'error'  # attributes of a trial; its other ones are numbers of its summary
# Likewise: the trainer refused the recipe (no data, a field out of range) before any trial had come to anything, so
# that it would refuse all others too. Such a trial ends the sweep and does not count.
REFUSED = 'refused'
KEPT = ('seconds', 'images_per_second', 'steps', 'skipped', 'test_accuracy_averaged')
RECIPE = 'recipe'  # attribute of a study: the flat config it was started with
GRACE = 60.0  # seconds after which a trial without a folder is one whose worker died while it was made


def open_storage(place: str) -> BaseStorage:
    """Returns the storage at an SQL URL, in an SQLite file (FILE.db), or in a journal (any other file).

    A journal may lie on NFS, where SQLite must not.

    Raises:
        ConfigError: There is no storage, and none can be made, or it is damaged.
    """
    path = pathlib.Path(place).expanduser()
    if '://' not in place:
        trainer.make_folder('storage', path.parent)
    try:
        if '://' in place:
            return RDBStorage(place)
        if path.suffix == '.db':
            return RDBStorage(f'sqlite:///{path}', engine_kwargs={'connect_args': {'timeout': 60}})
        return JournalStorage(JournalFileBackend(str(path)))
    except (KeyError, TypeError) as error:  # what Optuna raises for JSON of something else
        raise ConfigError(f'--storage={place} cannot be used: it is no journal of Optuna') from error
    except (OSError, ValueError, ImportError, SQLAlchemyError, StorageInternalError) as error:
        # What Optuna and its backends raise for a file of something else, a missing driver, no rights, no server.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f'--storage={place} cannot be used: {reason}') from error


def open_study(name: str, storage: BaseStorage, recipe: ml_collections.ConfigDict, *, prune: bool) -> optuna.Study:
    """Returns the study of this name, made if there is none.

    Raises:
        ConfigError: Trials of it were started with another recipe.
    """
    # From the second evaluation on, a trial goes on only if it is above the median of five or more ended ones.
    pruner = optuna.pruners.MedianPruner(5, n_warmup_steps=2) if prune else optuna.pruners.NopPruner()
    study = optuna.create_study(
        study_name=name, storage=storage, direction='maximize', pruner=pruner, load_if_exists=True
    )
    now = json.loads(json.dumps(flatten(recipe)))
    before = study.user_attrs.get(RECIPE)
    if not any(FOLDER in trial.user_attrs and REFUSED not in trial.user_attrs for trial in study.get_trials()):
        study.set_user_attr(RECIPE, now)
    elif before != now:
        differ = sorted(field for field in before.keys() | now.keys() if before.get(field) != now.get(field))
        raise ConfigError(
            f'study {name!r} was started with another recipe, which differs in {", ".join(differ)}; give another --name'
        )
    return study


def claim_folder(workdir: pathlib.Path, name: str) -> None:
    """Makes a folder that of a study: trials are folders by number, and those of two would be the same.

    Raises:
        ConfigError: It is another's.
    """
    path = workdir / 'study'
    try:
        with path.open('x') as file:
            file.write(name)
    except FileExistsError:
        owner = path.read_text()
        if owner not in (name, ''):  # '': a process beside this one is about to write it
            raise ConfigError(
                f'--workdir={workdir} holds trials of study {owner!r}; for {name!r} give another'
            ) from None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What the workers of a sweep share."""

    study: optuna.Study
    plan: studies.Study
    recipe: str  # its path
    overrides: Sequence[str]  # --config.FIELD=VALUE of the recipe
    space: dict[str, optuna.distributions.BaseDistribution]
    runs: pathlib.Path  # folders of the trials
    trials: int  # at most so many, those before a restart counted
    stop: Callable[[], bool]
    say: Callable[[str], None] = print
    program: Sequence[str] = trainer.PROGRAM
    mine: set[str] = dataclasses.field(default_factory=set)  # folders that this process works in
    turn: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    refused: threading.Event = dataclasses.field(default_factory=threading.Event)  # a trial was, see `REFUSED`

    def work(self) -> None:
        """Runs trials until all are handed out and ended, or until told to stop.

        Raises:
            ConfigError: The trainer refused the recipe.
        """
        while not self._leaves():
            with self._claimed() as (trial, lock, pending):
                if trial is not None:
                    self._run(trial, lock)
                elif not pending:
                    return
            if trial is None:
                time.sleep(trainer.POLL)  # a run whose worker was killed goes on; it is taken up when it ends

    def enqueue_grid(self, values: dict[str, Sequence[Any]]) -> int:
        """Puts the points of a grid, but those that are there already, in front of the queue; returns how many."""
        points = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
        trials = self.study.get_trials(deepcopy=False)
        refused = [trial.params for trial in trials if REFUSED in trial.user_attrs]
        others = [trial.params for trial in trials if REFUSED not in trial.user_attrs]
        for point in points:
            self.study.enqueue_trial(point, skip_if_exists=point not in refused or point in others)
        return len(points)

    def _leaves(self) -> bool:
        return self.stop() or self.refused.is_set()

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[tuple[Trial | None, IO | None, bool]]:
        """Holds the next trial and its folder's lock; without one, says whether one may still come to be."""
        with contextlib.ExitStack() as stack:
            with self.turn, _alone(self.runs):
                pending = self._take_over()
                trials = self.study.get_trials(deepcopy=False)
                waiting = any(trial.state == TrialState.WAITING for trial in trials)
                trial, lock = None, None
                if waiting or _count(trials) < self.trials:
                    trial = self.study.ask(self.space)
                    folder = trial.user_attrs.get(FOLDER, f'{trial.number:04d}')
                    lock = stack.enter_context(trainer.held(self.runs / folder))
                    trial.set_user_attr(FOLDER, folder)
                    self.mine.add(folder)
                    stack.callback(self.mine.discard, folder)
            yield trial, lock, pending

    def _take_over(self) -> bool:
        """Puts abandoned trials back in the queue; tells whether some run goes on that may have to be taken over."""
        pending = False
        for trial in self._running():
            folder = trial.user_attrs.get(FOLDER)
            if folder is None:
                free = contextlib.nullcontext(time.time() - trial.datetime_start.timestamp() > GRACE or None)
            elif folder in self.mine or not (self.runs / folder).exists():
                continue  # ours, or a trial of a machine that shares the storage alone
            else:
                free = trainer.held(self.runs / folder)
            with free as lock:
                if lock is None:
                    pending = True
                elif trial.number in {other.number for other in self._running()}:  # it may just have ended
                    self.study.tell(trial.number, state=TrialState.FAIL)
                    self.study.enqueue_trial(trial.params, user_attrs={FOLDER: folder} if folder else None)
                    self.say(f'trial {trial.number} was abandoned; another one takes over')
        return pending

    def _any_ended(self) -> bool:
        """Whether some trial got as far as an evaluation."""
        return any(trial.intermediate_values for trial in self.study.get_trials(deepcopy=False))

    def _running(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _run(self, trial: Trial, lock: IO) -> None:
        folder = self.runs / trial.user_attrs[FOLDER]
        reported, pruned = 0, False

        def leave(accuracies: list[float]) -> bool:
            nonlocal reported, pruned
            while reported < len(accuracies) and not pruned:
                reported += 1  # evaluations are numbered from 1: batch sizes differ, so steps would
                trial.report(accuracies[reported - 1], reported)
                pruned = trial.should_prune()
            return pruned or self._leaves()

        changes = studies.changes(self.plan, trial.params)
        given = trainer.arguments(self.recipe, self.overrides, changes, folder)
        outcome = trainer.run(given, folder, lock, leave=leave, program=self.program)
        self._record(trial, outcome, pruned)

    def _record(self, trial: Trial, outcome: trainer.Outcome, pruned: bool) -> None:
        """Tells the study how a trial ended; one that was stopped stays as it is, to be taken up again."""
        if outcome.summary:
            for name in KEPT:
                trial.set_user_attr(name, outcome.summary.get(name))
            self.study.tell(trial, outcome.summary['test_accuracy'])
            text = f'{outcome.summary["test_accuracy"]:.2%}'
        elif outcome.error:
            trial.set_user_attr(ERROR, outcome.error)
            refused = outcome.status == status(ConfigError()) and not self._any_ended()
            if refused:
                trial.set_user_attr(REFUSED, True)
            self.study.tell(trial, state=TrialState.FAIL)
            if refused:
                self.refused.set()
                raise ConfigError(f'trial {trial.number}: {outcome.error.removeprefix("error: ")}')
            text = f'failed: {outcome.error}'
        elif pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
            text = 'pruned'
        else:
            self.say(f'trial {trial.number} stopped; the same command goes on with it')
            return
        # A sweep would fill the disk with weights that nobody will use.
        shutil.rmtree(self.runs / trial.user_attrs[FOLDER] / 'checkpoints', ignore_errors=True)
        values = ', '.join(f'{name.rpartition(".")[2]} {show(value)}' for name, value in trial.params.items())
        self.say(f'trial {trial.number} {text}  ({values})')


def show(value: Any) -> str:
    """Returns a number in few digits."""
    return f'{value:.3g}' if isinstance(value, float) else str(value)


def _count(trials: Sequence[FrozenTrial]) -> int:
    """Returns how many trials were handed out; one and those that took it over share a folder and count once."""
    counted = [trial for trial in trials if REFUSED not in trial.user_attrs]
    begun = [trial for trial in counted if FOLDER in trial.user_attrs or not trial.state.is_finished()]
    return len({trial.user_attrs.get(FOLDER, trial.number) for trial in begun})


@contextlib.contextmanager
def _alone(runs: pathlib.Path) -> Iterator[None]:
    """Keeps the other processes that share the folder from claiming a trial at the same time."""
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / '.claiming').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
