"""Batch arithmetic, against the reference's own table and at its edges."""

import pickle

import pytest

from efficientnet.errors import ConfigError
from efficientnet.parallel.layout import TooManyReplicasError, largest_replicas, make_layout


def layout(**changes):
    sizes = {'global_batch': 96, 'micro_batch': 4, 'replicas': 2, 'splits': (), 'devices': 8}
    return make_layout(**(sizes | changes))


@pytest.mark.parametrize(('replicas', 'accumulation'), [(8, 256), (16, 128), (32, 64), (64, 32), (128, 16)])
def test_reference_table(replicas, accumulation):
    found = layout(global_batch=6144, micro_batch=3, replicas=replicas, devices=256)
    assert found.accumulation == accumulation
    assert found.global_batch == 6144
    assert found.rows == 3 * accumulation


def test_open_replicas_take_all_devices():
    found = layout(replicas=0)
    assert (found.replicas, found.devices, found.accumulation) == (8, 8, 3)
    assert layout(replicas=0, splits=('a', 'b')).replicas == 2  # of 3 devices each
    assert layout(replicas=0, splits=('a', 'b'), devices=10, processes=2).replicas == 2  # not 3: whole ones a process


def test_groups():
    found = layout(replicas=3, micro_batch=2, splits=('block4a',))
    assert found.replica_groups == [[0, 1], [2, 3], [4, 5]]
    assert found.stage_groups == [[0, 2, 4], [1, 3, 5]]
    assert layout(replicas=4).stage_groups == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'global_batch': 97}, ['global_batch=97', 'global_batch=96 or 104']),
        ({'global_batch': 90}, ['global_batch=88 or 96', 'micro_batch=3 or 5']),
        ({'global_batch': 5}, ['global_batch=8 would be']),
        ({'replicas': 0, 'devices': 7}, ['replicas=0 takes 7 here', 'micro_batch=4', 'or replicas=6']),
        ({'replicas': 0, 'devices': 10, 'processes': 2, 'global_batch': 32}, ['takes 10 here', 'or replicas=8']),
        (
            {'replicas': 0, 'global_batch': 50, 'micro_batch': 3},
            ['replicas=0 takes 8 here', 'global_batch=48 or 72 would be'],
        ),
        ({'splits': ('a',), 'devices': 1}, ['stages=2 needs 4 devices', 'there are 1; use at most 1 stage']),
        ({'replicas': 9}, ['replicas=9', 'there are 8', 'set replicas=8']),
        ({'micro_batch': 0}, ['micro_batch=0', 'at least 1']),
        ({'replicas': -1}, ['replicas=-1', 'at least 0']),
        ({'replicas': 5, 'splits': ('block4a',)}, ['replicas=5', 'stages=2', 'there are 8', 'replicas=4']),
        ({'splits': tuple('abcdefgh')}, ['stages=9', 'at most 8 stages']),
        ({'replicas': 3, 'processes': 2}, ['replicas=3', 'multiple of the 2 processes']),
        ({'replicas': 4, 'splits': ('a', 'b', 'c'), 'processes': 2}, ['replicas=4', 'room for 2']),
        ({'schedule': '1f1b'}, ["pipeline='1f1b'", 'grouped, sequential']),
        ({'recompute': 'all'}, ["recompute='all'", 'none, block, stage']),
    ],
)
def test_sizes_that_do_not_work(changes, words):
    with pytest.raises(ConfigError) as caught:
        layout(**changes)
    assert all(word in str(caught.value) for word in words), caught.value


def test_proposals_work():
    for size in (88, 96):
        assert layout(global_batch=size).global_batch == size
    for size in (3, 5):
        assert layout(global_batch=90, micro_batch=size).global_batch == 90


@pytest.mark.parametrize(
    ('batch', 'devices', 'processes', 'expected'),
    [(96, 8, 1, 8), (6, 4, 1, 3), (7, 4, 1, 1), (1, 8, 1, 1), (12, 8, 2, 6), (96, 8, 4, 8)],
)
def test_largest_replicas(batch, devices, processes, expected):
    assert largest_replicas(batch, devices, processes) == expected


def test_no_share_for_a_process():
    with pytest.raises(ConfigError, match='global_batch=7 cannot be shared among 2 processes'):
        largest_replicas(7, 8, 2)


def test_too_many_replicas_go_from_process_to_process():
    with pytest.raises(TooManyReplicasError) as caught:
        make_layout(global_batch=8, micro_batch=1, replicas=8, splits=(), devices=4, processes=2)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.devices) == (str(caught.value), 8)
