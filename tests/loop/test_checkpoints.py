"""Checkpoints: bit-exact, newest and best kept, damage found and stepped over."""

import errno
import os
import pathlib
import re
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from efficientnet.errors import ConfigError
from efficientnet.loop.checkpoints import Checkpoints


def state(value):
    """A tree with every kind of node and format a run has, NaN and subnormals included."""
    rng = np.random.default_rng(value)
    half = rng.standard_normal((40, 30)).astype(np.float16)
    half[0, :3] = [np.nan, np.inf, 6e-8]
    return {
        'params': {'stem': {'kernel': half, 'bias': np.asarray(jnp.arange(5, dtype=jnp.bfloat16))}},
        'empty': {},
        'optimizer': (optax.EmptyState(), {'count': np.int32(value)}),
        'scale': np.float32(128),
    }


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@pytest.fixture
def checkpoints(tmp_path):
    found = Checkpoints(tmp_path / 'checkpoints', keep=2)
    yield found
    found.close()


def damage(directory: pathlib.Path, how: str) -> None:
    """Cuts short, empties, changes or removes the data files of a checkpoint."""
    files = [path for path in (directory / 'state').rglob('d/*') if path.is_file()]
    assert files
    for path in files:
        data = bytearray(path.read_bytes())
        if how == 'cut':
            path.write_bytes(data[: len(data) // 2])
        elif how == 'emptied':
            path.write_bytes(b'')
        elif how == 'flipped':
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        else:
            path.unlink()


def test_round_trip(checkpoints):
    assert checkpoints.restore_newest(state(0)) is None
    checkpoints.save(3, state(3), {'seconds': 1.5, 'nested': {'a': [1, 2]}}, None)
    found, facts, complaints = checkpoints.restore_newest(state(0))
    assert_same(found, state(3))
    assert facts['position'] == 3
    assert facts['nested'] == {'a': [1, 2]}
    assert complaints == []


def test_newest_and_best_are_kept(checkpoints):
    for position, accuracy in [(1, 0.5), (2, 0.9), (3, None), (4, 0.6), (5, 0.9), (6, 0.7), (7, 0.8)]:
        checkpoints.save(position, state(position), {}, accuracy)
    kept = checkpoints.positions()
    assert kept[-2:] == [6, 7]
    assert len(kept) == 3
    assert kept[0] in (2, 5)


# TensorStore's reader complains about its event loop when the read it was in fails.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('how', ['cut', 'emptied', 'flipped', 'removed'])
def test_a_damaged_one_is_named_and_the_one_before_used(tmp_path, checkpoints, how):
    checkpoints.save(1, state(1), {}, None)
    checkpoints.save(2, state(2), {}, None)
    damage(tmp_path / 'checkpoints' / '2', how)
    found, facts, complaints = checkpoints.restore_newest(state(0))
    assert_same(found, state(1))
    assert facts['position'] == 1
    assert len(complaints) == 1
    assert 'checkpoints/2 is damaged' in complaints[0]
    checkpoints.discard_after(1)
    assert checkpoints.positions() == [1]
    checkpoints.save(2, state(2), {}, None)
    assert_same(checkpoints.restore_newest(state(0))[0], state(2))


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path, checkpoints):
    checkpoints.save(1, state(1), {}, None)
    damage(tmp_path / 'checkpoints' / '1', 'cut')
    with pytest.raises(ConfigError, match='no whole one is left'):
        checkpoints.restore_newest(state(0))


@pytest.mark.parametrize('score', [0.8, 0.95])
def test_the_best_is_kept_by_a_process_that_did_not_see_it(tmp_path, score):
    opened = ({1: 0.9, 2: 0.5, 3: 0.6}, {4: None}, {5: 0.7, 6: score}, {7: None, 8: None})
    kept = []
    for scores in opened:
        checkpoints = Checkpoints(tmp_path / 'checkpoints', keep=2)
        for position, accuracy in scores.items():
            checkpoints.save(position, state(position), {}, accuracy)
        kept.append(checkpoints.positions())
        checkpoints.close()
    assert kept == [[1, 2, 3], [1, 3, 4], *([[1, 5, 6], [1, 7, 8]] if score < 0.9 else [[5, 6], [6, 7, 8]])]


@pytest.mark.parametrize(
    'error', [OSError(errno.EIO, os.strerror(errno.EIO)), MemoryError(), ValueError('Stale file handle')]
)
def test_one_that_cannot_be_read_for_now_is_not_damaged(checkpoints, error):
    for position in (1, 2):
        checkpoints.save(position, state(position), {}, None)
    with (
        mock.patch.object(checkpoints._manager, 'restore', side_effect=error),
        pytest.raises(ConfigError, match=r'checkpoints/2 cannot be read .*; see to that'),
    ):
        checkpoints.restore_newest(state(0))
    assert_same(checkpoints.restore_newest(state(0))[0], state(2))


def test_a_failure_leaves_what_was_to_be_replaced(tmp_path, checkpoints):
    checkpoints.save(1, state(1), {}, 0.5)
    full = OSError(errno.ENOSPC, 'No space left on device')
    with mock.patch.object(checkpoints._manager, 'save', side_effect=full), pytest.raises(OSError, match='No space'):
        checkpoints.save(1, state(2), {}, 0.6)
    assert checkpoints.positions() == [1]
    visitor = Checkpoints(tmp_path / 'checkpoints', keep=1, owner=False)
    assert_same(visitor.restore_newest(state(0))[0], state(1))
    visitor.close()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s['params']['stem'].update(kernel=np.zeros((40, 31), np.float16)), 'float16[40, 30] there, float16'),
        (
            lambda s: s['params']['stem'].update(kernel=np.zeros((40, 30))),
            'float16[40, 30] there, float64',
        ),
        (lambda s: s['params'].pop('stem'), 'stem.bias is bfloat16[5] there, missing here; params.stem.kernel is'),
        (
            lambda s: s.update(more=np.zeros(3)),
            'checkpoints/1 is not of this config: more is missing there',
        ),
    ],
)
def test_one_of_another_config_is_not_damaged_but_refused(checkpoints, change, message):
    checkpoints.save(0, state(0), {}, None)
    checkpoints.save(1, state(1), {}, None)
    like = state(1)
    change(like)
    with pytest.raises(ConfigError, match=re.escape(message)):
        checkpoints.restore_newest(like)


