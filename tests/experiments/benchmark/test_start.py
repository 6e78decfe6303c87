"""From the command to the first update: how that is timed, and a tiny run."""

import json
import sys
import time

import pytest

from efficientnet.errors import RunError
from experiments.benchmark import start
from tests.experiments.benchmark.command_line import run


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


@pytest.mark.slow
def test_tiny_start():
    found = json.loads(
        run('start', '--rounds=1', '--json', '--', '--config.model.depth=0.1', '--config.model.width=0.25')
    )
    assert min(found['seconds'].values()) > 0
    assert found['total'] == pytest.approx(sum(found['seconds'].values()))
