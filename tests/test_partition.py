import pathlib
import subprocess
import sys

import pytest

from configs import base
from efficientnet.errors import ConfigError
from efficientnet.model.costs import block_costs
from efficientnet.model.scaling import model_spec
from efficientnet.parallel.stages import stage_table
from efficientnet.partition import format_table, report

ROOT = pathlib.Path(__file__).parent.parent
B4 = block_costs(model_spec('b4'), 380)


def test_the_table_is_aligned_and_has_units():
    lines = format_table(stage_table(B4, ('block1a', 'head'), micro_batch=3)).splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[1].split()[:3] == ['0', 'stem', '1']
    assert lines[2].split()[:5] == ['1', 'block1a', '…', 'block7b', '32']
    assert '6.02 G' in lines[2]
    assert '9.92 MiB' in lines[1]  # 190 × 190 × 48 numbers of 3 images, sent on
    assert [line.split()[-1] for line in lines[1:-1]] == ['2%', '100%', '1%']
    assert lines[-1].startswith('mean load 34%;')
    timed = format_table(stage_table(B4[:2], ('block1a',), seconds={'stem': 0.0015, 'block1a': 0.002}), timed=True)
    assert '6.00 ms' in timed.splitlines()[1]


def b4_config(**fields):
    config = base.get_config()
    config.model.variant, config.image_size, config.micro_batch = 'b4', 380, 3
    config.update(fields)
    return config


def test_the_report_of_a_b4_has_the_published_split_beside():
    text = report(b4_config(stages=2))
    assert text.startswith('b4, group size 16, norm group, 380 pixels, 1,000 classes; micro-batch 3, 16.16, lars')
    assert "splits='block3b' (balanced)" in text
    assert "splits='block4a' (published" in text
    once = report(b4_config(splits="('block4a',)"))
    assert "splits='block4a' (as given)" in once
    assert 'published' not in once
    assert "splits='' (balanced)" in report(b4_config(stages=1))
    assert 'published' not in report(b4_config(model={'variant': 'b0'}))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (
            {'stages': 3, 'splits': 'block4a'},
            r"^stages=3 and splits='block4a' disagree: those make 2 stages; give one$",
        ),
        ({'splits': 'block9a'}, r"'block9a' is no block"),
        ({'optimizer': {'name': 'adam'}}, r"^optimizer.name='adam' is unknown; choose one of lars, sgd, rmsprop$"),
        ({'precision': {'policy': '8.8'}}, r"^precision.policy='8.8'"),
    ],
)
def test_reports_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        report(b4_config(**fields))


def run(*arguments, module=('-m', 'efficientnet.partition')):
    command = [sys.executable, *module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_line():
    found = run('--config=configs/cifar10.py', '--config.stages=2', '--classes=10')
    assert (found.returncode, found.stderr) == (0, '')
    assert '10 classes' in found.stdout
    assert len(found.stdout.splitlines()) == 7
    wrong = run('--config=configs/base.py', '--config.splits=block9z')
    assert (wrong.returncode, wrong.stdout) == (2, '')
    assert wrong.stderr.startswith("error: splits='block9z'")
    assert len(wrong.stderr.splitlines()) == 1
    for arguments, words in (((), '--config is missing'), (('--config=configs/none.py',), 'configs/none.py')):
        wrong = run(*arguments)
        assert wrong.returncode == 2
        assert words in wrong.stderr
    assert '--classes' in run('--help').stdout


def test_costs_and_partition_need_no_array_library():
    found = run('-c', 'import efficientnet.partition, sys; print("jax" in sys.modules)', module=())
    assert found.stdout == 'False\n'
