"""Several real processes as one run: finding each other, agreeing, leaving together, going on in another number."""

import csv
import itertools
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

from configs import base
from efficientnet.errors import ConfigError
from efficientnet.loop.assemble import assemble
from efficientnet.loop.checkpoints import Checkpoints
from efficientnet.loop.train import train
from efficientnet.parallel import processes
from efficientnet.parallel.processes import Membership, find_membership
from efficientnet.parallel.train_state import unpack_state
from tests.tiny import few_blocks

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 120
TINY = {
    'image_size': 8,
    'steps': STEPS,
    'global_batch': 8,
    'micro_batch': 2,
    'replicas': 2,
    'stages': 2,
    'model.width': 0.25,
    'model.depth': 0.1,
    'model.stem_stride': 1,
    'precision.policy': '16.16',
    'optimizer.rate_per_example': 2.0**-8,
    'augment.crop': 'pad',
    'augment.pad': 1,
    'augment.mixup_alpha': 0.2,
    'evaluation.every': '60 steps',
    'evaluation.batch': 60,
    'checkpoint.every': '20 steps',
    'log_every': '10 steps',
}


class Together:
    """The processes of one run, with what each printed."""

    def __init__(self, workdir, count, *extra):
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        self.workdir, self.started = workdir, []
        self.logs = [workdir.with_name(f'{workdir.name}-{number}.log') for number in range(count)]
        for number, log in enumerate(self.logs):
            shared = [f'--coordinator=127.0.0.1:{port}', f'--process_id={number}', f'--process_count={count}']
            command = [
                sys.executable,
                '-m',
                'tests.tiny_main',
                '--config=configs/base.py',
                f'--workdir={workdir}',
                f'--cpu_devices={4 // count}',
                *(f'--config.{name}={value}' for name, value in TINY.items()),
                *(shared if count > 1 else []),
                *(option[number] if isinstance(option, tuple) else option for option in extra),
            ]
            with log.open('w') as file:
                process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            self.started.append(process)

    def wait(self, timeout=240):
        try:
            return [process.wait(timeout) for process in self.started]
        finally:
            for process in self.started:
                process.kill()

    def wait_for_row(self):
        deadline = time.monotonic() + 240
        while not steps_of(self.workdir):
            assert time.monotonic() < deadline, self.text()
            assert all(process.poll() is None for process in self.started), self.text()
            time.sleep(0.02)

    def text(self, number=0):
        return self.logs[number].read_text()


def rows(workdir):
    path = workdir / 'metrics.csv'
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def steps_of(workdir):
    return [int(row['step']) for row in rows(workdir) if row['test_top5'] is not None]


def config():
    found = base.get_config()
    with found.unlocked():
        found.update_from_flattened_dict(TINY)
    return found


def weights(workdir):
    """The weights of the newest checkpoint."""
    import jax

    with few_blocks():
        parts = assemble(config())
    like = jax.eval_shape(lambda state: unpack_state(state, parts.packings), parts.state_shapes())
    found = Checkpoints(workdir / 'checkpoints', keep=2, owner=False)
    state, facts, complaints = found.restore_newest(like)
    found.close()
    assert not complaints
    assert facts['position'] == STEPS
    return state.params


def assert_same_run(workdir, expected):
    # Not the mean loss of a row: an interrupted one starts anew.
    for name in ('gradient_norm', 'weight_norm', 'test_loss', 'test_accuracy'):
        ours = {row['step']: row[name] for row in rows(workdir)}
        for row in rows(expected):
            assert bool(ours[row['step']]) == bool(row[name])
            if row[name]:
                assert float(ours[row['step']]) == pytest.approx(float(row[name]), rel=1e-5), (name, row['step'])
    import jax

    jax.tree.map(np.testing.assert_array_equal, weights(workdir), weights(expected))


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """The run in one process, this one, with all four devices."""
    workdir = tmp_path_factory.mktemp('alone') / 'run'
    with few_blocks():
        train(config(), workdir)
    return workdir


def test_two_are_one_and_a_signal_to_either_stops_both(tmp_path, alone):
    first = Together(tmp_path / 'run', 2)
    first.wait_for_row()
    first.started[1].send_signal(signal.SIGTERM)
    assert first.wait(60) == [143, 143], first.text()
    assert 'SIGTERM: saved at step' in first.text()
    assert 'saved at step' not in first.text(1)
    again = Together(tmp_path / 'run', 2)
    assert again.wait() == [0, 0], again.text() + again.text(1)
    assert 'checkpoint of step' in again.text()
    assert '4 × cpu (cpu) in 2 processes' in again.text()
    assert 'done' not in again.text(1)
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['replicas'] == 2
    assert_same_run(tmp_path / 'run', alone)


