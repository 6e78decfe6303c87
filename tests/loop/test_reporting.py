import csv
import json
import re

import pytest

from efficientnet.loop.reporting import COLUMNS, Clock, Report, describe, duration, evaluation_text
from tests.tiny import tiny_parts


@pytest.mark.parametrize(
    ('stages', 'count', 'schedule', 'hint'),
    [
        (
            3,
            3,
            'grouped',
            'hint     the pipeline rests more than it works, 4 of 7 ticks; raise .* count of 4$',
        ),
        (3, 4, 'grouped', ''),
        (
            2,
            1,
            'grouped',
            'hint     the pipeline rests more than it works, 2 of 3 ticks; raise .* count of 2$',
        ),
        (2, 2, 'grouped', ''),
        (3, 3, 'sequential', ''),
    ],
)
def test_a_pipeline_of_mostly_bubble_is_said(stages, count, schedule, hint):
    splits = {2: 'block2a', 3: 'block1a,block2a'}[stages]
    lines = describe(tiny_parts(splits=splits, micro_batch=2, global_batch=2 * count, pipeline=schedule))
    (found,) = [line for line in lines if line.startswith('hint')] or ['']
    assert re.match(hint, found) if hint else not found


def report(path, step=0, clock=None, epochs_per_step=0.1):
    options = {'total_steps': 100, 'epochs_per_step': epochs_per_step, 'global_batch': 8}
    return Report(path, step=step, clock=clock or Clock({}), **options)


def metrics(loss):
    names = ('learning_rate', 'gradient_norm', 'update_norm', 'weight_norm', 'loss_scale', 'skipped')
    return {'loss': loss, 'correct': 2.0, 'count': 8.0, **dict.fromkeys(names, 1.0)}


def rows(path):
    with (path / 'metrics.csv').open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(('seconds', 'text'), [(0, '0:00'), (59.6, '1:00'), (3599, '59:59'), (3723, '1:02:03')])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(('epochs_per_step', 'text'), [(0.1, 'epoch 2.0/10.0'), (0.0002, 'epoch 0.004/0.020')])
def test_less_than_an_epoch_has_more_digits(tmp_path, capsys, epochs_per_step, text):
    book = report(tmp_path, epochs_per_step=epochs_per_step)
    book.add(metrics(1.0))
    book.row(20)
    book.close()
    assert capsys.readouterr().out.startswith(text)


def test_a_row_is_the_mean_since_the_row_before(tmp_path, capsys):
    clock = Clock({})
    book = report(tmp_path, clock=clock)
    for loss in (8.0, 16.0):
        book.add(metrics(loss))
    clock.training += 2.0
    clock.seconds += 2.0
    book.row(2)
    book.add(metrics(4.0))
    evaluation = {'test_accuracy': 0.5, 'test_top5': 1.0, 'test_loss': 1.0}
    book.row(3, evaluation)
    book.close()
    first, second = rows(tmp_path)
    assert tuple(first) == COLUMNS
    assert (float(first['train_loss']), float(first['train_accuracy'])) == (1.5, 0.25)
    assert float(first['images_per_second']) == 8.0
    assert first['test_accuracy'] == ''
    assert (float(second['train_loss']), float(second['test_accuracy'])) == (0.5, 0.5)
    out = capsys.readouterr().out
    assert 'step   2/100' in out
    assert 'ETA 1:38' in out  # two steps took two seconds, 98 are left
    assert 'test accuracy 50.00%' in out


def test_resuming_forgets_later_rows_and_half_rows(tmp_path):
    book = report(tmp_path)
    for step in (2, 4, 6):
        book.add(metrics(1.0))
        book.row(step)
    book.close()
    with (tmp_path / 'metrics.csv').open('a') as file:
        file.write('3,0.3')
    book = report(tmp_path, step=4)
    book.add(metrics(2.0))
    book.row(6)
    book.close()
    assert [row['step'] for row in rows(tmp_path)] == ['2', '4', '6']
    assert float(rows(tmp_path)[-1]['train_loss']) == 0.25


def test_an_evaluation_that_is_made_up_for_joins_its_row(tmp_path, capsys):
    clock = Clock({})
    book = report(tmp_path, clock=clock)
    for step in (2, 4):
        book.add(metrics(8.0))
        clock.training += 2.0
        book.row(step)
    book.close()
    book = report(tmp_path, step=4, clock=clock)
    clock.training += 0.01  # of no update
    book.row(4, {'test_accuracy': 0.5, 'test_top5': 1.0, 'test_loss': 1.0})
    assert 'images/s' not in capsys.readouterr().out.splitlines()[-1]
    book.add(metrics(8.0))
    book.row(6)
    book.close()
    before, made_up, after = rows(tmp_path)
    assert [row['step'] for row in (before, made_up, after)] == ['2', '4', '6']
    assert made_up['test_accuracy'] == '0.5'
    assert {name: made_up[name] for name in ('train_loss', 'images_per_second')} == {
        name: before[name] for name in ('train_loss', 'images_per_second')
    }


def test_tensorboard_has_the_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    book = report(tmp_path)
    book.add(metrics(8.0))
    book.row(5)
    book.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors('train_loss')
    assert (event.step, event.tensor_proto.float_val[0]) == (5, 1.0)


def test_clock_leaves_compilation_out_and_survives(monkeypatch):
    now = iter([0.0, 10.0, 13.0, 14.0, 100.0, 105.0])
    monkeypatch.setattr('efficientnet.loop.reporting.time.perf_counter', lambda: next(now))
    clock = Clock({})
    clock.tick('compiling')
    clock.tick('training')
    clock.tick()
    clock.steps = 6
    again = Clock(json.loads(json.dumps(clock.facts())))
    again.tick('training')
    assert (again.seconds, again.compiling, again.training, again.steps) == (19.0, 10.0, 8.0, 6)


def test_evaluation_text():
    text = evaluation_text({'test_accuracy': 0.975, 'test_top5': 0.999, 'test_accuracy_averaged': 0.98})
    assert text == '97.50% (top 5 99.90%, averaged 98.00%)'


def test_rounding_is_said_of_what_is_rounded():
    said = ['\n'.join(describe(tiny_parts(blocks=1, precision__policy=policy))) for policy in ('16.16', '16.32')]
    assert 'float16 weights, stochastic rounding), lars' in said[0]
    assert 'float32 weights), lars' in said[1]
