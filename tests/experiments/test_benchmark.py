"""The benchmarks: what they calculate by hand, what they say, and one tiny run of each."""

import importlib.util
import json
import math
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from PIL import Image

import input_pipeline
from efficientnet.errors import ConfigError, RunError
from efficientnet.loop import programs
from efficientnet.model import convolution
from efficientnet.model.convolution import grouped_conv
from efficientnet.model.costs import BlockCost
from efficientnet.model.scaling import model_spec
from efficientnet.parallel.grid import Grid
from efficientnet.parallel.layout import make_layout
from efficientnet.parallel.pipeline import timetable
from experiments.benchmark import __main__ as command
from experiments.benchmark import growth, host_input, memory, pipeline, resume, setup, sides, start, train_step
from experiments.benchmark.pipeline import Sample, StageTime, ideal_parts, stage_time, walk

TINY = ('--model=b0', '--width=0.25', '--depth=0.1', '--image_size=32', '--micro_batch=2', '--accumulation=2')


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


def parsed(*argv):
    args = vars(command.parse(list(argv)))
    del args['benchmark'], args['json']
    return args


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


def test_table():
    rows = [('name', 'a', 'long'), ('x', '1,000', ''), ('longest', '-', '2')]
    assert setup.table(rows) == 'name         a  long\nx        1,000\nlongest      -     2'


def test_memory_text():
    sizes = {'argument': 2 * setup.MIB, 'output': setup.MIB, 'alias': setup.MIB}
    layouts = [
        {'stages': stages, 'recompute': recompute, 'splits': splits, 'temp': temp * setup.MIB, **sizes}
        for stages, recompute, splits, temp in ((1, 'none', '', 8), (2, 'none', 'block2a', 12), (2, 'stage', 'head', 6))
    ]
    flags = parsed('memory', '--model=b0')
    lines = [line.split() for line in memory.show({'flags': flags, 'layouts': layouts}).splitlines()]
    assert ['1', 'stage', '8.0', '8.0'] in lines  # nothing before the last stage that could be computed again
    assert ['2', 'stages', '12.0', '6.0'] in lines
    assert ['2', '×', 'stage', '6.0', '2.0', '1.0', '1.0', 'head'] in lines


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


def test_growth_summary_text_and_picture(tmp_path):
    args = parsed('growth', '--rounds=3')
    axes = {'micro_batch': [4, 8], 'accumulation': [1, 4], 'image_size': [64], 'model': ['b0', 'b1']}
    work = {'common': 10.0} | {str(point): 10.0 for axis in axes.items() for point in growth.points(*axis)}
    work |= {'micro_batch 4': 5.0, 'accumulation 4': 40.0, 'model b1': 15.0}
    seconds = {name: value / 10 for name, value in work.items()} | {'micro_batch 4': 0.6, 'accumulation 4': 4.4}
    seconds |= {'loop': 1.25, 'optimizer 32.32': 0.044, 'optimizer 16.16': 0.22}
    methods = dict.fromkeys(work, 'onednn') | {'micro_batch 4': 'auto'}
    found = growth.summary(args, axes, seconds, work, methods)
    assert found['axes']['micro_batch'][0] == {'value': 4, 'seconds': 0.6, 'ideal': 0.5, 'conv_method': 'auto'}
    assert found['axes']['model'][1] == {'value': 'b1', 'seconds': 1.5, 'ideal': 1.5, 'conv_method': 'onednn'}
    assert found['accumulation'] == 4.4 / 4
    assert found['optimizer'] == pytest.approx({'32.32': 0.01, '16.16': 0.05})
    assert found['host'] == pytest.approx(0.2)
    text = growth.show(json.loads(json.dumps(found)))
    assert ['micro_batch', '4', '600.0', '500.0', '1.20', 'auto'] in [line.split() for line in text.splitlines()]
    assert 'a micro-batch of 4 in an update ÷ one of 1: 1.100 (target 1.03, missed)' in text
    assert 'optimizer and rounding in 32.32 of an update of 4: 44.0 ms, 1.0% (target 3%, met)' in text
    assert "the host's part of the training loop: 20.0% (target 1%, missed)" in text
    growth.draw(found, tmp_path / 'growth.png')
    with Image.open(tmp_path / 'growth.png') as picture:
        assert picture.size == (900, 600)
    with pytest.raises(ConfigError, match='cannot be written'):
        growth.draw(found, tmp_path / 'growth.nonsense')


