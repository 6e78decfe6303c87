import pytest

from efficientnet.errors import ConfigError
from efficientnet.loop.durations import to_interval, to_steps


def steps(text, total=1000):
    return to_steps('schedule.warmup', text, num_examples=1281167, global_batch=6144, total_steps=total)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('350 epochs', 72983),  # the reference's own counts
        ('70 epochs', 14596),
        ('1 epoch', 208),
        ('0.5 epochs', 104),
        ('7 steps', 7),
        ('1 step', 1),
        ('6144 examples', 1),
        ('6143 examples', 0),
        ('20 %', 200),
        ('20%', 200),
        (' 7steps ', 7),
        ('0 epochs', 0),
    ],
)
def test_conversion(text, expected):
    assert steps(text) == expected


@pytest.mark.parametrize(
    ('text', 'expected'),
    [('1 epochs', 208), ('0.001 epochs', 1), ('1 examples', 1), ('0.01 %', 1), ('0 epochs', 0), ('0.0 steps', 0)],
)
def test_an_interval_is_never_rounded_to_never(text, expected):
    assert to_interval('log_every', text, num_examples=1281167, global_batch=6144, total_steps=1000) == expected


@pytest.mark.parametrize(
    'text', ['', '7', 'epochs', '3 weeks', '-1 epochs', 'nan epochs', 'inf steps', '1 2 epochs', '1.2.3 steps']
)
def test_not_a_duration(text):
    with pytest.raises(ConfigError, match=r'schedule\.warmup='):
        steps(text)


def test_percent_of_nothing():
    with pytest.raises(ConfigError, match='is not a duration'):
        steps('20 %', total=None)
