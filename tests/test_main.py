"""The command line, as a user meets it: one line for every mistake, and a run from end to end."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments):
    command = [sys.executable, 'main.py', *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ([], ['--workdir is missing']),
        (['--workdir=x'], ['--config is missing']),
        (['--workdir=x', '--config=configs/nothing.py'], ['configs/nothing.py']),
        (
            ['--workdir=x', '--config=configs/imagenet_rmsprop.py:b2,g8'],
            ["error: flag --config=configs/imagenet_rmsprop.py:b2,g8: 'b2,g8' is not understood", 'g16|g4|g1'],
        ),
        (
            ['--workdir=x', '--config=configs/digits.py', '--config.optimizer.momentun=1'],
            ["no field 'momentun'; did you mean 'momentum'?"],
        ),
        (
            ['--workdir=x', '--config=configs/digits.py', '--config.stepz=1'],
            ["no field 'stepz'; did you mean 'steps'?"],
        ),
        (['--workdir=x', '--config=configs/digits.py', '--config.seed=many'], ['seed', 'many']),
        (['--workdir=x', '--config=configs/digits.py', '--mode=dance'], ['mode', 'dance']),
        (['--workdir=x', '--config=configs/digits.py', 'extra'], ['extra']),
        (
            ['--workdir=x', '--config=configs/digits.py', '--config.micro_batch=7'],
            ['micro_batch=7', 'global_batch=63 or 70'],
        ),
        (['--workdir=x', '--config=configs/digits.py', '--config.replicas=2'], ['there are 1', '--cpu_devices=2']),
        pytest.param(
            ['--workdir=/proc/x', '--config=configs/digits.py'],
            ['--workdir=/proc/x cannot be written'],
            marks=pytest.mark.slow,  # tests/loop/test_workdir.py has it without a process
        ),
        (['--workdir=/nowhere/x', '--mode=evaluate'], ['/nowhere/x holds no run']),
    ],
)
def test_a_mistake_is_one_line(arguments, words):
    found = run(*arguments)
    assert found.returncode == 2, found
    lines = found.stderr.strip().splitlines()
    assert len(lines) == 1, found.stderr
    assert lines[0].startswith('error: ')
    assert all(word in lines[0] for word in words), lines[0]


def test_help_names_the_flags():
    found = run('--help')
    for word in ('configs/digits.py', '--workdir', '--mode', '--cpu_devices', 'configs/base.py'):
        assert word in found.stdout


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of two updates on two virtual devices: its folder, its flags, and how it ended."""
    workdir = tmp_path_factory.mktemp('run')
    flags = ['--config=configs/digits.py', f'--workdir={workdir}', '--cpu_devices=2', '--config.replicas=2']
    flags += ['--config.steps=2', '--config.model.width=0.25', '--config.model.depth=0.1', '--config.micro_batch=16']
    flags += ['--config.schedule.warmup=1 steps', '--config.image_size=8', '--config.log_every=1 steps']
    return workdir, flags, run(*flags)


def test_a_run_from_end_to_end(finished):
    """Seven blocks, a stage of the network each; no warning on the way."""
    workdir, _, found = finished
    assert found.returncode == 0, found.stderr
    assert found.stderr == ''
    summary = json.loads((workdir / 'summary.json').read_text())
    assert (summary['replicas'], summary['accumulation'], summary['steps']) == (2, 2, 2)
    assert f'test accuracy {summary["test_accuracy"]:.2%}' in found.stdout.splitlines()[-1]


@pytest.mark.slow  # tests/loop has both with two blocks
def test_the_same_command_again_and_an_evaluation(finished):
    workdir, flags, _ = finished
    assert 'nothing left to do' in run(*flags).stdout
    evaluated = run('--mode=evaluate', f'--workdir={workdir}')
    assert evaluated.returncode == 0, evaluated.stderr
    accuracy = json.loads((workdir / 'summary.json').read_text())['test_accuracy']
    assert f'step 2  test accuracy {accuracy:.2%}' in evaluated.stdout