def test_the_loop_is_as_slow_as_its_loader_even_after_a_rest(monkeypatch):
    """What the input pipeline makes ahead while other jobs have their turns would hide a loader that is too slow."""

    def loading(position):
        while True:
            time.sleep(0.02)
            yield {'image': np.zeros((1, 2, 2, 3), np.uint8)}

    def update(state, batch, flag):
        return state, {'loss': state}

    layout = make_layout(global_batch=1, micro_batch=1, replicas=1, splits=(), devices=1)
    config = types.SimpleNamespace(input=types.SimpleNamespace(prefetch=3))
    parts = types.SimpleNamespace(grid=Grid(layout), train_batches=loading, config=config)
    monkeypatch.setattr(programs, 'compile_update', lambda parts: update)
    monkeypatch.setattr(growth, 'LOOPED', 3)
    job = growth._loop(parts, np.zeros((1, 2), np.float32))
    job()
    time.sleep(0.3)
    (seconds,) = job()
    assert seconds > 0.8 * 3 * 0.02


def test_start_is_timed_by_what_is_printed():
    lines = {'data, checks': 5.0, 'folder, checkpoints': 5.5, 'programs, weights, first update': 9.0}
    seconds = start.phases(2.0, lines)
    assert list(seconds.values()) == [2.0, 3.0, 0.5, 3.5]
    text = start.show({'flags': {'config': 'x.py'}, 'seconds': seconds, 'total': sum(seconds.values())})
    assert ['imports', '2.0', '22%'] in [line.split() for line in text.splitlines()]
    assert 'target 10 s, met' in text


def test_start_waits_for_the_first_update_and_no_longer():
    said = "print('model b0', flush=True); time.sleep(0.2); print('compiling …'); print('epoch 1', flush=True)"
    began = time.perf_counter()
    found = start.time_lines([sys.executable, '-c', f'import time; {said}; time.sleep(60)'])
    assert time.perf_counter() - began < 30
    assert list(found) == list(start.PHASES)
    assert found['data, checks'] <= found['folder, checkpoints'] <= found['programs, weights, first update']
    with pytest.raises(RunError, match='ended before its first update: no such field'):
        start.time_lines([sys.executable, '-c', "import sys; print('model b0'); sys.exit('no such field')"])


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


def test_layers_are_those_of_the_network_once():
    layers = sides.distinct_layers(model_spec('b0', width=0.25, depth=0.3, group_size=16), 32)
    assert len(set(layers)) == len(layers)
    # block1a: 8 channels on 16 pixels a side do not expand; block2a: 8 -> 32 -> 8 with a stride of 2.
    assert layers[:3] == [sides.Layer(32, 3, 8, 3, 2), sides.Layer(16, 8, 8), sides.Layer(16, 8, 8, 3, 1, 1)]
    assert layers[-2:] == [sides.Layer(1, 80, 320, 1), sides.Layer(1, 320, 320)]
    assert sides.Layer(16, 8, 32, 1) in layers
    assert sides.Layer(16, 32, 32, 3, 2, 2) in layers
    assert sides.Layer(8, 32, 8, 1) in layers


def test_layers_of_both_sides_are_of_the_model_that_the_flags_describe():
    args = parsed('train_step', '--layers', '--width=0.5', '--depth=0.3', '--group_size=4', '--image_size=64')
    spec = model_spec('b0', width=0.5, depth=0.3, group_size=4)
    assert sides.measured_layers(args) == sides.distinct_layers(spec, 64)
    assert sides.measured_layers(args | {'layers': False}) == []


