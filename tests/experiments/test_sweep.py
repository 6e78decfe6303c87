"""Sweeps: what is drawn, who does which trial, and what is left after kills, failures and pruning."""

import csv
import dataclasses
import json
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time

import optuna
import pytest
from optuna.trial import TrialState

from efficientnet.errors import ConfigError
from efficientnet.loop.assemble import assemble
from efficientnet.loop.settings import flatten
from experiments import trainer
from experiments.sweep import __main__ as command
from experiments.sweep import report, search, studies

ROOT = pathlib.Path(__file__).parents[2]
FAKE = (sys.executable, str(ROOT / 'tests' / 'fake_trainer.py'))
DIGITS = 'configs/digits.py'
SMALL = ('--config.model.width=0.25', '--config.model.depth=0.1', '--config.image_size=8')

# ml_collections loads recipes so.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(trainer, 'POLL', 0.01)


def make(folder, *, trials=4, name='study', storage='sweep.db', space=None, prune=False, stop=lambda: False):
    """A sweep over momentum alone unless said otherwise, with a fake trainer."""
    plan = studies.Study(space or {'optimizer.momentum': studies.Range(0.8, 0.98, (0.85, 0.9))})
    recipe = trainer.load_recipe(DIGITS)
    study = search.open_study(name, search.open_storage(str(folder / storage)), recipe, prune=prune)
    space = studies.distributions(plan, recipe)
    return search.Sweep(study, plan, DIGITS, (), space, folder / 'trials', trials, stop, lambda _: None, FAKE)