def test_an_unfinished_save_is_no_checkpoint(tmp_path):
    first = Checkpoints(tmp_path / 'c', keep=1)
    first.save(1, state(1), {}, None)
    first.close()
    leftover = tmp_path / 'c' / '2.orbax-checkpoint-tmp'
    leftover.mkdir()
    (leftover / 'junk').write_text('half')
    visitor = Checkpoints(tmp_path / 'c', keep=1, owner=False)
    assert visitor.positions() == [1]
    visitor.close()
    assert leftover.exists()  # it could be the owner's save in progress
    again = Checkpoints(tmp_path / 'c', keep=1)
    assert again.positions() == [1]
    again.close()
    assert not leftover.exists()


def test_one_in_the_place_of_another(tmp_path, checkpoints):
    checkpoints.save(1, state(1), {}, None)
    checkpoints.save(2, state(2), {}, None)
    checkpoints.save(2, state(3), {'evaluated': True}, 0.9)
    found, facts, _ = checkpoints.restore_newest(state(0))
    assert_same(found, state(3))
    assert facts['evaluated']
    for position in (4, 5, 6):
        checkpoints.save(position, state(position), {}, 0.5)
    assert checkpoints.positions() == [2, 5, 6]  # it is the best now
    assert all(path.name.isdigit() for path in (tmp_path / 'checkpoints').iterdir())


def test_a_death_while_one_takes_the_place_of_another(tmp_path, checkpoints):
    checkpoints.save(2, state(2), {}, None)
    dies = mock.patch.object(ocp.CheckpointManager, 'save', side_effect=KeyboardInterrupt)
    with dies, pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, state(3), {}, None)
    again = Checkpoints(tmp_path / 'checkpoints', keep=2)
    assert_same(again.restore_newest(state(0))[0], state(2))
    again.close()


def test_hooks_pass_on_what_is_not_tensorstores(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, 'excepthook', lambda *report: seen.append(report))
    monkeypatch.setattr(sys, 'unraisablehook', lambda *report: seen.append(report))
    for _ in range(2):
        Checkpoints(tmp_path / 'c', keep=1).close()
    closed, other = RuntimeError('Event loop is closed'), RuntimeError('else')
    for error in (closed, other):
        sys.excepthook(RuntimeError, error, None)
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert seen == [(RuntimeError, other, None), (types.SimpleNamespace(exc_value=other),)]


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match=r'checkpoint\.keep=0'):
        Checkpoints(tmp_path / 'c', keep=0)
