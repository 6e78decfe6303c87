"""The claims: their arithmetic against SciPy's tests, what is trained for them, and what a kill or a failure leaves."""

import csv
import dataclasses
import functools
import json
import math
import pathlib
import sys
import threading

import numpy as np
import pytest
from scipy import stats

from configs import base
from efficientnet.errors import ConfigError
from efficientnet.loop.assemble import assemble
from efficientnet.loop.settings import flatten
from experiments import trainer
from experiments.claims import __main__ as command
from experiments.claims import report, runs, table, verdicts
from experiments.claims.table import Claim, Comparison, Setting
from experiments.claims.verdicts import CONTRADICTED, HOLDS, MEASURED, OPEN, Difference

ROOT = pathlib.Path(__file__).parents[2]
FAKE = (sys.executable, str(ROOT / 'tests' / 'fake_trainer.py'))
STORED = sorted(command.STORED.glob('*.csv'))
RECIPES = command.STORED / 'recipes.json'  # as they were when the results came about

# ml_collections loads recipes so.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(trainer, 'POLL', 0.01)


@pytest.mark.parametrize(('n', 'm', 'spread'), [(5, 5, 1.0), (2, 7, 10.0), (5, 3, 0.01)])
def test_intervals_are_scipys(n, m, spread):
    random = np.random.default_rng(n * m)
    a, b = random.normal(0.9, 0.01, n), random.normal(0.8, 0.01 * spread, m)
    found = verdicts.welch(verdicts.sample(list(a)), verdicts.sample(list(b)))
    right = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), (right.low, right.high), rtol=1e-9)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    b = random.normal(0.8, 0.01, n)
    found, right = verdicts.paired(list(a - b)), stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), (right.low, right.high), rtol=1e-9)


def test_samples():
    assert verdicts.sample([0.5, 0.7, 0.9]) == verdicts.Sample(pytest.approx(0.7), pytest.approx(0.2), 3)
    assert math.isnan(verdicts.sample([0.5]).sd)
    assert verdicts.sample([]) is None
    equal = verdicts.sample([0.5, 0.5])
    assert verdicts.welch(equal, verdicts.sample([0.25, 0.25])) == Difference(0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ('low', 'high', 'expected', 'verdict'),
    [
        (0.01, 0.02, (0.0, math.inf), HOLDS),
        (0.0, 0.02, (0.0, math.inf), OPEN),  # zero is no difference
        (-0.01, 0.02, (0.0, math.inf), OPEN),
        (-0.02, 0.0, (0.0, math.inf), CONTRADICTED),
        (-0.01, 0.01, (-0.02, 0.02), HOLDS),
        (-0.03, 0.01, (-0.02, 0.02), OPEN),
        (-0.03, 0.03, (-0.02, 0.02), OPEN),
        (0.03, 0.04, (-0.02, 0.02), CONTRADICTED),
        (-0.01, 0.5, (-0.02, math.inf), HOLDS),
        (-0.5, -0.01, (-math.inf, 0.0), HOLDS),
    ],
)
def test_judge(low, high, expected, verdict):
    assert verdicts.judge(Difference((low + high) / 2, low, high), expected) == verdict


def row(setting, seed, accuracy, error='', **more):
    values = {'test_accuracy': accuracy, 'test_accuracy_averaged': accuracy, 'seconds': 10.0 + seed, 'classes': 10}
    return {'setting': setting, 'seed': seed, 'error': error} | values | more


def rows_of(**accuracies):
    return runs.collect(
        row(name, seed, value) for name, values in accuracies.items() for seed, value in enumerate(values)
    )


def test_numbers_that_nobody_measured_are_left_out():
    rows = runs.collect([row('a', 0, 0.8, seconds=None), row('a', 1, 0.9), row('b', 0, 0.7)])
    found = verdicts.find(Comparison('a', 'b', (-math.inf, 0.0), 'seconds', 'seconds'), rows)
    assert (found.a.n, found.a.mean, found.b.n) == (1, 11.0, 1)
    assert verdicts.find(Comparison('a', 'b'), rows).a.n == 2


