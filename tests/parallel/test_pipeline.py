"""Timetables as data: everything happens once, in an order that can be, and as tightly as the schedule promises."""

import numpy as np
import pytest

from efficientnet.parallel.pipeline import NONE, SCHEDULES, timetable

SIZES = [(stages, count) for stages in (1, 2, 3, 4, 7) for count in (1, 2, 3, 9)]


def ticks_of(table, stages, count):
    """Ticks of each (stage, micro-batch), [stages, count]; checks that each comes exactly once."""
    found = np.full((stages, count), -1)
    for tick, row in enumerate(table):
        for stage, micro in enumerate(row.tolist()):
            if micro != NONE:
                assert found[stage, micro] == -1
                found[stage, micro] = tick
    assert (found >= 0).all()
    return found


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize(('stages', 'count'), SIZES)
def test_each_stage_takes_each_micro_batch_there_and_back_once_in_order(schedule, stages, count):
    table = timetable(schedule, stages, count)
    forward, backward = (ticks_of(part, stages, count) for part in table)
    # What is handed over in one tick is used in the next: there is one buffer each way.
    np.testing.assert_array_equal(forward[1:], forward[:-1] + 1)
    np.testing.assert_array_equal(backward[:-1], backward[1:] + 1)
    np.testing.assert_array_equal(forward[-1], backward[-1])
    assert (np.diff(forward, axis=1) > 0).all()
    assert (np.diff(backward, axis=1) > 0).all()


@pytest.mark.parametrize(('stages', 'count'), SIZES)
def test_lengths(stages, count):
    assert len(timetable('grouped', stages, count).forward) == count + 2 * (stages - 1)
    assert len(timetable('sequential', stages, count).forward) == count * (2 * stages - 1)


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('first', [False, True])
@pytest.mark.parametrize(('stages', 'count'), SIZES)
def test_nothing_kept_is_overwritten_before_it_is_used(schedule, first, stages, count):
    """Plays the loop's stash, micro-batch m in place m mod depth, read before it is written in a tick."""
    table = timetable(schedule, stages, count)
    depth = table.stash_depth(first=first)
    for stage in range(0 if first else 1, stages - 1):
        stash, most = {}, 0
        for f, b in zip(table.forward[:, stage].tolist(), table.backward[:, stage].tolist(), strict=True):
            if b != NONE:
                assert stash.pop(b % depth) == b
            if f != NONE:
                assert f % depth not in stash
                stash[f % depth] = f
            most = max(most, len(stash))
        assert not stash
        assert most <= depth
        if schedule == 'grouped':
            assert most == min(2 * (stages - 1 - stage), count)


def test_no_stash_where_nothing_is_kept():
    assert timetable('grouped', 2, 8).stash_depth(first=False) == 0
    assert timetable('grouped', 1, 8).stash_depth(first=True) == 0


def drawn(table):
    """One line a stage and one column a tick: 'f2' goes forward, 'b0' backward, '·' rests."""
    lines = []
    for stage, (forward, backward) in enumerate(zip(table.forward.T, table.backward.T, strict=True)):
        pairs = zip(forward, backward, strict=True)
        cells = [(f'f{f}' if f != NONE else '') + (f'b{b}' if b != NONE else '') or '·' for f, b in pairs]
        lines.append(f'stage {stage}  ' + ' '.join(cell.ljust(4) for cell in cells).rstrip())
    return lines


def test_the_timetables_as_the_readme_draws_them():
    assert drawn(timetable('grouped', 3, 3)) == [
        'stage 0  f0   f1   f2   ·    b0   b1   b2',
        'stage 1  ·    f0   f1   f2b0 b1   b2   ·',
        'stage 2  ·    ·    f0b0 f1b1 f2b2 ·    ·',
    ]
    assert drawn(timetable('sequential', 2, 2)) == [
        'stage 0  f0   ·    b0   f1   ·    b1',
        'stage 1  ·    f0b0 ·    ·    f1b1 ·',
    ]
