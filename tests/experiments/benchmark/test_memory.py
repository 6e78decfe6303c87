"""The memory benchmark: what it says, and a tiny run."""

import json
import math

import numpy as np
import pytest

from experiments.benchmark import memory, setup
from tests.experiments.benchmark.command_line import TINY, parsed, run


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
