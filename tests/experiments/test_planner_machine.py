"""The planner on the machine at hand: what calibration measures and writes, what is planned and predicted from it."""

import dataclasses
import json

import pytest

from efficientnet.errors import ConfigError
from efficientnet.model.costs import block_costs
from efficientnet.model.scaling import model_spec
from experiments.planner import __main__ as command
from experiments.planner import measure, report, validation
from experiments.planner.calibration import load_machine, plan_on
from experiments.planner.timing import BlockTime


def measured(count=8):
    """What a calibration would have found on a machine where every block takes a millisecond a pass."""
    names = [block.name for block in block_costs(model_spec('b0', group_size=16), 96)]
    seconds = {f'forward_{n}': 1e-3 * count for n in range(len(names) - 1)}
    seconds |= {f'both_{n}': 3e-3 * count for n in range(len(names))}
    seconds |= {'multiply': 0.1, 'copy': 0.02, 'small': 0.05, 'large': 0.15, 'one_stage': 0.5}
    return measure.summary(seconds, tuple(names)), len(names)


def pipelined(found):
    """What `benchmark pipeline --json` would have found on the machine of a calibration."""
    flags = found['flags'] | {'stages': 2, 'schedule': 'grouped', 'width': 0.0, 'depth': 0.0}
    times = {'one_stage': 0.5, 'pipeline': 9.0}
    return {'flags': flags, 'machine': found['machine'], 'splits': 'block4a', 'seconds': times}


def test_this_machine(tmp_path):
    found, blocks = measured()
    path = tmp_path / 'machine.json'
    path.write_text(json.dumps(found))
    machine = load_machine(path)
    assert machine.system.device.flops[4] == 2 * measure.SIDE**3 / 0.1
    assert machine.system.links[0].latency == 0.05 / measure.TIMES
    assert machine.blocks.times['head'] == pytest.approx(BlockTime(1e-3, 3e-3))
    same = plan_on('this_machine', machine.workload, path)
    assert same.update_seconds == pytest.approx(0.5)
    # Blocks of a millisecond each, so that balanced stages differ by what recomputation costs.
    two = plan_on('this_machine', dataclasses.replace(machine.workload, stages=2, splits='auto'), path)
    assert len(two.stages[0].blocks) == pytest.approx(blocks * 3 / 7, abs=1)
    # Twice the images take less than twice as long, by the weights that are read once whatever their number.
    larger = dataclasses.replace(machine.workload, micro_batch=8, global_batch=64)
    double = plan_on('this_machine', larger, path)
    expected = 0.0
    for block in block_costs(machine.workload.spec(), 96):
        seconds = [
            max(
                2 * n * block.macs / machine.system.device.flops[4],
                (2 * n * block.kept_bytes(4) + 4 * block.parameters) / machine.system.device.bandwidth,
            )
            for n in (4, 8)
        ]
        expected += seconds[1] / seconds[0] / blocks
    assert double.seconds['compute'] / same.seconds['compute'] == pytest.approx(expected)
    assert expected < 1.99
    # A micro-batch that is left open is planned with the same times.
    chosen = plan_on('this_machine', dataclasses.replace(larger, micro_batch=0), path)
    again = dataclasses.replace(larger, micro_batch=chosen.workload.micro_batch)
    assert chosen.update_seconds == plan_on('this_machine', again, path).update_seconds > 0
    # Another model has no measured blocks; then the same update calibrates the counted ones.
    other = plan_on('this_machine', dataclasses.replace(machine.workload, model='b1'), path)
    assert other.update_seconds > same.update_seconds
    assert other.efficiency != same.efficiency


@pytest.mark.parametrize('text', ['', '{}', '[1]', '{"flags": 3}'])
def test_a_damaged_machine_file_is_one_line(text, tmp_path):
    path = tmp_path / 'machine.json'
    path.write_text(text)
    with pytest.raises(ConfigError, match='is not what --calibrate writes'):
        load_machine(path)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('flops', 0),
        ('flops', -1.0),
        ('bandwidth', float('nan')),
        ('link_bandwidth', '1'),
        ('latency', None),
        ('memory', 0),
        ('devices', 2.5),
        ('devices', 10**9),
        ('flops', True),
        ('latency', 1e308),
        ('machine', None),
        ('flags.image_size', 1.5),
        ('devices', 0),
        ('update_seconds', float('inf')),
        ('flags.micro_batch', 0),
        ('flags.accumulation', 'x'),
        ('flags.policy', '8.8'),
        ('blocks', []),
        ('blocks.head', None),
        ('blocks.head', [3e-3, 1e-3]),
        ('blocks.head', [0, 0]),
        ('blocks.block9z', [1e-3, 3e-3]),
    ],
)
def test_what_no_machine_can_be_is_one_line(field, value, tmp_path, capsys):
    found, _ = measured()
    *where, name = field.split('.')
    (found[where[0]] if where else found)[name] = value
    path = tmp_path / 'machine.json'
    path.write_text(json.dumps(found))
    with pytest.raises(SystemExit):
        command.main(['--system=this_machine', f'--machine={path}'])
    said = capsys.readouterr().err
    assert f'{path} is not what --calibrate writes' in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('machine', None),
        ('flags', None),
        ('flags.width', 0.5),
        ('flags.stages', 3),
        ('flags.model', 'b9'),
        ('splits', None),
        ('splits', ''),
        ('splits', 'block9z'),
        ('flags.micro_batch', 2.5),
        ('flags.accumulation', 10**12),
        ('seconds.pipeline', -1),
        ('seconds.pipeline', float('nan')),
        ('seconds.one_stage', 'x'),
    ],
)
def test_what_no_pipeline_result_can_be_is_one_line(field, value, tmp_path):
    found, _ = measured()
    (tmp_path / 'machine.json').write_text(json.dumps(found))
    result = pipelined(found)
    *where, name = field.split('.')
    (result[where[0]] if where else result)[name] = value
    path = tmp_path / 'pipeline_4x8.json'
    path.write_text(json.dumps(result))
    with pytest.raises(ConfigError, match='is not what python -m experiments') as error:
        validation.machine_rows(tmp_path / 'machine.json', tmp_path)
    assert str(path) in str(error.value)