def test_a_run_that_diverged_counts_as_guessing_and_has_no_time():
    rows = runs.collect([*(row('a', seed, 0.8) for seed in range(4)), row('a', 4, None, 'error: not finite')])
    rows |= rows_of(b=[0.7, 0.71, 0.72, 0.73, 0.74])
    found = verdicts.find(Comparison('a', 'b', (0.0, math.inf)), rows)
    assert found.a == verdicts.Sample(
        pytest.approx((4 * 0.8 + 0.1) / 5), pytest.approx(np.std([0.8] * 4 + [0.1], ddof=1)), 5
    )
    assert (found.diverged, found.verdict) == (1, OPEN)
    assert '1 diverged and count as guessing' in report.describe(found)
    twice = verdicts.find(Comparison('a', 'a'), rows)
    assert twice.diverged == 1
    times = verdicts.find(Comparison('a', 'b', (0.0, math.inf), of_a='seconds', of_b='seconds'), rows)
    assert (times.a.n, times.b.n) == (4, 5)
    assert times.verdict == OPEN  # four are too few


def test_pairs_are_of_the_same_seed():
    rows = runs.collect([row('a', seed, value) for seed, value in ((0, 0.5), (1, 0.6), (7, 0.9))])
    rows |= runs.collect([row('b', seed, value) for seed, value in ((7, 0.8), (1, 0.4), (3, 0.1))])
    found = verdicts.find(Comparison('a', 'b', paired=True), rows)
    assert found.difference.mean == pytest.approx((0.2 + 0.1) / 2)
    assert (found.a.n, found.verdict) == (2, MEASURED)


def test_one_comparison_is_enough_to_contradict_and_all_are_needed_to_hold():
    rows = rows_of(
        a=[0.9, 0.91, 0.9, 0.91, 0.9], b=[0.8, 0.81, 0.8, 0.81, 0.8], c=[0.1, 0.9, 0.1, 0.9, 0.1], d=[0.5] * 4
    )
    above = (0.0, math.inf)
    holds, wrong = Comparison('a', 'b', above), Comparison('b', 'a', above)
    wide, few, none = Comparison('a', 'c', above), Comparison('a', 'd', above), Comparison('a', 'nothing', above)
    told = Comparison('b', 'a')  # nothing is expected of it

    def verdict(*comparisons):
        return verdicts.conclude(Claim('', comparisons), rows)[0]

    assert verdict(holds, told) == HOLDS
    assert verdict(holds, wide) == verdict(holds, few) == verdict(none) == OPEN
    assert verdict(wide, holds, wrong, few) == CONTRADICTED


@pytest.mark.parametrize('name', table.SCALES)
def test_what_is_compared_is_trained_and_differs(name):
    scale = table.SCALES[name]
    every, claims = table.settings(scale), table.claims(scale)
    assert list(every) == table.needed(scale, list(claims))  # nothing is trained for nothing
    seen = {}
    for run in runs.plan(scale, every, every, pathlib.Path('/x'), ()):
        given = [word for word in run.arguments(every) if not word.startswith('--workdir')]
        recipe, *fields = [word for word in given if not word.startswith('--cpu_devices')]
        config = flatten(trainer.load_recipe(recipe.removeprefix('--config='), fields)) if run.seed == 0 else {}
        key = json.dumps([given, config], sort_keys=True)
        assert key not in seen, (run.name, seen.get(key))
        seen[key] = run.name
        if config:
            narrow = run.name.endswith((' stochastic', ' nearest'))
            assert config['precision.policy'] == (run.name.split()[0] if narrow else '32.32')
    folders = {run.workdir for run in runs.plan(scale, every, every, pathlib.Path('/x'), ())}
    assert len(folders) == len(seen) == len(every) * scale.seeds
    assert scale.seeds >= verdicts.ENOUGH


@pytest.mark.slow
@pytest.mark.parametrize('name', table.SCALES)
def test_every_setting_can_be_trained(name):
    scale = table.SCALES[name]
    # The digits stand in for other data; their splits have no parts.
    data = ['--config.dataset=digits', '--config.input.train_split=train', '--config.input.test_split=test']
    every = table.settings(scale)
    for run in runs.plan(scale, every, every, pathlib.Path('/x'), data)[: len(every)]:
        recipe, *fields = (word for word in run.arguments(every) if word.startswith('--config'))
        assemble(trainer.load_recipe(recipe.removeprefix('--config='), fields))


def runner(folder, stop=lambda: False, seeds=2, workers=2, **settings):
    """Runs settings with the fake trainer; returns the rows and what was said."""
    scale = dataclasses.replace(table.SCALES['digits'], seeds=seeds)
    planned = runs.plan(scale, settings, settings, folder, ())
    said = []
    made = runs.Runner(planned, settings, stop=stop, say=said.append, program=FAKE)
    trainer.in_threads(workers, made.work)
    return [found for run in planned if (found := runs.read(run, settings))], said


