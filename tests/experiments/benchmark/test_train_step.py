"""An update beside others: what is calculated and said of it, its layers one by one, and a tiny run."""

import json
import time

import pytest

from efficientnet.model.costs import BlockCost
from experiments.benchmark import setup, sides, train_step
from tests.experiments.benchmark.command_line import parsed, run


def test_train_step_summary_and_text():
    args = parsed('train_step', '--micro_batch=4', '--steps=2', '--rounds=3')
    ours = {'parameters': 5, 'macs': 100, 'compile_seconds': 7.0, 'cached_compile_seconds': 1.0, 'bytes': 50e9}
    ours |= {'device': 'cpu'}
    peaks = {'peak_flops': 12_000.0, 'peak_bandwidth': 100e9}
    sides_ = {'ours': ours, 'timm': {'parameters': 5, 'compile_seconds': 2.0}}
    seconds = {'ours': [1.0, 2.0, 4.0], 'timm': [3.0, 2.0, 2.0]}
    found = train_step.summary(args, sides_, peaks, seconds, {'ours': setup.MIB, 'timm': 3 * setup.MIB})
    # Pair by pair 3, 1 and 1/2, whose median is not the ratio of the medians' order of rounds.
    assert (found['ratio'], found['ratio_range']) == (1.0, [0.5, 3.0])
    assert found['images_per_second'] == {'ours': 4.0, 'timm': 4.0}
    assert found['flops_per_second']['ours'] == 2 * 3 * 100 * 4.0
    assert found['flops_share']['ours'] == 0.2
    assert found['bytes_per_second'] == {'ours': 50e9, 'timm': 50e9}
    assert found['bandwidth_share'] == {'ours': 0.5, 'timm': 0.5}
    assert found['compile_seconds'] == {'ours': 7.0, 'timm': 2.0}
    layers = [{'layer': 'one', 'ours': 0.001, 'timm': 0.002}]
    text = train_step.show(json.loads(json.dumps(found | {'layers': layers})))
    assert 'ours ÷ timm: 1.000 (rounds 0.500 to 3.000)' in text
    assert ['ours', '4.0', '7.0', '1', '0', '20%', '50.0', '50%'] in [line.split() for line in text.splitlines()]
    assert 'ours compiles in 1.0 s from the cache' in text
    assert 'ours compiles anew in every process' in train_step.show(
        found | {'layers': [], 'cached_compile_seconds': None}
    )
    assert ['one', '1.000', '2.000', '2.00'] in [line.split() for line in text.splitlines()]
    evaluated = train_step.summary(args | {'mode': 'evaluate'}, {'ours': ours}, peaks, {'ours': [1.0]}, {'ours': 1})
    assert evaluated['ratio'] is None
    assert evaluated['flops_per_second'] == {'ours': 2 * 100 * 8.0}


def test_the_peaks_have_a_process_of_their_own_and_sides_their_formulations(monkeypatch):
    made = []

    class Process:
        def __init__(self, build, args, *given):
            made.append((build, *given[:1]))

        def answer(self):
            return {'peak_flops': 2.0, 'peak_bandwidth': 3.0, 'cached': False, 'jobs': []}

        def stop(self):
            made.append('stopped')

    monkeypatch.setattr(sides, 'Worker', Process)
    args = parsed('train_step', '--conv_method=loop')
    assert sides.measure_peaks(args) == {'peak_flops': 2.0, 'peak_bandwidth': 3.0}
    for name in ('ours', 'native'):
        sides.start(name, args)
    assert made == [(sides.build_peaks,), 'stopped', (sides.build_ours, 'loop'), (sides.build_ours, 'native')]


def test_several_calls_are_waited_for_at_once():
    called = []
    seconds = sides._best_seconds(lambda x: called.append(x) or time.sleep(0.001), 5, 'x')
    assert len(called) == 11 * 5
    assert 0.001 <= seconds < 0.005


def test_bytes_if_every_layer_ran_by_itself():
    blocks = [BlockCost('stem', 10, 0, 0, kept=100, kept_fp32=7), BlockCost('head', 20, 0, 0, kept=50, kept_fp32=0)]
    args = parsed('train_step', '--micro_batch=3', '--accumulation=2', '--policy=bf16.32')
    kept = 6 * (150 * 2 + 7 * 4)
    assert sides.least_bytes(args, blocks) == 5 * kept + 7 * 30 * 4
    assert sides.least_bytes(args | {'mode': 'evaluate'}, blocks) == 2 * kept + 30 * 4


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['train', 'evaluate'])
def test_tiny_train_step(mode):
    flags = ('--width=0.25', '--depth=0.1', '--image_size=32', '--batch=2', '--rounds=2', '--steps=1')
    found = json.loads(run('train_step', *flags, f'--mode={mode}', '--against=native', '--json'))
    low, high = found['ratio_range']
    assert 0 < low <= found['ratio'] <= high
    assert set(found['images_per_second']) == set(found['peak_bytes']) == {'ours', 'native'}
    assert all(value > 0 for value in found['peak_bytes'].values())
    assert 0 < found['cached_compile_seconds'] < found['compile_seconds']['ours']
