"""Checkpoints with Orbax; the one file that knows its interface, which changes often.

A checkpoint is the plain, unstaged state as {dotted name: array}, a JSON of facts beside it (position, clock, …)
and a digest of all bytes. Orbax writes into a temporary folder and renames it, so a killed save leaves no trace
under the final name; the digest finds what a disk or a copy damaged later.
"""

import errno
import functools
import logging
import os
import pathlib
import shutil
import sys
import zlib
from collections.abc import Callable
from typing import Any

import flax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep_policy

from efficientnet.errors import ConfigError
from efficientnet.loop.files import REPLACED

Tree = Any
SCORE = 'test_accuracy'
# What hinders reading and says nothing about the files.
PASSING = (
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
    errno.ENOMEM,
    errno.ETIMEDOUT,
)


class Checkpoints:
    """The checkpoints of one run: the newest few and the best.

    Args:
        directory: Where they are.
        keep: How many of the newest stay.
        owner: Whether this process trains the run, and so may clear away what a killed save left behind; to
            another it could be a save in progress.
    """

    def __init__(self, directory: pathlib.Path, keep: int, *, owner: bool = True) -> None:
        if keep < 1:
            raise ConfigError(f'checkpoint.keep={keep} must be at least 1')
        _hush()
        best = keep_policy.BestN(get_metric_fn=_score, reverse=False, n=1, keep_checkpoints_without_metrics=False)
        policy = keep_policy.AnyPreservationPolicy([keep_policy.LatestN(keep), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=_score,  # without it scores are not written, and forgotten by the next process
            enable_async_checkpointing=False,  # a failed background save would surface an epoch later
            # Only process 0 comes here; Orbax must not wait for others.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes={0}, barrier_sync_key_prefix='first'
            ),
            create=False,
        )
        directory.mkdir(parents=True, exist_ok=True)
        if owner:
            # Orbax would clear them away in a thread that it doesn't wait for.
            for leftover in directory.glob('*.orbax-checkpoint-tmp*'):
                shutil.rmtree(leftover)
            for replaced in directory.glob(f'*{REPLACED}'):
                whole = replaced.with_name(replaced.name.removesuffix(REPLACED))
                shutil.rmtree(replaced) if whole.exists() else replaced.rename(whole)
        self._directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def positions(self) -> list[int]:
        """Returns the positions (batches consumed) of the checkpoints there are, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, position: int, state: Tree, facts: dict[str, Any], accuracy: float | None) -> None:
        """Saves one checkpoint, in the place of one of this position, and deletes those that are neither new nor best.

        Args:
            position: Batches consumed so far; names the checkpoint.
            state: Host arrays.
            facts: Small JSON values that go along.
            accuracy: Test accuracy in [0, 1] at this position if it was evaluated; the best is kept.

        Raises:
            OSError: The disk is full or not writable. Earlier checkpoints are left as they were.
        """
        arrays = _flatten(state)
        facts = facts | {'position': position, 'digest': _digest(arrays)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), facts=ocp.args.JsonSave(facts))
        metrics = None if accuracy is None else {SCORE: accuracy}
        replaced = self._directory / f'{position}{REPLACED}'
        if position in self.positions():
            (self._directory / str(position)).rename(replaced)
            self._manager.reload()
        try:
            self._manager.save(position, args=items, metrics=metrics, force=True)
        except BaseException:
            if replaced.exists():
                replaced.rename(self._directory / str(position))
                self._manager.reload()
            raise
        shutil.rmtree(replaced, ignore_errors=True)

    def restore(self, like: Tree | None, position: int) -> tuple[Tree, dict[str, Any]]:
        """Reads one checkpoint.

        Args:
            like: A state with the structure, shapes and dtypes to expect; None takes what there is.
            position: One of `positions()`.

        Returns:
            The state as host arrays, {dotted name: array} where nothing was expected, and the facts saved beside it.

        Raises:
            ConfigError: It is whole, but has other arrays than are expected.
            Exception: Whatever Orbax raises on a damaged checkpoint, or ValueError if bytes differ.
        """
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), facts=ocp.args.JsonRestore())
        restored = self._manager.restore(position, args=items)
        arrays = {name: np.asarray(leaf) for name, leaf in restored['state'].items()}
        if _digest(arrays) != restored['facts']['digest']:
            raise ValueError('its bytes are not those that were saved')
        if like is None:
            return arrays, restored['facts']
        misfits = _misfits(arrays, _flatten(like))
        if misfits:
            more = f' and {len(misfits) - 3} more' if len(misfits) > 3 else ''
            what = f'checkpoint {self._directory / str(position)} is not of this config'
            raise ConfigError(f'{what}: {"; ".join(misfits[:3])}{more}')
        return _unflatten(like, arrays), restored['facts']

    def restore_newest(self, like: Tree | None = None) -> tuple[Tree, dict[str, Any], list[str]] | None:
        """Reads the newest checkpoint that is whole.

        Args:
            like: As of `restore`.

        Returns:
            State, facts, and a line for each newer checkpoint that was damaged; None if there are none at all.

        Raises:
            ConfigError: There are checkpoints, but every one is damaged, the newest whole one does not fit `like`, or
                one cannot be read for now.
        """
        complaints = []
        for position in reversed(self.positions()):
            try:
                state, facts = self.restore(like, position)
            except ConfigError:
                raise
            except Exception as error:  # Orbax has no common class for what a damaged file can raise
                reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
                name = f'checkpoint {self._directory / str(position)}'
                if _may_pass(error):  # if training went on from an older one, this would be deleted
                    raise ConfigError(
                        f'{name} cannot be read ({reason}); see to that, or move it away to go on from the one before'
                    ) from error
                complaints.append(f'{name} is damaged ({reason})')
                continue
            return state, facts, complaints
        if complaints:
            raise ConfigError('; '.join(complaints) + '; no whole one is left: give another folder')
        return None

    def discard_after(self, position: int) -> None:
        """Deletes the checkpoints newer than `position`: damaged ones, or of a future that is computed again."""
        for newer in self.positions():
            if newer > position:
                self._manager.delete(newer)

    def close(self) -> None:
        """Releases the manager's threads."""
        self._manager.close()


