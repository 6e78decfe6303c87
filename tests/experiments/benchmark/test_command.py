"""What all benchmarks have in common: flags, errors, help, tables, configs."""

import importlib.util

import pytest

from experiments.benchmark import __main__ as command
from experiments.benchmark import growth, host_input, memory, pipeline, setup, start, train_step
from tests.experiments.benchmark.command_line import parsed


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['train_step', '--against=tensorflow'], "--against='tensorflow' must be one of timm, timm-compile, native"),
        (['train_step', '--steps=0'], '--steps=0 must be at least 1'),
        (['train_step', '--batch=0'], 'error: --batch=0 must be at least 1'),
        (['train_step', '--mode=evaluate', '--accumulation=2'], '--accumulation=2 means nothing to --mode=evaluate'),
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
    modules = {
        'train_step': train_step,
        'growth': growth,
        'pipeline': pipeline,
        'memory': memory,
        'input': host_input,
        'start': start,
    }
    with pytest.raises(SystemExit) as ended:
        command.main(['--help'])
    assert ended.value.code == 0
    said = ' '.join(capsys.readouterr().out.split())
    for name, module in modules.items():
        assert f'{name} {module.__doc__.partition(chr(10))[0]}' in said
        with pytest.raises(SystemExit) as ended:
            command.main([name, '--help'])
        assert ended.value.code == 0
        assert module.__doc__.strip() in capsys.readouterr().out


def test_table():
    rows = [('name', 'a', 'long'), ('x', '1,000', ''), ('longest', '-', '2')]
    assert setup.table(rows) == 'name         a  long\nx        1,000\nlongest      -     2'


def test_config():
    args = parsed('pipeline', '--policy=16.16', '--schedule=sequential')
    config = setup.make_config(args, stages=2, splits='block3a', recompute='none')
    assert (config.stages, config.splits, config.pipeline, config.recompute) == (2, 'block3a', 'sequential', 'none')
    assert config.precision.policy == '16.16'
    assert config.global_batch == args['micro_batch'] * args['accumulation']
    assert setup.make_config(args).pipeline == 'grouped'  # one stage has no schedule