def test_results_of_two_machines_are_not_laid_side_by_side(tmp_path):
    found, _ = measured()
    (tmp_path / 'machine.json').write_text(json.dumps(found))
    (tmp_path / 'pipeline_4x8.json').write_text(json.dumps(pipelined(found) | {'machine': 'an abacus'}))
    assert validation.machine_rows(tmp_path / 'machine.json', tmp_path) == []


def test_predictions_on_this_machine(tmp_path):
    found, _ = measured()
    (tmp_path / 'machine.json').write_text(json.dumps(found))
    result = pipelined(found)
    (tmp_path / 'pipeline_4x8.json').write_text(json.dumps(result))
    rows = validation.machine_rows(tmp_path / 'machine.json', tmp_path)
    assert [row.found for row in rows] == [9000, 9000]  # one stage is what the calibration is of
    assert not rows[0].hit
    result['flags']['image_size'] = 128
    (tmp_path / 'pipeline_larger.json').write_text(json.dumps(result))
    more = validation.machine_rows(tmp_path / 'machine.json', tmp_path)
    assert [row.what.endswith('counted') for row in more] == [False] + [True] * 3  # nobody timed larger blocks
    assert more[2].predicted == pytest.approx(500 * (128 / 96) ** 2, rel=0.15)
    text = validation.show(rows, validation.claims())
    assert 'MISSED' in text
    assert text.endswith('6 of 8 predictions hit')
    with pytest.raises(ConfigError, match=r'none\.json is missing'):
        validation.machine_rows(tmp_path / 'none.json', tmp_path)
    assert 'none of a machine at hand' in validation.show(rows[:0], validation.claims())


@pytest.mark.slow
def test_calibrate(tmp_path, monkeypatch):
    tiny = {'width': 0.25, 'depth': 0.1, 'image_size': 32, 'micro_batch': 2, 'accumulation': 2}
    monkeypatch.setattr(measure, 'FLAGS', measure.FLAGS | tiny)
    monkeypatch.setattr(measure, 'ROUNDS', 2)
    path = tmp_path / 'new' / 'machine.json'
    found = measure.calibrate(path)
    assert json.loads(path.read_text()) == found
    assert list(found['blocks']) == ['stem', *(f'block{n}a' for n in range(1, 8)), 'head']
    # Single blocks take microseconds here, too few to compare.
    assert all(seconds > 0 for times in found['blocks'].values() for seconds in times)
    forward, both = map(sum, zip(*found['blocks'].values(), strict=True))
    assert forward < both
    # One core does no more than some hundred GFLOP/s, and moves some GB/s.
    assert 1e9 < found['flops'] < 1e12
    assert 1e8 < found['bandwidth'] < 1e12
    assert 1e-6 < found['latency'] < 0.1
    assert found['link_bandwidth'] > 1e6


def test_what_calibration_found_as_text():
    found, _ = measured()
    lines = report.measured(found).splitlines()
    assert f'{found["flops"] / 1e9:,.0f} GFLOP/s a core' in lines[0]
    assert [line.split()[0] for line in lines[-len(found['blocks']) :]] == list(found['blocks'])


def test_16_bits_are_computed_in_fp32(tmp_path):
    path = tmp_path / 'machine.json'
    path.write_text(json.dumps(measured()[0]))
    # Of another model no blocks are timed, so that both are planned from counts.
    wide, narrow = (
        plan_on('this_machine', dataclasses.replace(load_machine(path).workload, model='b1', policy=policy), path)
        for policy in ('32.32', '16.16')
    )
    assert narrow.seconds['compute'] == pytest.approx(wide.seconds['compute'])
    assert narrow.memory['weights'] < wide.memory['weights']
