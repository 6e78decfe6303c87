import json

import pytest

from efficientnet.weights.trained import read_run, write_run
from tests.tiny import tiny_trained


def test_the_formulation_is_that_of_the_machine_it_is_used_on():
    trained = tiny_trained()
    trained.config.model.conv_method = 'onednn'
    assert trained.model().conv_method == 'auto'


def test_a_run_that_is_written_does_not_depend_on_the_devices_there_are(tmp_path):
    write_run(tmp_path / 'run', tiny_trained(replicas=0))
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['replicas'] == 1


@pytest.mark.parametrize('kind', ['raw', 'auto'])
def test_what_was_found_is_said(tmp_path, kind):
    write_run(tmp_path / 'run', tiny_trained())
    found = read_run(tmp_path / 'run', kind)
    assert (found.kind, found.step, found.evaluation) == ('raw', 7, {'test_accuracy': 0.5})
