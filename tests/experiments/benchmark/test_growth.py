"""Time against work: what is calculated, said and drawn, and a tiny run."""

import json
import time
import types

import numpy as np
import pytest
from PIL import Image

from efficientnet.errors import ConfigError
from efficientnet.loop import programs
from efficientnet.parallel.grid import Grid
from efficientnet.parallel.layout import make_layout
from efficientnet.parallel.update import METRICS
from experiments.benchmark import growth
from tests.experiments.benchmark.command_line import TINY, parsed, run


def test_growth_summary_text_and_picture(tmp_path):
    args = parsed('growth', '--rounds=3')
    axes = {'micro_batch': [4, 8], 'accumulation': [1, 4], 'image_size': [64], 'model': ['b0', 'b1']}
    work = {'common': 10.0} | {str(point): 10.0 for axis in axes.items() for point in growth.points(*axis)}
    work |= {'micro_batch 4': 5.0, 'accumulation 4': 40.0, 'model b1': 15.0}
    seconds = {name: value / 10 for name, value in work.items()} | {'micro_batch 4': 0.6, 'accumulation 4': 4.4}
    seconds |= {'loop': 1.25, 'optimizer 32.32': 0.044, 'optimizer 16.16': 0.22}
    methods = dict.fromkeys(work, 'onednn') | {'micro_batch 4': 'auto'}
    found = growth.summary(args, axes, seconds, 0.02, work, methods)
    assert found['axes']['micro_batch'][0] == {'value': 4, 'seconds': 0.6, 'ideal': 0.5, 'conv_method': 'auto'}
    assert found['axes']['model'][1] == {'value': 'b1', 'seconds': 1.5, 'ideal': 1.5, 'conv_method': 'onednn'}
    assert found['accumulation'] == 4.4 / 4
    assert found['optimizer'] == pytest.approx({'32.32': 0.01, '16.16': 0.05})
    assert found['host'] == 0.02
    assert found['loop'] == 1.25
    text = growth.show(json.loads(json.dumps(found)))
    assert ['micro_batch', '4', '600.0', '500.0', '1.20', 'auto'] in [line.split() for line in text.splitlines()]
    assert 'time a micro-batch, 4 in an update ÷ 1: 1.100 (target 1.03, missed)' in text
    assert 'once an update in 32.32, of one with 4 micro-batches: 44.0 ms, 1.0% (target 3%, met)' in text
    assert 'time between updates in the training loop: 2.00% (target 1%, missed)' in text
    assert 'an update in the training loop ÷ one on a batch that is there: 1.250' in text
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
        return state, np.zeros(len(METRICS), np.float32)

    layout = make_layout(global_batch=1, micro_batch=1, replicas=1, splits=(), devices=1)
    config = types.SimpleNamespace(input=types.SimpleNamespace(prefetch=3))
    parts = types.SimpleNamespace(grid=Grid(layout), train_batches=loading, config=config)
    monkeypatch.setattr(programs, 'compile_update', lambda parts: update)
    monkeypatch.setattr(growth, 'LOOPED', 3)
    job = growth._loop(parts, np.zeros((1, 2), np.float32))
    job()
    time.sleep(0.3)
    seconds, between = job()
    assert 0.8 * 3 * 0.02 < between <= seconds


@pytest.mark.slow
def test_tiny_growth():
    sizes = ('--micro_batches=2', '--accumulations=1,2', '--image_sizes=32', '--models=b0')
    found = json.loads(run('growth', *TINY, *sizes, '--rounds=1', '--steps=1', '--json'))
    assert [len(rows) for rows in found['axes'].values()] == [1, 2, 1, 1]
    assert found['axes']['accumulation'][0]['ideal'] == found['seconds'] / 2  # two micro-batches in common
    assert min(found['optimizer'].values()) > 0