@pytest.mark.slow
@pytest.mark.parametrize('gone', [0, 1])
def test_when_one_is_killed_the_others_leave_and_say_so(tmp_path, alone, gone):
    run = Together(tmp_path / 'run', 2)
    run.wait_for_row()
    run.started[gone].kill()
    start = time.monotonic()
    statuses = run.wait(60)
    assert time.monotonic() - start < 20
    assert statuses[gone] == -signal.SIGKILL
    # When process 0 dies, JAX's own watchdog and ours race to end the others.
    assert statuses[1 - gone] == processes.LOST or (gone == 0 and statuses[1] == -signal.SIGABRT), run.text(1 - gone)
    if statuses[1 - gone] == processes.LOST:
        assert f'process {gone} of 2 on ' in run.text(1 - gone)
        assert ' is gone' in run.text(1 - gone)
    if gone == 1:
        last = Together(tmp_path / 'run', 1)
        assert last.wait() == [0], last.text()
        assert_same_run(tmp_path / 'run', alone)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            ('--config.seed=0', '--config.seed=1'),
            'error: process 1 has seed=1, not 0, as process 0 has; start all of them alike',
        ),
        (('--cpu_devices=2', '--cpu_devices=1'), r'error: the processes have \[2, 1\] devices'),
    ],
)
def test_what_is_wrong_in_one_is_said_once(tmp_path, options, message):
    run = Together(tmp_path / 'run', 2, options)
    assert run.wait(120) == [2, 2]
    assert len(re.findall(message, run.text())) == 1, run.text()
    assert 'error' not in run.text(1)


def test_data_missing_on_one_host_stops_all(tmp_path):
    for split, name, number in itertools.product(('train', 'test'), 'ab', range(8)):
        folder = tmp_path / 'photos' / split / name
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.new('RGB', (8, 8), (number, 0, 0)).save(folder / f'{number}.png')
    run = Together(
        tmp_path / 'run',
        2,
        '--config.dataset=folder',
        (f'--config.input.dir={tmp_path / "photos"}', '--config.input.dir=/nowhere'),
    )
    assert run.wait(120) == [2, 2]
    assert len(re.findall('error: .*/nowhere', run.text())) == 1, run.text()
    assert 'error' not in run.text(1)


def test_one_process_is_a_plain_call():
    assert processes.from_first(lambda: 3) == 3
    assert processes.together(lambda: 4) == 4
    assert processes.first()
    processes.require_same({'seed': 0})
    with processes.connected(None):
        pass


SLURM = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_PROCID': '1', 'SLURM_NTASKS': '2'}
MPI = {'OMPI_COMM_WORLD_RANK': '3', 'OMPI_COMM_WORLD_SIZE': '4'}
TORCH = {'RANK': '1', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'h', 'MASTER_PORT': '99'}
POD = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '0'}


@pytest.mark.parametrize(
    ('given', 'cluster', 'environ', 'expected'),
    [
        (Membership(), 'auto', {}, None),
        (Membership(), 'none', TORCH, None),
        (Membership('h:1', 0, 2), 'auto', {}, Membership('h:1', 0, 2)),
        (Membership('h:1', 0, 2), 'none', TORCH, Membership('h:1', 0, 2)),
        (Membership('[::1]:7', 0, 1), 'auto', {}, Membership('[::1]:7', 0, 1)),
        (Membership(), 'auto', TORCH, Membership('h:99', 1, 2)),
        (Membership(), 'auto', {**TORCH, 'MASTER_PORT': '5'}, Membership('h:5', 1, 2)),
        (Membership(), 'auto', {**TORCH, 'WORLD_SIZE': '1', 'RANK': '0'}, None),
        (Membership('x:2'), 'auto', TORCH, Membership('x:2', 1, 2)),
        (Membership(), 'auto', SLURM, Membership(None, 1, 2)),
        (Membership(), 'auto', {**SLURM, 'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, None),
        # The batch script itself, outside any step.
        (Membership(), 'auto', {name: SLURM[name] for name in SLURM if name != 'SLURM_STEP_NODELIST'}, None),
        (Membership(), 'auto', {**MPI, 'OMPI_MCA_orte_hnp_uri': '1.0;tcp://h:1'}, Membership(None, 3, 4)),
        (Membership('h:1'), 'auto', MPI, Membership('h:1', 3, 4)),
        (Membership(), 'auto', {'OMPI_COMM_WORLD_RANK': '0', 'OMPI_COMM_WORLD_SIZE': '1'}, None),
        (Membership(), 'auto', POD, Membership()),
        (Membership(), 'none', POD, None),
        (Membership(), 'jax', {}, Membership()),
    ],
)
def test_who_belongs_where(given, cluster, environ, expected):
    assert find_membership(given, cluster, environ) == expected


@pytest.mark.parametrize(
    ('given', 'cluster', 'environ', 'message'),
    [
        (Membership('h:1'), 'auto', {}, 'without --process_id and --process_count'),
        (Membership(None, 0, 2), 'auto', {}, 'without --coordinator'),
        (Membership('h:1'), 'none', TORCH, 'without --process_id and --process_count'),
        (Membership(), 'auto', MPI, r'process_id=3, process_count=4 without --coordinator'),
        (Membership('h', 0, 2), 'auto', {}, "coordinator='h' must be HOST:PORT"),
        (Membership('h:x', 0, 2), 'auto', {}, "coordinator='h:x' must be HOST:PORT"),
        (Membership('h:1', 2, 2), 'auto', {}, 'process_id=2 must be from 0 to 1'),
        (Membership('h:1', 0, 0), 'auto', {}, 'process_count=0 must be at least 1'),
        (Membership(), 'auto', {**TORCH, 'RANK': 'one'}, "RANK='one'"),
    ],
)
def test_what_cannot_be(given, cluster, environ, message):
    with pytest.raises(ConfigError, match=message):
        find_membership(given, cluster, environ)
