"""The pipeline benchmark: its ideal times by hand, what it says, and a tiny run."""

import json

import pytest

from efficientnet.errors import ConfigError
from efficientnet.parallel.pipeline import timetable
from experiments.benchmark import pipeline
from experiments.benchmark.pipeline import Sample, StageTime, ideal_parts, stage_time, walk
from tests.experiments.benchmark.command_line import TINY, parsed, run


@pytest.mark.parametrize(
    ('schedule', 'works', 'count', 'seconds'),
    [
        # The last stage does everything in one tick; the first goes forward in ticks 0-3 and backward in 2-5.
        ('grouped', [StageTime(1, 2), StageTime(0, 3)], 4, 1 + 3 + 3 + 3 + 3 + 2),
        # Ticks of 1, 1, 1 + 4, 1 + 4, 4, 4.
        ('grouped', [StageTime(1, 4), StageTime(0, 0.5)], 4, 1 + 1 + 5 + 5 + 4 + 4),
        # Stages 0, 1, 2, 1, 0 one after the other, twice.
        ('sequential', [StageTime(1, 4), StageTime(2, 5), StageTime(0, 3)], 2, 2 * (1 + 2 + 3 + 5 + 4)),
    ],
)
def test_walk(schedule, works, count, seconds):
    assert walk(timetable(schedule, len(works), count), works) == seconds


def test_a_tick_lasts_as_long_as_its_slowest_stage():
    # Three stages, one micro-batch: forward 0, forward 1, the last, backward 1, backward 0, nobody beside another.
    works = [StageTime(1, 10), StageTime(2, 20), StageTime(0, 100)]
    assert walk(timetable('grouped', 3, 1), works) == 1 + 2 + 100 + 20 + 10


@pytest.mark.parametrize(
    ('recompute', 'last', 'expected'),
    [
        ('none', False, StageTime(1, 2)),
        ('block', False, StageTime(1, 3)),
        ('stage', False, StageTime(1, 3)),
        ('none', True, StageTime(0, 3)),
        ('stage', True, StageTime(0, 3)),
    ],
)
def test_time_of_a_stage(recompute, last, expected):
    assert stage_time(1.0, 3.0, recompute, last=last) == expected


def test_parts_of_the_ideal_add_up():
    works, both = [StageTime(1, 3), StageTime(0, 5)], [3, 5]
    timing = timetable('grouped', 2, 4)
    parts = ideal_parts(timing, works, both)
    assert parts == {'network': 4 * 8 / 2, 'forward again': 4 * 1 / 2, 'imbalance': 4 * (5 - 4.5), 'bubble': 1 + 3}
    assert sum(parts.values()) == walk(timing, works)


def test_without_recomputation_nothing_is_computed_again():
    parts = ideal_parts(timetable('sequential', 2, 3), [StageTime(1, 2), StageTime(0, 3)], [3, 3])
    assert parts['forward again'] == parts['imbalance'] == 0
    assert parts['network'] + parts['bubble'] == 3 * (1 + 3 + 2)


def sampled(**seconds):
    return {name: [Sample(value, value)] * 3 for name, value in seconds.items()}


def test_summary_and_text():
    args = parsed('pipeline', '--accumulation=4', '--rounds=3')
    samples = sampled(pipeline=22.0, one_stage=30.0, plain=25.0, one_stage_together=33.0, optimizer=8.0)
    samples |= sampled(forward_0=4.0, both_0=12.0, both_1=20.0)
    found = pipeline.summary(args, samples, 'block4a', [30, 10])
    # As in test_parts_of_the_ideal_add_up, and 2 for the optimizer, of which the larger stage has three quarters.
    assert found['ideal'] == 16 + 2 + 2 + 4 + 1.5
    assert found['pipeline_to_ideal'] == 22 / 25.5
    assert found['one_stage_to_plain'] == 1.2
    assert found['blind_ideal'] == 30 / 2 * 6 / 4
    text = pipeline.show(json.loads(json.dumps(found)))
    assert '2 stages ÷ ideal: 0.863 (target 1.15, met)' in text
    assert 'one stage ÷ plain step: 1.200 (target 1.02, missed)' in text
    assert 'one stage takes 1.10 × as long while 2 cores do the same' in text
    assert 'busy' not in text
    slow = [Sample(30.0, 10.0)] * 3
    assert 'busy' in pipeline.show(pipeline.summary(args, samples | {'one_stage': slow}, 'block4a', [30, 10]))


def test_unknown_splits_are_one_line():
    with pytest.raises(ConfigError, match='is no block of this network'):
        pipeline.run(parsed('pipeline', *TINY, '--splits=block9z'))


@pytest.mark.slow
def test_tiny_pipeline():
    found = json.loads(run('pipeline', *TINY, '--rounds=2', '--json'))
    assert found['splits']
    assert len(found['both']) == len(found['works']) == 2
    assert found['ideal'] > 0
    assert all(low <= found['seconds'][name] <= high for name, (low, high) in found['range'].items())
    assert found['one_stage_to_plain'] < 3