def starts(folder, name):
    return [len(path.read_text().splitlines()) for path in sorted((folder / name).glob('seed*/starts'))]


def test_runs_are_done_once_and_again_when_their_settings_change(tmp_path):
    good, bad = Setting({'optimizer.momentum': 0.9}), Setting({'optimizer.weight_decay': 1e-3})
    rows, _ = runner(tmp_path, good=good, bad=bad)
    assert [(one['setting'], one['seed']) for one in rows] == [('good', 0), ('bad', 0), ('good', 1), ('bad', 1)]
    assert rows[0]['test_accuracy'] - rows[2]['test_accuracy'] == pytest.approx(0.001)  # the seed gets there
    assert rows[0]['seconds'] == 4 * 50 / 100.0
    assert rows[1]['error'] == 'error: 20 updates in a row were not finite'
    assert rows[0]['command'].startswith('python main.py --config=configs/digits.py ')
    assert '--config.optimizer.momentum=0.9' in rows[0]['command']
    assert str(tmp_path) not in rows[0]['command']
    again, said = runner(tmp_path, good=good, bad=bad)
    assert (again, said) == (rows, [])
    assert starts(tmp_path, 'good') == starts(tmp_path, 'bad') == [1, 1]
    changed, _ = runner(tmp_path, good=Setting({'optimizer.momentum': 0.8}), bad=bad)
    assert changed[0]['test_accuracy'] == pytest.approx(rows[0]['test_accuracy'] - 0.1)
    assert starts(tmp_path, 'bad') == [1, 1]
    runs.write_rows(rows, tmp_path / 'rows.csv')
    stored = runs.read_rows(tmp_path / 'rows.csv', ('good', 'bad'))
    assert [{name: value or None for name, value in one.items()} for one in stored] == [
        {name: value or None for name, value in one.items()} for one in rows
    ]


@pytest.mark.parametrize('text', ['', '{', 'null', '{}', '[]', '{"arguments": 3}'])
def test_a_run_whose_outcome_is_damaged_is_done_again(text, tmp_path):
    rows, _ = runner(tmp_path, seeds=1, one=Setting())
    (tmp_path / 'one' / 'seed0' / 'outcome.json').write_text(text)
    (tmp_path / 'one' / 'seed0' / 'arguments.json').write_text(text)
    again, said = runner(tmp_path, seeds=1, one=Setting())
    assert again == rows
    assert len(said) == 1


@pytest.mark.parametrize(
    ('old', 'new', 'words'),
    [
        ('seconds,', 'minutes,', 'must begin with the columns setting,seed,'),
        ('base,0,', 'base,one,', "line 2: seed='one' must be a number"),
        ('base,0,', 'base,0,0.5,', 'line 2 must have 15 values'),
        ('base,0,0.48425', 'base,0,nan', "test_accuracy='nan' must be from 0 to 1"),
        ('base,0,0.', 'base,0,4', "test_accuracy='448425' must be from 0 to 1"),
        ('base,1,', 'base,0,', "'base' with seed 0 comes twice"),
        ('base,0,', 'bass,0,', "no claim has a setting='bass'"),
        ('base,0,0.48425', 'base,0,', 'line 2: without an error there must be a test_accuracy'),
        ('558634,10,', '558634,0,', "classes='0' must be a number of at least 1"),
        ('base,0,', 'b\xff', 'is no CSV'),
    ],
)
def test_damaged_results_are_one_line(old, new, words, tmp_path, capsys):
    before = (command.STORED / 'cpu.csv').read_bytes().replace(old.encode(), new.encode('latin-1'), 1)
    (tmp_path / 'rows.csv').write_bytes(before)
    with pytest.raises(SystemExit):
        command.main(['--show', f'--workdir={tmp_path / "none"}', f'--results={tmp_path / "rows.csv"}'])
    assert words in capsys.readouterr().err
    assert (tmp_path / 'rows.csv').read_bytes() == before


def test_showing_writes_nothing(tmp_path, monkeypatch, capsys):
    """Not even where there are runs: results that are named are those that are shown."""
    rows = runs.read_rows(command.STORED / 'digits.csv', table.settings(table.SCALES['digits']))
    monkeypatch.setattr(runs, 'read', lambda run, every: rows[0] if (run.name, run.seed) == ('base', 0) else None)
    copy = tmp_path / 'copy.csv'
    copy.write_bytes((command.STORED / 'digits.csv').read_bytes())
    command.main(['--scale=digits', '--show', f'--workdir={tmp_path / "work"}', f'--results={copy}'])
    assert f'{len(rows)} runs; {copy}' in capsys.readouterr().out
    assert copy.read_bytes() == (command.STORED / 'digits.csv').read_bytes()
    command.main(['--scale=digits', '--show', f'--workdir={tmp_path / "work"}'])
    assert '1 runs; ' in capsys.readouterr().out
    assert not (tmp_path / 'work').exists()