@pytest.mark.parametrize(
    ('layer', 'method', 'right'),
    [
        (sides.Layer(8, 3, 8, 3, 2), 'native', 'auto'),  # the stem's is the model's if that is oneDNN's alone
        (sides.Layer(8, 3, 8, 3, 2), 'onednn', 'onednn'),
        (sides.Layer(8, 8, 8, 3), 'native', 'native'),
        (sides.Layer(8, 8, 32, 1), 'native', 'auto'),
    ],
)
def test_a_layer_is_formulated_and_typed_as_in_the_model(layer, method, right, monkeypatch):
    seen = []

    def convolve(x, kernel, **options):
        seen.append((x.dtype, kernel.dtype, options['method']))
        return grouped_conv(x, kernel, **options | {'method': 'auto'})

    monkeypatch.setattr(convolution, 'grouped_conv', convolve)
    job = sides._our_layer(layer, parsed('train_step', '--policy=bf16.32', '--micro_batch=2'), method)
    assert seen == [('bfloat16', 'bfloat16', right)]
    job()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_pytorchs_layers_are_of_the_policys_numbers(dtype, monkeypatch):
    torch = pytest.importorskip('torch')
    convolve, seen, compute = torch.nn.Conv2d.forward, [], getattr(torch, dtype)

    def forward(module, x):
        y = convolve(module, x)
        seen.append((x.dtype, y.dtype, x.requires_grad))
        return y

    monkeypatch.setattr(torch.nn.Conv2d, 'forward', forward)
    args, rest = parsed('train_step', '--micro_batch=2'), (torch.device('cpu'), torch.channels_last, compute)
    for layer in (sides.Layer(8, 3, 8, 3, 2), sides.Layer(8, 8, 8), sides.Layer(8, 8, 8, 3, 1, 2)):
        sides._torch_layer(layer, args, *rest)()
    assert dict.fromkeys(seen) == dict.fromkeys([(compute, compute, False), (compute, compute, True)])


def test_bytes_if_every_layer_ran_by_itself():
    blocks = [BlockCost('stem', 10, 0, 0, kept=100, kept_fp32=7), BlockCost('head', 20, 0, 0, kept=50, kept_fp32=0)]
    args = parsed('train_step', '--micro_batch=3', '--accumulation=2', '--policy=bf16.32')
    kept = 6 * (150 * 2 + 7 * 4)
    assert sides.least_bytes(args, blocks) == 5 * kept + 7 * 30 * 4
    assert sides.least_bytes(args | {'mode': 'evaluate'}, blocks) == 2 * kept + 30 * 4


def test_layers_are_timed_by_the_call():
    class Side:
        def run(self, job):
            return (0.5, None)

    rows = train_step._measure_layers({'ours': Side()}, {'ours': {'layers': ['one']}}, 3)
    assert rows == [{'layer': 'one', 'ours': 0.5 / sides.LAYER_CALLS}]


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['train_step', '--against=tensorflow'], "--against='tensorflow' must be one of timm, timm-compile, native"),
        (['train_step', '--steps=0'], '--steps=0 must be at least 1'),
        (['train_step', '--batch=0'], 'error: --batch=0 must be at least 1'),
        (
            ['train_step', '--against=native', '--conv_method=native'],
            '--against=native is what --conv_method=native is with --device=cpu: give another --conv_method',
        ),
        (
            ['train_step', '--against=native', '--device=gpu'],
            '--against=native is what --conv_method=auto is with --device=gpu: give another --conv_method',
        ),
        (['train_step', '--micro_batch=0'], 'error: --micro_batch=0 must be at least 1'),
        (['train_step', '--recompute=stage'], "--recompute='stage' must be one of none, block"),
        (['pipeline', '--stages=1'], '--stages=1 must be at least 2; one stage is measured beside them'),
        (['growth', '--micro_batches=1,x'], "--micro_batches='1,x' must be whole numbers above 0"),
        (['growth', '--models='], "--models='' must be names"),
        (['growth', '--steps=0'], '--steps=0 must be at least 1'),
        (['growth', '--plot=/nowhere/a.png'], '--plot=/nowhere/a.png: there is no folder /nowhere'),
        (['start', '--rounds=0'], '--rounds=0 must be at least 1'),
        (['pipeline', '--rounds=0'], '--rounds=0 must be at least 1'),
        (['input', '--batch=0'], '--batch=0 must be at least 1'),
        (['input', '--resume_cost', '--records=0'], '--records=0 must be at least 1'),
        (['input', '--photos=/nowhere'], "--photos='/nowhere' holds no *.jpg"),
        (['memory', '--image_size=0'], '--image_size=0 must be at least 1'),
        (['memory', '--stages=1,x'], "--stages='1,x' must be whole numbers above 0 with commas between them"),
        (['memory', '--recompute=all'], "--recompute='all': 'all' is unknown; choose among none, block, stage"),
        (['memory', '--model=b9', '--stages=1'], 'b9'),
        (['memory', '--stages=99'], 'stages=99'),
    ],
)
def test_errors_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(argv)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith('error: ')
    assert err.count('\n') == 1
    assert message in err