def _hush() -> None:
    """Keeps what Orbax and TensorStore say out of the way of what a run says."""
    # Every step of every save, and of what fails, which is raised as well, every thread's traceback.
    for name in ('absl', 'asyncio'):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # TensorStore's threads report by these hooks that, after an error, Orbax has closed the loop they answer to.
    for name in ('excepthook', 'unraisablehook'):
        hook = getattr(sys, name)
        if getattr(hook, 'func', None) is not _pass_on:
            setattr(sys, name, functools.partial(_pass_on, hook))


def _pass_on(hook: Callable, *report: Any) -> None:
    error = report[1] if len(report) > 1 else report[0].exc_value
    if str(error) != 'Event loop is closed':
        hook(*report)


def _may_pass(error: Exception) -> bool:
    """Tells whether reading may succeed at another time; TensorStore has the system's errors as text."""
    return isinstance(error, MemoryError) or any(os.strerror(number) in str(error) for number in PASSING)


def _score(metrics: dict[str, float] | None) -> float | None:
    return metrics.get(SCORE) if metrics else None


def _flatten(state: Tree) -> dict[str, np.ndarray]:
    return flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(state), sep='.')


def _unflatten(like: Tree, arrays: dict[str, np.ndarray]) -> Tree:
    empty = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(like), sep='.', keep_empty_nodes=True)
    nested = flax.traverse_util.unflatten_dict(empty | arrays, sep='.')
    return flax.serialization.from_state_dict(like, nested)


def _misfits(arrays: dict[str, np.ndarray], wanted: dict[str, Any]) -> list[str]:
    """Says of each array that is missing, unexpected, or of another shape or format, what is wrong; weights first."""

    def kind(name: str, where: dict[str, Any]) -> str:
        return f'{where[name].dtype}{list(where[name].shape)}' if name in where else 'missing'

    names = sorted(arrays.keys() | wanted.keys(), key=lambda name: (not name.startswith('params.'), name))
    kinds = {name: (kind(name, arrays), kind(name, wanted)) for name in names}
    return [f'{name} is {saved} there, {here} here' for name, (saved, here) in kinds.items() if saved != here]


def _digest(arrays: dict[str, np.ndarray]) -> int:
    """CRC-32 over names, dtypes, shapes and bytes."""
    value = 0
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        value = zlib.crc32(f'{name} {array.dtype} {array.shape}'.encode(), value)
        value = zlib.crc32(np.ascontiguousarray(array).tobytes(), value)
    return value