def rows(sweep, folder):
    report.write_csv(sweep.study.get_trials(), folder / 'trials.csv')
    with (folder / 'trials.csv').open(newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('name', studies.STUDIES)
def test_every_study_can_be_trained(name):
    plan, recipe = studies.STUDIES[name], trainer.load_recipe(DIGITS)
    space = studies.distributions(plan, recipe)
    drawn = {field: values[-1] for field, values in studies.grid(plan, recipe).items()}
    # Through the command line, as main.py gets them.
    changes = [trainer.override(*change) for change in studies.changes(plan, drawn).items()]
    parts = assemble(trainer.load_recipe(DIGITS, [*SMALL, *changes]))
    assert (parts.config.optimizer.name, parts.config.global_batch) == (name, 256)
    for field, values in studies.grid(plan, recipe).items():
        assert all(space[field]._contains(space[field].to_internal_repr(value)) for value in values), field


def test_multiples_of_the_recipe_and_units():
    plan, recipe = studies.STUDIES['lars'], trainer.load_recipe(DIGITS, ['--config.global_batch=96'])
    space = studies.distributions(plan, recipe)
    assert space['global_batch'].choices == (96, 192, 384)
    rate = space['optimizer.rate_per_example']
    assert (rate.low, rate.high, rate.log) == (2.0**-9, 2.0**-3, True)
    assert studies.changes(plan, {'schedule.warmup': 12.5}) == {'optimizer.name': 'lars', 'schedule.warmup': '12.5 %'}
    zero = trainer.load_recipe(DIGITS, ['--config.optimizer.rate_per_example=0'])
    with pytest.raises(ConfigError, match=r'optimizer\.rate_per_example=0\.0 of the recipe'):
        studies.distributions(plan, zero)


@pytest.mark.parametrize('storage', ['sweep.db', 'journal.log'])
def test_workers_of_two_machines_share_the_trials_and_a_failure_is_one_trial(tmp_path, storage):
    space = {
        'optimizer.momentum': studies.Range(0.8, 0.98, (0.9,)),
        'optimizer.weight_decay': studies.Choice((1e-5, 1e-3)),  # the fake trainer fails at the second
    }
    sweeps = [make(tmp_path, trials=12, storage=storage, space=space) for _ in range(2)]
    threads = [threading.Thread(target=trainer.in_threads, args=(2, sweep.work)) for sweep in sweeps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = rows(sweeps[0], tmp_path)
    assert [row['trial'] for row in found] == [str(number) for number in range(12)]
    assert len({row['folder'] for row in found}) == 12
    for row in found:
        log = (tmp_path / 'trials' / row['folder'] / 'starts').read_text().splitlines()
        assert len(log) == 1  # nobody did another's trial again
        given = json.loads(log[0].partition(' ')[2])
        assert float(given['optimizer.momentum']) == float(row['optimizer.momentum'])
        if row['optimizer.weight_decay'] == '0.001':
            assert (row['state'], row['error']) == ('fail', 'error: 20 updates in a row were not finite')
            assert row['test_accuracy'] == ''
        else:
            right = 0.9 - abs(float(row['optimizer.momentum']) - 0.9) - 0.1 / 8
            assert row['state'] == 'complete'
            assert float(row['test_accuracy']) == pytest.approx(right)
            assert (row['evaluations'], row['seconds'], row['error']) == ('4', '2.0', '')
            assert not (tmp_path / 'trials' / row['folder'] / 'checkpoints').exists()
    assert {row['state'] for row in found} == {'fail', 'complete'}


def test_what_is_drawn_wins_over_what_was_given(tmp_path):
    """A field that is searched around the recipe's value may be given: it says what is searched around."""
    sweep = dataclasses.replace(make(tmp_path, trials=1), overrides=('--config.optimizer.momentum=0.6',))
    sweep.work()
    (row,) = rows(sweep, tmp_path)
    given = json.loads((tmp_path / 'trials' / row['folder'] / 'starts').read_text().partition(' ')[2])
    assert float(given['optimizer.momentum']) == float(row['optimizer.momentum']) != 0.6


def test_a_recipe_that_is_refused_ends_the_sweep_and_costs_no_trial(tmp_path):
    bad = dataclasses.replace(make(tmp_path, trials=2), overrides=('--config.epochs=-3',))
    with pytest.raises(ConfigError, match='trial 0: epochs=-3 is out of range'):
        trainer.in_threads(1, bad.work)
    good = make(tmp_path, trials=2)
    good.work()
    assert [row['state'] for row in rows(good, tmp_path)] == ['fail', 'complete', 'complete']


def test_points_of_a_grid_that_were_refused_come_back(tmp_path):
    sweep = make(tmp_path, space={'epochs': studies.Choice((-3, 3))})
    points = {'epochs': (-3, 3)}
    sweep.enqueue_grid(points)
    with pytest.raises(ConfigError, match='epochs=-3'):
        dataclasses.replace(sweep, trials=0).work()
    again = dataclasses.replace(make(tmp_path, space={'epochs': studies.Choice((-3, 3))}), trials=0)
    assert again.enqueue_grid(points) == 2
    again.work()  # now that another point has come to something, one that is refused is a trial that failed
    assert [row['state'] for row in rows(again, tmp_path)] == ['fail', 'complete', 'fail']


def test_a_crash_is_told_by_its_signal(tmp_path):
    plan = {'dataset': studies.Choice(('crash',))}
    sweep = make(tmp_path, trials=1, space=plan)
    sweep.work()
    assert rows(sweep, tmp_path)[0]['error'] == 'killed by SIGKILL'


def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f'{path} did not come'
        time.sleep(0.01)


WORKER = """
import sys, pathlib
from tests.experiments.test_sweep import make
make(pathlib.Path(sys.argv[1]), trials=3, storage='journal.log').work()
"""


def test_a_killed_worker_leaves_a_trial_that_is_taken_over_when_its_run_has_ended(tmp_path):
    (tmp_path / 'trials').mkdir()
    wait = tmp_path / 'trials' / 'wait'
    wait.touch()
    worker = subprocess.Popen([sys.executable, '-c', WORKER, str(tmp_path)], cwd=ROOT)
    wait_for(tmp_path / 'trials' / '0000' / 'metrics.csv')
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    sweep = make(tmp_path, trials=3, storage='journal.log')
    # Its run goes on without it, and nobody may touch the folder.
    assert sweep._take_over() is True
    assert [trial.state for trial in sweep.study.trials] == [TrialState.RUNNING]
    threading.Timer(0.3, wait.unlink).start()
    sweep.work()
    found = rows(sweep, tmp_path)
    assert [row['state'] for row in found].count('abandoned') == 1
    assert found[0]['state'] == 'abandoned'
    heir = next(row for row in found[1:] if row['folder'] == '0000')
    assert heir['state'] == 'complete'
    assert heir['optimizer.momentum'] == found[0]['optimizer.momentum']
    assert len(found) == 4
    assert len({row['folder'] for row in found}) == 3
    starts = (tmp_path / 'trials' / '0000' / 'starts').read_text().splitlines()
    assert len(starts) == 2


def test_a_run_that_was_killed_with_its_worker_goes_on_in_its_folder(tmp_path):
    (tmp_path / 'trials').mkdir()
    wait = tmp_path / 'trials' / 'wait'
    wait.touch()
    sweep = make(tmp_path, trials=1, stop=(tmp_path / 'trials' / '0000' / 'metrics.csv').exists)
    sweep.work()
    assert (tmp_path / 'trials' / '0000' / 'saved').exists()  # SIGTERM, not SIGKILL
    assert (tmp_path / 'trials' / '0000' / 'checkpoints').exists()
    assert sweep.study.trials[0].state == TrialState.RUNNING
    wait.unlink()
    again = make(tmp_path, trials=1)
    again.work()
    assert [row['state'] for row in rows(again, tmp_path)] == ['abandoned', 'complete']
    assert [row['folder'] for row in rows(again, tmp_path)] == ['0000', '0000']
    make(tmp_path, trials=1).work()
    assert len(again.study.trials) == 2  # a finished study has nothing to do


def test_a_trial_whose_worker_died_before_it_had_a_folder(tmp_path, monkeypatch):
    sweep = make(tmp_path, trials=2)
    sweep.study.ask(sweep.space)
    assert sweep._take_over() is True  # it may be about to get one
    monkeypatch.setattr(search, 'GRACE', -1.0)
    sweep.work()
    assert [trial.state for trial in sweep.study.trials] == [TrialState.FAIL] + [TrialState.COMPLETE] * 2


def test_a_trial_of_a_machine_that_shares_the_storage_alone_is_let_be(tmp_path):
    sweep = make(tmp_path, trials=2)
    sweep.study.ask(sweep.space).set_user_attr(search.FOLDER, '0000')
    sweep.work()
    assert [trial.state for trial in sweep.study.trials] == [TrialState.RUNNING, TrialState.COMPLETE]


def test_bad_trials_are_pruned(tmp_path):
    (tmp_path / 'trials').mkdir()
    space = {'optimizer.momentum': studies.Choice((0.9, 0.5))}
    sweep = make(tmp_path, trials=6, space=space, prune=True)
    for momentum in [0.9] * 5 + [0.5]:
        sweep.study.enqueue_trial({'optimizer.momentum': momentum})
    sweep.work()
    states = [trial.state for trial in sweep.study.trials]
    assert states == [TrialState.COMPLETE] * 5 + [TrialState.PRUNED]
    # The first evaluation is too early, the second is below the median of the others' second.
    assert max(sweep.study.trials[-1].intermediate_values) == 2


def test_what_is_searched_is_said():
    plan, recipe = studies.STUDIES['lars'], trainer.load_recipe(DIGITS)

    def said(field, *, grid):
        return studies.describe(plan, field, recipe, grid=grid)

    assert said('optimizer.momentum', grid=False) == '0.8 … 0.98'
    assert said('optimizer.momentum', grid=True) == '0.885, 0.95'
    assert said('optimizer.weight_decay', grid=False) == '1e-07 … 0.001, by ratio'
    assert said('schedule.warmup', grid=True) == '5, 20 %'
    assert said('global_batch', grid=False) == said('global_batch', grid=True) == '64, 128, 256'


def test_a_recipes_argument_is_in_the_name():
    names = {
        command.parse(['--study=lars', '--trials=1', f'--config=configs/{recipe}'])[0].name
        for recipe in ('cifar10.py', 'cifar10.py:large')
    }
    assert names == {'lars-cifar10', 'lars-cifar10-large'}


def test_a_grid_is_done_once(tmp_path):
    space = {
        'optimizer.momentum': studies.Range(0.8, 0.98, (0.85, 0.9)),
        'global_batch': studies.Choice((1, 2), of_recipe=True),
    }
    recipe = trainer.load_recipe(DIGITS)
    for _ in range(2):
        sweep = make(tmp_path, trials=0, space=space)
        assert sweep.enqueue_grid(studies.grid(sweep.plan, recipe)) == 4
        trainer.in_threads(2, sweep.work)
    found = {(row['optimizer.momentum'], row['global_batch']): row['state'] for row in rows(sweep, tmp_path)}
    assert found == dict.fromkeys([('0.85', '64'), ('0.85', '128'), ('0.9', '64'), ('0.9', '128')], 'complete')
    assert len(sweep.study.trials) == 4


def test_a_folder_is_of_one_study(tmp_path, capsys):
    for _ in range(2):
        search.claim_folder(tmp_path, 'one')
    flags = ['--config=configs/digits.py', f'--workdir={tmp_path}', '--trials=1', '--study=lars', '--name=two']
    with pytest.raises(SystemExit):
        command.main(flags)
    assert f"--workdir={tmp_path} holds trials of study 'one'; for 'two' give another" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['study']  # nothing was begun


def test_another_recipe_is_another_study(tmp_path):
    storage = search.open_storage(str(tmp_path / 'sweep.db'))
    other = trainer.load_recipe(DIGITS, ['--config.epochs=3', '--config.model.width=0.25'])
    search.open_study('one', storage, other, prune=True)  # of which nothing came
    study = search.open_study('one', storage, trainer.load_recipe(DIGITS), prune=True)
    study.ask().set_user_attr(search.FOLDER, '0000')
    with pytest.raises(ConfigError, match=r"study 'one' .* differs in epochs, model\.width"):
        search.open_study('one', storage, other, prune=True)
    search.open_study('two', storage, other, prune=True)


@pytest.mark.parametrize('place', ['bad.db', 'bad.log', 'folder', 'foo://bar'])
def test_a_storage_that_is_none_is_one_line(place, tmp_path):
    (tmp_path / 'folder').mkdir()
    for name in ('bad.db', 'bad.log'):
        (tmp_path / name).write_text('neither a data base\nnor a journal\n')
    place = place if '://' in place else str(tmp_path / place)
    with pytest.raises(ConfigError, match=f'--storage={place} cannot be used: .') as error:
        search.open_storage(place)
    assert '\n' not in str(error.value)


def test_a_storage_in_no_folder_is_one_line(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ConfigError, match='--storage: folder '):
        search.open_storage(str(tmp_path / 'file' / 'sweep.db'))


def test_pictures_and_best(tmp_path):
    sweep = make(tmp_path, trials=3)
    sweep.work()
    files = report.write(sweep.study, tmp_path)
    assert [path.name for path in files] == ['trials.csv', *[f'{name}.png' for name in report.PICTURES]]
    assert all(path.read_bytes()[:4] == b'\x89PNG' for path in files[1:])
    best = max(float(row['test_accuracy']) for row in rows(sweep, tmp_path))
    said = command.summary(sweep.study, sweep.plan, ['--config.epochs=3.0', '--config.optimizer.momentum=0.5'])
    assert f'best: {best:.2%}' in said
    assert '3 complete' in said
    overrides = [word for line in said.splitlines() for word in shlex.split(line) if word.startswith('--config.')]
    config = flatten(trainer.load_recipe(DIGITS, overrides))  # a line can be pasted: units and all digits are there
    given = studies.changes(sweep.plan, sweep.study.best_params) | {'epochs': 3.0}  # the trial's own values win
    assert {field: config[field] for field in given} == given


def test_without_two_accuracies_there_is_nothing_to_draw(tmp_path):
    sweep = make(tmp_path, trials=2, space={'optimizer.momentum': studies.Choice((0.9,))})
    sweep.work()
    assert [path.name for path in report.write(sweep.study, tmp_path)] == ['trials.csv']


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (['--study=lars', f'--config={DIGITS}', '--trials=0'], '--trials=0 must be at least 1'),
        (['--study=lars', f'--config={DIGITS}', '--trials=2', '--workers=0'], '--workers=0 must be at least 1'),
        (['--study=lars', f'--config={DIGITS}', '--trials=2', '--grid'], 'not allowed with'),
        (['--study=lars', f'--config={DIGITS}', '--trials=2', '--speed'], "unrecognized argument '--speed'"),
        (['--study=lars', '--config=configs/no.py', '--trials=2'], 'configs/no.py'),
        (['--study=lars', f'--config={DIGITS}', '--trials=2', '--config.optimizer.momentun=1'], 'momentun'),
        (['--study=lars', f'--config={DIGITS}', '--trials=2', '--config.optimizer.rate_per_example=-1'], 'above 0'),
        (['--study=lars', f'--config={DIGITS}', '--trials=2', '--config.optimizer.rate_per_example=nan'], 'above 0'),
        (['--study=lars', f'--config={DIGITS}', '--trials=2', f'--workdir={DIGITS}'], '--workdir: folder'),
        (['--study=lars', f'--config={DIGITS}', '--trials=2', '--config.optimizer.momentum=0.5'], 'means nothing here'),
        (['--study=lars', f'--config={DIGITS}', '--trials=2', '--config.optimizer.name=sgd'], 'means nothing here'),
        (['--study=rmsprop', f'--config={DIGITS}', '--grid', '--config.optimizer.nesterov'], 'means nothing here'),
        (
            ['--study=lars', f'--config={DIGITS}', '--trials=2', '--config.epochs', '1'],
            "unrecognized argument '1'; a field",
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


@pytest.mark.slow
def test_a_real_sweep(tmp_path):
    """One trial of the real trainer, by the command."""
    small = ['--config.steps=2', *SMALL, '--config.averaging.epoch_decay=0']
    argv = ['--study=lars', f'--config={DIGITS}', '--trials=1', f'--workdir={tmp_path}', *small]
    found = subprocess.run(
        [sys.executable, '-m', 'experiments.sweep', *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, '')
    summary = json.loads((tmp_path / 'trials' / '0000' / 'summary.json').read_text())
    assert f'best: {summary["test_accuracy"]:.2%} by trial 0' in found.stdout
    assert '1 complete' in found.stdout


@pytest.mark.parametrize(
    ('path', 'why'),
    [
        ('configs/none.py', 'No such file or directory'),
        ('configs', 'Is a directory'),
        ("it's/none.py", 'No such file or directory'),
    ],
)
def test_a_recipe_that_cannot_be_read_is_one_short_line(path, why):
    with pytest.raises(ConfigError) as raised:
        trainer.load_recipe(path)
    assert str(raised.value) == f'--config: {path} cannot be read: {why}'


@pytest.mark.parametrize(
    ('line', 'said'),
    [
        ("{}['missing']", "{path}, line 4: KeyError: 'missing'"),
        ('config.optimizer.momentun = 1', "{path}, line 4: --config has no field 'momentun'; did you mean 'momentum'?"),
        ('len(5)', "{path}, line 4: TypeError: object of type 'int' has no len()"),
        ('import nothing_of_the_kind', "{path}, line 4: ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ('def', '{path}, line 4: SyntaxError: invalid syntax'),
        ("raise ValueError('pick another')", 'flag --config={path}: pick another'),
    ],
)
def test_what_goes_wrong_inside_a_recipe_is_told_with_its_line(line, said, tmp_path):
    path = tmp_path / 'recipe.py'
    path.write_text(f'from configs import base\ndef get_config():\n    config = base.get_config()\n    {line}\n')
    with pytest.raises(ConfigError) as raised:
        trainer.load_recipe(str(path), ['--config.seed=1'])
    assert str(raised.value) == said.format(path=path)


def test_a_recipe_without_arguments_says_so():
    with pytest.raises(ConfigError, match=r'digits\.py:gpu: this recipe takes nothing behind a colon'):
        trainer.load_recipe(f'{DIGITS}:gpu')
