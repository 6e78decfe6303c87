"""Whole runs: the loop, killing and resuming, and what a run leaves behind."""

import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from efficientnet.errors import ConfigError, DivergedError, RunError
from efficientnet.loop.assemble import assemble
from efficientnet.loop.checkpoints import Checkpoints
from efficientnet.loop.interrupt import Interrupted
from efficientnet.loop.reporting import COLUMNS, Report
from efficientnet.loop.train import Run, evaluate, train
from efficientnet.parallel.train_state import unpack_state
from tests.tiny import few_blocks, tiny_config

ROOT = pathlib.Path(__file__).parents[2]
TINY = {'precision__policy': '16.16', 'averaging__update_decay': 0.9}

# A run of tests/tiny.py as a process of its own, so that it can be killed.
SCRIPT = """
import sys, pathlib
import tests.conftest  # the same JAX settings as the tests
from efficientnet.loop import train
from efficientnet.loop.interrupt import Interrupted
from tests.tiny import few_blocks, tiny_config
try:
    config = tiny_config(precision__policy='16.16', averaging__update_decay=0.9, steps=int(sys.argv[2]))
    with few_blocks():
        train.train(config, pathlib.Path(sys.argv[1]))
except Interrupted as error:
    print(error)
    sys.exit(128 + error.number)
"""


@pytest.fixture(scope='module', autouse=True)
def _small():
    with few_blocks():
        yield


def state_bytes(workdir, **changes):
    """The newest checkpoint's state as {name: bytes}."""
    import jax

    parts = assemble(tiny_config(**TINY, **changes))
    like = jax.eval_shape(lambda s: unpack_state(s, parts.packings), parts.state_shapes())
    found = Checkpoints(workdir / 'checkpoints', keep=2)
    state, facts, complaints = found.restore_newest(like)
    found.close()
    assert not complaints
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    return {'position': facts['position'], **named}


def rows(workdir):
    with (workdir / 'metrics.csv').open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """An uninterrupted run of six updates."""
    workdir = tmp_path_factory.mktemp('finished')
    return workdir, train(tiny_config(**TINY), workdir)


def test_what_a_run_leaves_behind(finished):
    workdir, summary = finished
    assert json.loads((workdir / 'summary.json').read_text()) == summary
    expected = {'steps': 6, 'replicas': 1, 'stages': 1, 'accumulation': 2, 'policy': '16.16', 'seed': 0, 'skipped': 0}
    assert expected.items() <= summary.items()
    for name in ('test_accuracy', 'test_accuracy_update_average', 'images_per_second', 'compile_seconds', 'seconds'):
        assert summary[name] > 0
    assert summary['test_accuracy_averaged'] is None  # no epoch has ended
    assert [row['step'] for row in rows(workdir)] == ['2', '3', '4', '6']
    assert [bool(row['test_accuracy']) for row in rows(workdir)] == [False, True, False, True]
    assert float(rows(workdir)[-1]['test_accuracy']) == pytest.approx(summary['test_accuracy'], rel=1e-6)
    assert list(workdir.glob('events.out.tfevents.*'))
    assert json.loads((workdir / 'config.json').read_text())['steps'] == 6


def test_damaged_images_are_told_of_at_the_end(tmp_path, capsys):
    for split in ('train', 'test'):
        for number in range(16):
            path = tmp_path / split / 'ab'[number % 2] / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (8, 8), (number, 0, 0)).save(path)
        path.write_bytes(b'damaged')
    fields = {'dataset': 'folder', 'input__dir': str(tmp_path), 'augment__flip': True, 'steps': 2}
    train(tiny_config(**TINY, **fields), tmp_path / 'run')
    assert f'2 damaged images were left out, such as {tmp_path}/train/b/15.png\n' in capsys.readouterr().out


def test_a_finished_run_is_not_run_again(finished, capsys):
    workdir, summary = finished
    again = train(tiny_config(**TINY), workdir)
    assert again['test_accuracy'] == summary['test_accuracy']
    assert again['images_per_second'] == pytest.approx(summary['images_per_second'])
    assert 'nothing left to do' in capsys.readouterr().out


def test_evaluate_agrees(finished):
    workdir, summary = finished
    found = evaluate(None, workdir)
    for name in ('test_accuracy', 'test_top5', 'test_accuracy_update_average'):
        assert found[name] == pytest.approx(summary[name])
    assert found['test_loss'] == pytest.approx(summary['test_loss'], rel=1e-3)


def test_the_command_line_evaluates(finished):
    workdir, summary = finished
    command = [sys.executable, '-m', 'tests.tiny_main', '--mode=evaluate', f'--workdir={workdir}', '--cpu_devices=8']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (0, '')
    assert f'step 6  test accuracy {summary["test_accuracy"]:.2%}' in done.stdout.splitlines()[-1]


def test_evaluate_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match='holds no run'):
        evaluate(None, tmp_path)


def test_a_run_with_a_field_that_nothing_reads_any_more(tmp_path, finished, capsys):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    stored = json.loads((tmp_path / 'config.json').read_text())
    stored['input']['resize'] = 'area'
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    assert evaluate(None, tmp_path)['test_accuracy'] == pytest.approx(finished[1]['test_accuracy'])
    train(tiny_config(**TINY), tmp_path)
    assert 'nothing left to do' in capsys.readouterr().out


def test_another_recipe_in_the_same_folder(finished):
    with pytest.raises(ConfigError, match=r'optimizer\.momentum: 0\.885 there, 0\.5 now'):
        train(tiny_config(**TINY, optimizer__momentum=0.5), finished[0])


class Stop(Exception):  # noqa: N818
    """Stands for a kill."""


