"""The folder of a run: who may write there, whose run it holds, and what to say when the disk is full."""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator

import jax
import ml_collections

from efficientnet.errors import ConfigError, RunError
from efficientnet.loop.assemble import Parts
from efficientnet.loop.files import CHECKPOINTS, CONFIG, REPLACED, disk_problem, read_stored, write_json
from efficientnet.loop.settings import check_resumable, config_of, flatten
from efficientnet.weights.dataset_facts import check_classes, check_examples, facts_of, write_facts


@contextlib.contextmanager
def claim(workdir: pathlib.Path, parts: Parts) -> Iterator[None]:
    """Makes the folder ready for a run and keeps other processes out of it.

    Raises:
        ConfigError: It cannot be written, another process trains there, it holds a run of another config, or
            the disk has no room for the checkpoints.
    """
    config = json.loads(json.dumps(parts.config.to_dict()))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / '.lock').open('w')
    except OSError as error:
        raise ConfigError(f'--workdir={workdir} cannot be written: {error.strerror}') from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f'--workdir={workdir} is in use by another process; give another one') from error
        if (workdir / CONFIG).exists():
            check_resumable(flatten(read_stored(workdir)), flatten(config), str(workdir), parts.idle)
        facts = facts_of(parts.train_source)
        check_classes(workdir, facts)
        if has_checkpoint(workdir):
            check_examples(workdir, facts)
        _check_room(workdir, parts)
        with writing(workdir):
            write_json(workdir / CONFIG, config)
            write_facts(workdir, facts)
        yield


@contextlib.contextmanager
def writing(workdir: pathlib.Path, saved_at: int = 0) -> Iterator[None]:
    """Turns a full or failing disk into one line that says what is safe.

    Args:
        workdir: Where something is written.
        saved_at: Position of the newest checkpoint; 0 = there is none, or it is not in question.

    Raises:
        RunError: Writing failed for lack of room or permission.
    """
    try:
        yield
    except Exception as error:
        reason = disk_problem(error)
        if reason is None:
            raise
        safe = f'the checkpoint of step {saved_at} is safe: ' if saved_at else ''
        remedy = 'make room' if 'space' in reason or 'quota' in reason else 'see to that'
        failed = f'writing to {workdir} failed: {reason}'
        raise RunError(f'{failed}; {safe}{remedy}, then the same command goes on') from error


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Tells whether a run in this folder has come as far as to save something."""
    return any(path.name.removesuffix(REPLACED).isdigit() for path in (workdir / CHECKPOINTS).glob('*'))


def stored_config(workdir: pathlib.Path, given: ml_collections.ConfigDict | None) -> ml_collections.ConfigDict:
    """Returns the config to evaluate a run with: the one given, checked against the run's, or the run's own.

    Raises:
        ConfigError: There is no run, it has another config, or one that cannot be.
    """
    if not os.path.exists(workdir / CONFIG):  # pathlib's raises for names that are too long
        raise ConfigError(f'--workdir={workdir} holds no run: there is no {CONFIG} in it')
    stored = config_of(flatten(read_stored(workdir)), str(workdir / CONFIG))
    if given is None:
        return stored.lock()
    before = flatten(stored)
    # Nothing is trained, so what training computes at once does not matter; and a run may be tested on other images.
    free = 'micro_batch', 'replicas', 'input.test_dataset', 'input.test_split', 'evaluation.crop_ratio'
    now = flatten(given) | {name: before[name] for name in free if name in before}
    check_resumable(before, now, str(workdir))
    return given.copy_and_resolve_references().lock()


def _check_room(workdir: pathlib.Path, parts: Parts) -> None:
    """Raises ConfigError if the checkpoints to keep, the best, and one being written don't fit on the disk."""
    if (workdir / CHECKPOINTS / str(parts.total_steps)).exists():
        return  # a finished run
    leaves = jax.tree.leaves(parts.state_shapes())
    one = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    there = sum(path.stat().st_size for path in (workdir / CHECKPOINTS).rglob('*') if path.is_file())
    needed = one * (parts.config.checkpoint.keep + 2) - there
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise ConfigError(
            f'--workdir={workdir} has {free / 1e6:.1f} MB free, but checkpoint.keep='
            f'{parts.config.checkpoint.keep} needs about {needed / 1e6:.1f} MB more; make room or keep fewer'
        )