def test_a_run_that_is_refused_says_nothing_and_ends_all(tmp_path):
    with pytest.raises(ConfigError, match='bad, seed 0: epochs=-3 is out of range'):
        runner(tmp_path, workers=1, bad=Setting({'epochs': -3}), good=Setting())
    assert not list(tmp_path.glob('*/*/outcome.json'))
    assert starts(tmp_path, 'bad') == [1]
    rows, _ = runner(tmp_path, seeds=1, good=Setting())
    assert len(rows) == 1


def test_after_a_run_that_is_killed_the_others_go_on(tmp_path):
    settings = {'one': Setting({'dataset': 'crash'}), 'two': Setting()}
    rows, said = runner(tmp_path, seeds=1, workers=1, **settings)
    assert [row['setting'] for row in rows] == ['two']
    assert said[0] == 'one, seed 0: killed by SIGKILL; the same command tries again'
    rows, _ = runner(tmp_path, seeds=1, workers=1, **settings)
    assert starts(tmp_path, 'one') == [2]


def test_a_stopped_run_goes_on_in_its_folder(tmp_path):
    (tmp_path / 'one').mkdir()
    (tmp_path / 'one' / 'wait').touch()
    begun = (tmp_path / 'one' / 'seed0' / 'metrics.csv').exists
    rows, said = runner(tmp_path, stop=begun, seeds=1, workers=1, one=Setting())
    assert rows == []
    assert said == ['one, seed 0: stopped; the same command goes on with it']
    assert (tmp_path / 'one' / 'seed0' / 'saved').exists()
    (tmp_path / 'one' / 'wait').unlink()
    rows, _ = runner(tmp_path, seeds=1, one=Setting())
    assert len(rows) == 1
    assert starts(tmp_path, 'one') == [2]
    assert (tmp_path / 'one' / 'seed0' / 'saved').exists()  # nothing was emptied


def test_a_run_waits_for_the_one_it_starts_from(tmp_path):
    (tmp_path / 'half').mkdir()
    (tmp_path / 'half' / 'wait').touch()
    settings = {'half': Setting({'image_size': 8}), 'tuned': Setting(starts_from='half')}
    threading.Timer(0.5, (tmp_path / 'half' / 'wait').unlink).start()
    rows, said = runner(tmp_path, seeds=1, **settings)
    assert [line.partition(',')[0] for line in said] == ['half', 'tuned']
    given = json.loads((tmp_path / 'tuned' / 'seed0' / 'arguments.json').read_text())
    assert f'--config.init_from={tmp_path / "half" / "seed0"}' in given
    assert (tmp_path / 'half' / 'seed0' / 'checkpoints').exists()
    assert not (tmp_path / 'tuned' / 'seed0' / 'checkpoints').exists()
    assert rows[1]['seconds'] == 2 * rows[0]['seconds']


def test_a_run_does_not_start_from_one_that_another_process_is_at(tmp_path):
    settings = {'half': Setting({'image_size': 8}), 'tuned': Setting(starts_from='half')}
    with trainer.held(tmp_path / 'half' / 'seed0'):
        rows, said = runner(tmp_path, seeds=1, workers=1, **settings)
    assert rows == []
    assert said[1] == 'tuned, seed 0: has to wait for half; the same command goes on with it'


def test_what_would_start_from_a_run_that_diverged_counts_as_diverged(tmp_path):
    settings = {'half': Setting({'optimizer.weight_decay': 1e-3}), 'tuned': Setting(starts_from='half')}
    rows, said = runner(tmp_path, seeds=1, workers=1, **settings)
    assert [row['error'] for row in rows] == ['error: 20 updates in a row were not finite', 'half diverged']
    assert (rows[1]['test_accuracy'], rows[1]['seconds']) == (None, None)
    assert said[1] == 'tuned, seed 0: half diverged'
    assert starts(tmp_path, 'tuned') == []
    assert runner(tmp_path, seeds=1, **settings) == (rows, [])