def die_saving(workdir, save):
    """Trains until the save of this number, and dies before it is made."""
    real, made = Checkpoints.save, []

    def dying_save(self, *args):
        made.append(args)
        if len(made) == save:
            raise Stop
        real(self, *args)

    with mock.patch.object(Checkpoints, 'save', dying_save), pytest.raises(Stop):
        train(tiny_config(**TINY), workdir)


@pytest.mark.parametrize('save', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_going_on_after_a_death_is_bit_identical(tmp_path, finished, save):
    die_saving(tmp_path, save)
    summary = train(tiny_config(**TINY), tmp_path)
    assert state_bytes(tmp_path) == state_bytes(finished[0])
    assert summary['test_accuracy'] == finished[1]['test_accuracy']
    assert [row['step'] for row in rows(tmp_path)] == ['2', '3', '4', '6']


def test_a_damaged_checkpoint_costs_only_its_steps(tmp_path, finished, capsys):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / 'checkpoints' / '6' / 'facts').rglob('*'):
        if path.is_file():
            path.write_bytes(b'{')
    train(tiny_config(**TINY), tmp_path)
    out = capsys.readouterr().out
    assert 'checkpoints/6 is damaged' in out
    assert 'checkpoint of step 3 of 6' in out
    assert state_bytes(tmp_path) == state_bytes(finished[0])


@pytest.mark.parametrize('interrupted', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_interrupted_evaluation_is_made_up_for(tmp_path, finished, interrupted, capsys):
    """The summary never shows an earlier evaluation in the place of one that was cut off."""
    real, begun = Run.evaluate, []

    def cut_off(self):
        begun.append(self.position)
        if len(begun) < interrupted:
            return real(self)
        self._interrupt.number = signal.SIGTERM
        return False

    with mock.patch.object(Run, 'evaluate', cut_off), pytest.raises(Interrupted, match='saved at step'):
        train(tiny_config(**TINY), tmp_path)
    assert begun == [3, 6][:interrupted]
    summary = train(tiny_config(**TINY), tmp_path)
    assert summary['test_accuracy'] == finished[1]['test_accuracy']
    assert [row['step'] for row in rows(tmp_path) if row['test_accuracy']] == ['3', '6']
    capsys.readouterr()
    train(tiny_config(**TINY), tmp_path)
    assert 'nothing left to do' in capsys.readouterr().out


def test_evaluate_says_nothing_when_interrupted(finished, capsys):
    def cut_off(self):
        self._interrupt.number = signal.SIGTERM
        return False

    with mock.patch.object(Run, 'evaluate', cut_off), pytest.raises(Interrupted):
        evaluate(None, finished[0])
    assert 'test accuracy' not in capsys.readouterr().out


def test_another_layout_goes_on(tmp_path, finished):
    """Come to step 3 on one device, resumed on two: sums round differently in 16 bits, the run is the same one."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / 'checkpoints' / '6')
    summary = train(tiny_config(**TINY, replicas=2, micro_batch=4, log_every='3 steps'), tmp_path)
    assert all(row['train_loss'] for row in rows(tmp_path))
    assert (summary['replicas'], summary['accumulation'], summary['steps']) == (2, 2, 6)
    assert summary['test_loss'] == pytest.approx(finished[1]['test_loss'], rel=0.05)


def test_too_many_skipped_updates_stop_the_run(tmp_path):
    changes = {'precision__initial_loss_scale': 2.0**24, 'precision__max_skipped': 2}
    with pytest.raises(DivergedError, match=r'2 updates in a row were not finite .* in another --workdir$'):
        train(tiny_config(precision__policy='16.16', **changes), tmp_path)


@pytest.mark.skipif(not pathlib.Path('/dev/full').exists(), reason='needs a disk that is full')
def test_a_disk_that_fills_up_is_one_error(tmp_path):
    """What is left in a file's buffer fails again when that is closed, and must not take the first error's place."""

    def on_a_full_disk(self, *args, **options):
        made(self, *args, **options)
        self._file.close()
        self._file = open('/dev/full', 'w')  # noqa: SIM115
        self._csv = csv.DictWriter(self._file, COLUMNS)

    made = Report.__init__
    full = mock.patch.object(Report, '__init__', on_a_full_disk)
    with full, pytest.raises(RunError, match=r'No space left on device; make room, then the same command goes on'):
        train(tiny_config(**TINY), tmp_path)
    train(tiny_config(**TINY), tmp_path)
    assert len(rows(tmp_path)) == 4


def start(workdir, steps):
    command = [sys.executable, '-c', SCRIPT, str(workdir), str(steps)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(workdir, step, process):
    """Returns once metrics.csv has a row at or after a step."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (workdir / 'metrics.csv').exists() and any(int(row['step'] or 0) >= step for row in rows(workdir)):
            return
        time.sleep(0.01)
    raise AssertionError(f'no step {step}: {process.communicate()[0]}')


@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    process = start(tmp_path, 3000)
    wait_for(tmp_path, 4, process)
    process.send_signal(number)
    began = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert process.returncode == 128 + number, out
    message = out.splitlines()[-1]
    assert message.startswith(signal.Signals(number).name)
    assert 'the same command goes on from there' in message
    saved = int(message.split('saved at step ')[1].split()[0])
    assert saved == state_bytes(tmp_path, steps=3000)['position']


@pytest.mark.parametrize('steps', [(4,), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_sigkill_and_restart_end_in_the_same_bits(tmp_path, finished, steps):
    """A real process, killed at moments of its own choosing, leaves what ends as the uninterrupted run did."""
    for step in steps:
        process = start(tmp_path, 6)
        wait_for(tmp_path, step, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / 'summary.json').exists()
    train(tiny_config(**TINY), tmp_path)
    assert state_bytes(tmp_path) == state_bytes(finished[0])