@pytest.mark.skipif(importlib.util.find_spec('jax_plugins') is not None, reason='there may be a GPU')
def test_a_gpu_that_is_not_there_is_an_error(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(['train_step', '--against=none', '--device=gpu'])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines()[-1].startswith('error: --device=gpu: JAX finds no GPU here')


def test_help_lists_the_benchmarks(capsys):
    for argv in (['--help'], ['train_step', '--help'], ['pipeline', '--help'], ['memory', '--help']):
        with pytest.raises(SystemExit) as ended:
            command.main(argv)
        assert ended.value.code == 0
    out = capsys.readouterr().out
    for module in command.BENCHMARKS.values():
        assert module.__doc__.partition('\n')[0].split()[0] in out


def test_config():
    args = parsed('pipeline', '--policy=16.16', '--schedule=sequential')
    config = setup.make_config(args, stages=2, splits='block3a', recompute='none')
    assert (config.stages, config.splits, config.pipeline, config.recompute) == (2, 'block3a', 'sequential', 'none')
    assert config.precision.policy == '16.16'
    assert config.global_batch == args['micro_batch'] * args['accumulation']
    assert setup.make_config(args).pipeline == 'grouped'  # one stage has no schedule


def run(*argv):
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.benchmark', *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_input_summary_and_text():
    args = parsed('input', '--batch=10', '--batches=20', '--photos=DIR')
    seconds = {'ours': [2.0, 1.0, 4.0], 'tf_data': [3.0, 3.0, 1.0], 'torch': [5.0, 6.0, 7.0]}
    found = host_input.summary(args, seconds, 1.05, {'grain': 'pip install it'})
    assert found['images_per_second'] == {'ours': 100, 'tf_data': 200 / 3, 'torch': 200 / 6}
    assert found['ratio'] == pytest.approx({'tf_data': 1.5, 'torch': 3.0})
    assert found['range']['ours'] == [50, 200]
    assert found['bytes_per_image'] == 224 * 224 * 3
    text = host_input.show(json.loads(json.dumps(found)))
    assert '1.50  1.3 met' in text
    assert 'grain: not installed (pip install it)' in text
    assert '1.05 T (target 1.1, met)' in text
    assert '1.3 missed' in host_input.show(host_input.summary(args, seconds | {'tf_data': [2.0]}, 1.2, {}))


def test_photographs_are_as_large_as_imagenets(tmp_path):
    host_input.make_photos(tmp_path, count=8)
    sizes = []
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as image:
            sizes.append(image.size)
        assert 10_000 < path.stat().st_size < 150_000
    assert sizes == [(375, 500), *[(500, 375)] * 3] * 2


def test_boxes_of_random_resized_crop():
    draw = np.random.default_rng(0)
    boxes = np.array([host_input.resized_crop_box(500, 375, draw.uniform) for _ in range(500)])
    left, top, width, height = boxes.T
    assert (boxes >= 0).all()
    assert (left + width <= 500).all()
    assert (top + height <= 375).all()
    area, aspect = width * height / (500 * 375), width / height
    assert 0.045 < area.min() < 0.1
    assert 0.8 < area.max() <= 1
    assert 0.72 < aspect.min() < aspect.max() < 1.38


def test_a_step_hides_the_loading_that_takes_no_longer(monkeypatch):
    def loading(seconds):
        while True:
            time.sleep(seconds)
            yield np.zeros((1, 2, 2, 3), np.uint8)

    monkeypatch.setattr(host_input, 'AHEAD', 1)
    assert 1 <= host_input.overlap(loading(0.04), 0.05, 10) < 1.6  # one after the other: 1.8
    assert 2.5 < host_input.overlap(loading(0.2), 0.05, 10) < 6  # four steps, less what was made ahead


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


@pytest.mark.slow
def test_tiny_growth():
    sizes = ('--micro_batches=2', '--accumulations=1,2', '--image_sizes=32', '--models=b0')
    found = json.loads(run('growth', *TINY, *sizes, '--rounds=1', '--steps=1', '--json'))
    assert [len(rows) for rows in found['axes'].values()] == [1, 2, 1, 1]
    assert found['axes']['accumulation'][0]['ideal'] == found['seconds'] / 2  # two micro-batches in common
    assert min(found['optimizer'].values()) > 0


@pytest.mark.slow
def test_tiny_start():
    found = json.loads(
        run('start', '--rounds=1', '--json', '--', '--config.model.depth=0.1', '--config.model.width=0.25')
    )
    assert min(found['seconds'].values()) > 0
    assert found['total'] == pytest.approx(sum(found['seconds'].values()))


@pytest.mark.slow
def test_tiny_resume():
    found = json.loads(run('input', '--resume_cost', '--records=2050', '--image_size=8', '--batch=4', '--json'))
    assert (found['records'], found['files']) == (2050, 1024)
    assert set(found['seconds']) == set(resume.ROWS)
    assert min(found['seconds'].values()) > 0


def test_made_up_shards_are_read_as_they_were_meant(tmp_path):
    resume.make_shards(tmp_path / 'shards', 2050)
    source = input_pipeline.open_source('imagenet_tfrecords', 'train', str(tmp_path / 'shards'))
    assert source.num_examples == 2050
    (batch,) = input_pipeline.train_batches(source, image_size=2, global_batch=2050, num_batches=1, seed=0)
    assert batch['mask'].all()
    np.testing.assert_array_equal(batch['image'], np.full((2050, 2, 2, 3), 99))


@pytest.mark.slow
def test_tiny_input():
    found = json.loads(run('input', '--image_size=32', '--batch=4', '--batches=3', '--rounds=2', '--json'))
    assert found['ratio'].keys() | found['missing'].keys() == {'tf_data', 'torch'}
    assert found['ratio'].keys() < found['images_per_second'].keys()
    assert found['bytes_per_image'] == 3072
    assert all(low <= found['images_per_second'][name] <= high for name, (low, high) in found['range'].items())


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


@pytest.mark.slow
def test_tiny_memory():
    found = json.loads(run('memory', *TINY, '--stages=1,2', '--json'))
    names = [(layout['stages'], layout['recompute']) for layout in found['layouts']]
    assert names == [(1, 'none'), (1, 'block'), (2, 'none'), (2, 'block'), (2, 'stage')]
    for layout in found['layouts']:
        # Of one device: its images, all fp32 weights and momentum of its stage, and little else.
        images = math.ceil(2 * 2 / layout['stages']) * 32 * 32 * 3
        assert 0 < layout['alias'] <= layout['output'] <= layout['argument']
        assert abs(layout['argument'] - layout['output'] - images) < 1000
        assert layout['temp'] > 0
    assert np.isfinite(layout['temp'])