def test_status_says_whether_a_run_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, 'Runner', functools.partial(runs.Runner, program=FAKE))
    settings = {'half': Setting({'image_size': 8}), 'tuned': Setting(starts_from='half')}
    planned = runs.plan(dataclasses.replace(table.SCALES['digits'], seeds=1), settings, settings, tmp_path, ())
    with trainer.held(tmp_path / 'half' / 'seed0'):
        assert command.train(planned, settings, 1) == 1  # another process is at it, and the second has to wait for it
    assert command.train(planned, settings, 1) == 0
    assert command.train(planned, settings, 1) == 0  # nothing to do
    assert '2 of 2 runs are done' in capsys.readouterr().out


def test_a_folder_in_use_is_let_be(tmp_path):
    folder = tmp_path / 'one' / 'seed0'
    with trainer.held(folder):
        rows, said = runner(tmp_path, seeds=1, one=Setting())
    assert (rows, said) == ([], ['one, seed 0: another process is at it'])
    assert not (folder / 'starts').exists()


@pytest.mark.parametrize('path', STORED, ids=lambda path: path.stem)
def test_stored_results_are_of_the_settings_as_they_are(path, capsys):
    scale = table.SCALES[path.stem]
    every = table.settings(scale)
    now = {(run.name, run.seed): run for run in runs.plan(scale, every, every, pathlib.Path('/x'), ())}
    for found in runs.read_rows(path, every):
        given = now[found['setting'], found['seed']].arguments(every)
        fields = {word for word in given if word.startswith('--config') and '/x' not in word}
        assert fields <= set(found['command'].replace("'", '').replace(' --', '\0--').split('\0')), found['setting']
    command.main([f'--scale={path.stem}', '--show', '--workdir=/nowhere'])
    with path.open(newline='') as file:
        assert f'{len(list(csv.DictReader(file)))} runs' in capsys.readouterr().out


@pytest.mark.parametrize('path', json.loads(RECIPES.read_text()))
def test_stored_results_are_of_the_recipes_as_they_are(path):
    """If this fails, results of other recipes are shown: run the claims again, and write the recipes beside them."""
    now = json.loads(json.dumps(flatten(trainer.load_recipe(path))))
    then = json.loads(RECIPES.read_text())[path]
    assert {field: now.get(field) for field in then} == then
    neutral = json.loads(json.dumps(flatten(base.get_config())))
    assert {field: now[field] for field in now.keys() - then.keys()} == {
        field: neutral[field] for field in now.keys() - then.keys()
    }


def test_text():
    rows = rows_of(a=[0.9, 0.91, 0.9, 0.91, 0.9], b=[0.8, 0.81, 0.8, 0.81, 0.8])
    comparisons = (
        Comparison('a', 'b', (-0.02, math.inf)),
        Comparison('a', 'b', (-math.inf, 0.0), 'seconds', 'seconds'),
    )
    text = report.show({'one': Claim('it is so', comparisons)}, rows)
    assert 'one: it is so: UNDECIDED' in text
    assert '  a 90.4 ± 0.5 % (n=5) − b 80.4 ± 0.5 % (n=5) = +10.0 [+9.2, +10.8]; expected above -2.0: holds' in text
    assert '  a 12.0 ± 1.6 s (n=5) − b 12.0 ± 1.6 s (n=5) = +0.0 [-2.3, +2.3]; expected below +0.0: undecided' in text


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (['--claims=batch,luck'], "'luck' is unknown"),
        (['--workers=0'], '--workers=0 must be at least 1'),
        (['--show', '--quick'], "unrecognized argument '--quick'"),
        (['--show', '--workers=2'], '--workers means nothing with --show'),
        (['--show', '--workdir=/nowhere', '--config.model.dropout=0.1'], 'no runs in /nowhere with --config.model'),
        (['--show', '--results=x.csv', '--config.model.dropout=0.1'], 'means nothing with --show and --results'),
        (['--config.seed=0', '--claims=groups'], '--config.seed cannot be set: the runs of groups differ in it'),
        (['--config.model.group_size=16', '--claims=groups'], '--config.model.group_size cannot be set'),
        (['--show', '--workdir=/nowhere', f'--results={command.STORED / "digits.csv"}'], 'is not of --scale=cpu'),
        (['--scale=digits', '--claims=groups', f'--results={ROOT}'], 'is a folder; it must be a file'),
        (['--show', '--config.optimizer.momentun=1'], 'momentun'),
        (
            ['--show', '--scale=gpu', '--workdir=/nowhere', '--results=/nowhere/gpu.csv'],
            'no results in /nowhere/gpu.csv',
        ),
    ],
)
def test_errors_are_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(argv)
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'error: ' in said
    assert words in said
