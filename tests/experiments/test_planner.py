"""The planner: its arithmetic restated, what others published, what cannot be planned, and what it prints and draws."""

import dataclasses
import json
import math
import pathlib
import re

import pytest
from matplotlib.figure import Figure

from efficientnet.errors import ConfigError
from efficientnet.model.costs import block_costs
from efficientnet.model.scaling import model_spec
from efficientnet.parallel.layout import Layout
from efficientnet.parallel.pipeline import NONE, timetable
from experiments.planner import __main__ as command
from experiments.planner import calibration, charts, memory, report, sweep, timing, validation
from experiments.planner.calibration import REFERENCE, family_efficiency, plan_on, solve
from experiments.planner.plan import make_plan
from experiments.planner.systems import SYSTEMS, TRAINER, Device, Link, System, system_of
from experiments.planner.workload import Workload

KEYS = {
    'images_per_second',
    'update_seconds',
    'hours',
    'epochs',
    'stages',
    'splits',
    'replicas',
    'accumulation',
    'fits',
    'memory_bytes',
    'limited_by',
}
# A round machine: 1 TFLOP/s, 1 TB/s of memory, links of 1 GB/s and 1 ms.
TOY = System('toy', 'Toy', 'toy', Device({2: 1e12, 4: 5e11}, 1e12, 1e12, 1.0), 8, (Link(8, 1e9, 1e-3),), 1, 1e9)
SMALL = Workload(model='b0', image_size=64, classes=10, global_batch=64, micro_batch=2, stages=2, splits='block4a')


def planned(*argv, capsys):
    command.main(list(argv))
    return capsys.readouterr().out


def test_an_update_restated():
    efficiency = 0.5
    plan = make_plan(TOY, SMALL, efficiency)
    costs = block_costs(model_spec('b0', group_size=16, classes=10), 64)
    names = [block.name for block in costs]
    cut = names.index('block4a')
    # Seconds of a forward pass of two images: arithmetic or memory, whichever is slower.
    seconds = [
        max(2 * 2 * block.macs / 1e12, (2 * 2 * 2 * block.kept + 2 * block.parameters) / 1e12) / efficiency
        for block in costs
    ]
    first, last = sum(seconds[:cut]), sum(seconds[cut:])
    count = 64 // 2 // 4  # four replicas of two stages
    # Tick 0: forward. Ticks 1 … count + 1: the last stage works on one micro-batch after the other, while the first
    # goes forward (not in the last two of all ticks) and, from tick 2 on, backward, recomputation included.
    walked = first + sum(
        max(first * (tick < count) + 3 * first * (tick >= 2), 3 * last * (tick <= count))
        for tick in range(1, count + 2)
    )
    assert plan.layout == Layout(4, 2, count, ('block4a',))
    assert plan.seconds['compute'] + plan.seconds['bubble'] == pytest.approx(walked)
    assert plan.seconds['compute'] == pytest.approx(count * max(4 * first, 3 * last))
    boundary = 2 * costs[cut].boundary * 2
    assert plan.seconds['hand-over'] == pytest.approx((count + 2) * (1e-3 + boundary / 1e9))
    most = sum(block.parameters for block in costs[cut:])
    assert plan.seconds['accumulation'] == pytest.approx((count + 2) * most * 12 / 1e12)
    assert plan.seconds['reduction'] == pytest.approx(2 * 3 * (1e-3 + most * 4 / 4 / 1e9))
    # fp32 gradients read; fp16 weights and momentum, and an fp32 average, read and written.
    assert plan.seconds['optimizer'] == pytest.approx(most * (4 + 2 * (2 + 2 + 4)) / 1e12)
    assert plan.input_seconds == pytest.approx(64 * 64 * 64 * 3 / 1e9)
    assert plan.seconds['input'] == 0
    assert plan.images_per_second == pytest.approx(64 / sum(plan.seconds.values()))
    assert plan.hours == pytest.approx(math.floor(1_281_167 * 350 / 64) * plan.update_seconds / 3600)


def test_memory_restated():
    plan = make_plan(TOY, dataclasses.replace(SMALL, policy='16.32', optimizer='rmsprop'), 1.0)
    costs = block_costs(model_spec('b0', group_size=16, classes=10), 64)
    cut = [block.name for block in costs].index('block4a')
    parameters = max(sum(block.parameters for block in part) for part in (costs[:cut], costs[cut:]))
    kept = max(sum(2 * 2 * block.kept for block in part) for part in (costs[:cut], costs[cut:]))
    rows, image = 16, 64 * 64 * 3
    assert plan.memory == {
        'weights': parameters * (4 + 2),
        'optimizer state': parameters * 2 * 4,
        'gradients': parameters * 3 * 4,
        'averages': parameters * 4,
        'stash': 0,  # the first of two stages has its input, the images, anyway
        'activations': kept,
        'images': image * (4 * rows / 2 + rows),
    }


def test_a_program_a_stage_needs_what_its_fullest_stage_needs():
    table = plan_on('bow_pod16', REFERENCE).stages
    plan = plan_on('bow_pod16', REFERENCE)
    assert sum(plan.memory.values()) == pytest.approx(table[0].total + 4 * 3 * 380 * 380 * 3)
    assert table[1].total < table[0].total


def test_norm_swish_and_gate_apart_keep_a_tensor_more_each():
    spec = model_spec('b0', group_size=16)
    together, apart = (timing.count_blocks(spec, 224, SYSTEMS[name].software) for name in ('dgx_a100_8', 'ipu_pod16'))
    extra = {a.name: a.kept - t.kept for a, t in zip(apart, together, strict=True)}
    assert extra['stem'] == 112 * 112 * 32
    assert extra['block1a'] == 2 * 112 * 112 * 32  # does not expand
    assert extra['block2a'] == (112 * 112 + 2 * 56 * 56) * 16 * 4
    assert extra['head'] == 7 * 7 * 1280


def test_depthwise_leaves_most_of_a_unit_idle():
    spec = model_spec('b0', group_size=1)
    idle = timing.idle_macs(spec, 224, 16)
    assert idle['block2b'] == 15 * 9 * (24 * 6) * 56 * 56
    assert idle['block3a'] == 15 * 25 * (24 * 6) * 28 * 28  # at the smaller side of its stride
    assert idle['stem'] == idle['head'] == 0
    assert not any(timing.idle_macs(spec, 224, 1).values())
    assert not any(timing.idle_macs(model_spec('b0', group_size=16), 224, 16).values())


def test_input_counts_only_where_the_device_waits_for_it():
    slow = dataclasses.replace(TOY, host_bandwidth=1e5)
    plan = make_plan(slow, SMALL, 1.0)
    assert plan.update_seconds == pytest.approx(plan.input_seconds) == 64 * 64 * 64 * 3 / 1e5
    assert plan.limited_by == 'input'
    wide = make_plan(slow, dataclasses.replace(SMALL, images='fp32'), 1.0)
    assert wide.update_seconds == pytest.approx(4 * plan.update_seconds)


@pytest.mark.parametrize(
    ('links', 'replicas', 'stages', 'seconds'),
    [
        ((Link(8, 1e9, 0.5),), 1, 2, 0),
        ((Link(8, 1e9, 0.5),), 4, 2, 2 * 3 * (0.5 + 0.25)),
        # Four within a machine of eight, then two machines with a quarter each.
        ((Link(8, 1e9, 0.5), Link(16, 1e8, 2)), 8, 2, 2 * 3 * (0.5 + 0.25) + 2 * (2 + 0.125e9 / 1e8)),
        ((Link(8, 1e9, 0.5), Link(16, 1e8, 2)), 2, 8, 2 * (2 + 0.5e9 / 1e8)),  # a machine holds one replica
    ],
)
def test_reduction(links, replicas, stages, seconds):
    layout = Layout(replicas, 1, 1, tuple('x' * (stages - 1)))
    assert timing.reduction(links, layout, 1e9) == pytest.approx(seconds)


@pytest.mark.parametrize(('recompute', 'passes'), [('none', (3, 3)), ('stage', (4, 3)), ('block', (5, 4))])
def test_passes(recompute, passes):
    plan = make_plan(TOY, dataclasses.replace(SMALL, recompute=recompute), 1.0)
    blocks = timing.count_blocks(SMALL.spec(), 64, TRAINER)
    times = timing.count_times(blocks, dict.fromkeys((block.name for block in blocks), 0), TOY.device, 2, 2)
    for work, stage, number in zip(
        timing.stage_works(plan.layout, plan.stages, times, 1.0), plan.stages, passes, strict=True
    ):
        assert sum(work) == pytest.approx(number * sum(times[name].forward for name in stage.blocks))
        assert sum(work) == pytest.approx(stage.work)


def test_calibration_is_met_exactly():
    for point in calibration.POINTS.values():
        assert plan_on(point.system, point.workload).images_per_second == pytest.approx(point.images_per_second)
    assert all(0 < family_efficiency(family) < 1 for family in calibration.POINTS)


def test_no_time_left_for_computing():
    with pytest.raises(ConfigError, match='leaves no time for computing'):
        solve(SYSTEMS['bow_pod16'], REFERENCE, 1e-3)


def test_published_throughputs():
    rows = {(row.what, row.found): row for row in validation.published_rows()}
    for pod, found in (('Bow Pod64', (34_140, 34_943)), ('Bow Pod256', (117_641, 122_665))):
        for value in found:
            assert 0.9 < rows[f'{pod}, B4 G16', value].predicted / value < 1.1
    assert plan_on('ipu_pod256', REFERENCE).hours < 2


def test_what_fits_is_what_the_reference_found():
    claims = validation.claims()
    assert len(claims) == 6
    assert all(claim.hit for claim in claims)
    assert plan_on('ipu_pod16', Workload()).layout.splits == ('block4a',)
    assert plan_on('ipu_pod16', Workload(splits='balanced')).layout.splits != ('block4a',)


def test_the_references_layouts():
    for devices, replicas, accumulation in ((16, 8, 256), (32, 16, 128), (64, 32, 64), (128, 64, 32), (256, 128, 16)):
        layout = plan_on(f'ipu_pod{devices}', Workload()).layout
        assert (layout.stages, layout.replicas, layout.accumulation) == (2, replicas, accumulation)


def test_what_fits_nowhere_is_said():
    plan = make_plan(SYSTEMS['ipu_pod16'], Workload(model='b7', group_size=16, micro_batch=48), 0.1)
    assert not plan.fits
    assert plan.limited_by == 'memory'
    assert 'DOES NOT FIT' in report.show(plan, 'nothing')


def test_splits_give_way_to_memory():
    # Balanced by time the first stage does not fit; further forward it does.
    workload = Workload(model='b4', group_size=16, stages=2, splits='balanced', global_batch=768)
    free = make_plan(SYSTEMS['ipu_pod16'], workload, 0.1)
    tight = dataclasses.replace(
        SYSTEMS['ipu_pod16'],
        device=SYSTEMS['ipu_pod16'].device._replace(memory=sum(free.memory.values()) - 1, usable=1.0),
    )
    plan = make_plan(tight, workload, 0.1)
    assert plan.fits
    assert plan.layout.splits < free.layout.splits
    assert plan.images_per_second < free.images_per_second


def test_micro_batch_as_large_as_fits():
    workload, whole = Workload(micro_batch=0), SYSTEMS['dgx_a100_8']
    small = dataclasses.replace(whole, device=whole.device._replace(memory=whole.device.memory / 4))
    plan = make_plan(small, workload, 1.0)
    assert plan.fits
    rows = workload.global_batch // plan.layout.replicas
    larger = [size for size in range(plan.layout.micro_batch + 1, 257) if rows % size == 0]
    assert larger
    stages = plan.layout.stages
    assert not any(make_plan(small, Workload(micro_batch=size, stages=stages), 1.0).fits for size in larger)


def test_a_uint8_batch_is_a_quarter_of_an_fp32_one():
    plan = plan_on('bow_pod256', Workload())
    assert plan.host_bandwidth('fp32') == 4 * plan.host_bandwidth('uint8')
    assert plan.host_bandwidth('uint8') == pytest.approx(plan.images_per_second * 380 * 380 * 3)
    assert plan_on('bow_pod256', Workload(images='fp32')).limited_by == 'compute'
    assert plan_on('bow_pod256', Workload(images='fp32')).seconds['input'] > 0  # though it waits for images already


def test_json(capsys):
    found = json.loads(planned('--model=b4', '--group_size=16', '--system=ipu_pod256', '--json', capsys=capsys))
    assert found.keys() >= KEYS
    assert found['splits'] == ['block4a']
    assert (found['stages'], found['replicas'], found['accumulation']) == (2, 128, 16)
    assert found['images_per_second'] == pytest.approx(6144 / found['update_seconds'])
    assert found['update_seconds'] == pytest.approx(sum(found['seconds'].values()))
    assert found['memory_bytes'] == pytest.approx(sum(found['memory'].values()))
    assert found['fits'] is True
    assert (found['workload']['stages'], found['workload']['replicas']) == (2, 128)  # which were left open
    assert found['workload']['splits'] == 'block4a'
    assert [stage['blocks'][0] for stage in found['per_stage']] == ['stem', 'block4a']
    assert sum(stage['parameters'] for stage in found['per_stage']) == 19_328_168


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--sweep=systems', '--system=ipu_pod16'], '--system means nothing with --sweep=systems'),
        (['--sweep=systems', '--machine=m.json'], '--machine means nothing with --sweep=systems'),
        (['--validate', '--model=b0'], '--model means nothing with --validate'),
        (['--calibrate', '--stages=2'], '--stages means nothing with --calibrate'),
        (['--out=charts'], '--out means nothing with --system=ipu_pod256'),
        (['--system=bow_pod16', '--machine=m.json'], '--machine means nothing with --system=bow_pod16'),
    ],
)
def test_flags_that_nothing_reads_are_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_text(capsys):
    text = planned('--system=bow_pod64', capsys=capsys)
    assert 'global batch 6,144 = micro-batch 3 × 32 replicas × accumulation 64; 2 stages' in text
    assert 'limited by compute' in text
    for part in ('weights', 'stash', '  recompute block', 'reduction', 'GB/s as fp32'):
        assert part in text


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--system=ipu_pod7'], "--system='ipu_pod7' is unknown; choose one of ipu_pod16, "),
        (['--global_batch=6000', '--stages=2'], 'global_batch=5760 or 6144 would be'),
        (['--micro_batch=5', '--stages=2'], 'micro_batch=4 or 6'),
        (['--replicas=200', '--stages=2'], 'set replicas=128'),
        (['--stages=0'], "--stages='0' must be 'auto' or a whole number above 0"),
        (['--stages=two'], "--stages='two' must be"),
        (['--stages=99'], 'stages=99 must be at least 1 and at most 34'),
        (['--stages=3', '--splits=block4a'], "--stages=3 is not what --splits='block4a' make, 2"),
        (['--splits=block9z'], 'is no block of this network'),
        (['--micro_batch=-1'], '--micro_batch=-1 must be a whole number from 0 to 1,000,000'),
        (['--global_batch=7680000000'], '--global_batch=7680000000 must be a whole number from 0 to 1,000,000'),
        (['--validate', '--machine=/nonexistent/machine.json'], '/nonexistent/machine.json is missing'),
        (['--global_batch=0', '--stages=2'], 'global_batch=0 must be at least 1'),
        (['--epochs=0'], '--epochs=0 must be above 0'),
        (['--examples=0'], '--examples=0 must be at least 1'),
        (['--model=b9'], "--model='b9' is unknown; choose one of b0, "),
        (['--policy=8.8'], "--policy='8.8' is unknown; choose one of 32.32"),
        (['--optimizer=adam'], "--optimizer='adam' is unknown; choose one of lars"),
        (['--schedule=1f1b'], "--schedule='1f1b' is unknown"),
        (['--epochs=1e308'], 'is beyond counting'),
        (['--examples=1' + 400 * '0'], 'is beyond counting'),
        (['--model=b6'], 'group_size=16 must divide the channels'),
        (['--recompute=all'], "--recompute='all' is unknown; choose one of none, block, stage"),
        (['--schedule=1f1b'], "'1f1b' is unknown"),
        (['--images=int8'], "--images='int8' is unknown; choose one of uint8, fp32"),
        (
            ['--system=this_machine', '--machine=/nonexistent/machine.json'],
            '--calibrate --machine=/nonexistent/machine.json makes it',
        ),
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


def test_unknown_systems_list_all_known():
    with pytest.raises(ConfigError) as raised:
        system_of('cray')
    assert all(name in str(raised.value) for name in (*SYSTEMS, 'this_machine'))


def test_the_systems_add_up():
    for system in SYSTEMS.values():
        assert system.links[-1].devices >= system.devices
        assert [link.devices for link in system.links] == sorted(link.devices for link in system.links)
        assert 0 < system.device.usable <= 1
        assert system.device.flops[2] >= system.device.flops[4]
    # Published for a whole system: 15.978 PFLOP/s of an IPU-POD64, 89.23 of a Bow Pod256.
    for name, peak in (('ipu_pod64', 15.978e15), ('bow_pod256', 89.23e15)):
        assert SYSTEMS[name].device.flops[2] * SYSTEMS[name].devices == pytest.approx(peak, rel=0.005)


@pytest.mark.parametrize(
    ('system', 'workload', 'beside'),
    [
        ('dgx_h100_8', Workload(stages=2, global_batch=1024, micro_batch=0), (1, 2, 4, 8, 16, 32, 64, 128, 256)),
        ('tpu_v3_8', Workload(stages=2, global_batch=1024, micro_batch=0, policy='bf16.32'), (4, 8, 16, 32, 64)),
        ('dgx_a100_8', Workload(stages=1, global_batch=1024, micro_batch=0), (1, 16, 64, 128)),
    ],
)
def test_the_micro_batch_left_open_is_the_fastest_that_fits(system, workload, beside):
    chosen = plan_on(system, workload)
    assert chosen.fits
    for size in beside:
        other = plan_on(system, dataclasses.replace(workload, micro_batch=size))
        assert not other.fits or other.images_per_second <= chosen.images_per_second


def test_what_was_published_is_drawn_beside_its_own_network_alone():
    plans = [plan_on('bow_pod64', dataclasses.replace(REFERENCE, model=model)) for model in ('b4', 'b0')]
    assert sweep.published_numbers(plans[:1], 'images_per_second') == {'bow_pod64': [34_943, 34_140]}
    assert sweep.published_numbers(plans[1:], 'images_per_second') == {}


def test_hours_are_published_ones_and_those_of_published_speeds():
    whole = plan_on('ipu_pod256', REFERENCE)
    updates = int(1_281_167 * 350 / 6144)
    assert sweep.published_numbers([whole], 'hours') == {
        'ipu_pod256': [pytest.approx(updates * 6144 / 87_968 / 3600), 1.8]
    }
    half = plan_on('ipu_pod256', dataclasses.replace(REFERENCE, epochs=175.0))
    (found,) = sweep.published_numbers([half], 'hours').values()
    assert found == [pytest.approx(updates * 6144 / 87_968 / 3600 / 2, rel=1e-4)]


@pytest.mark.parametrize(('family', 'name'), [('ipu', 'IPU'), ('dgx', 'DGX'), ('tpu', 'TPU')])
def test_the_readme_has_the_efficiencies_that_are_fitted(family, name):
    text = (pathlib.Path(calibration.__file__).parent / 'README.md').read_text()
    (row,) = re.findall(rf'^\| {name} \(.*$', text, re.MULTILINE)
    assert row.endswith(f'| {100 * calibration.family_efficiency(family):.1f} % |')


def test_two_stages_fit_wherever_some_cut_does():
    """A share of what the compiler adds moves with the cut, so that counted bytes alone would miss this one."""
    workload = Workload(policy='bf16.32', recompute='none', stages=2, micro_batch=49, global_batch=1568)
    assert plan_on('tpu_v3_8', dataclasses.replace(workload, splits='block2a')).fits
    assert plan_on('tpu_v3_8', workload).fits


@pytest.mark.parametrize('room', [240, 250, 260, 270])
def test_four_stages_fit_between_the_least_and_what_balance_needs(room):
    """Balanced ones need 278 MiB a device, the smallest 233."""
    system = SYSTEMS['dgx_a100_8']
    device = system.device._replace(memory=room * 2**20 / system.device.usable)
    workload = Workload(model='b0', micro_batch=8, global_batch=768, stages=4, splits='balanced')
    plan = make_plan(dataclasses.replace(system, device=device), workload, 0.05)
    assert plan.fits
    assert sum(plan.memory.values()) <= room * 2**20


def test_images_held():
    layout = Layout(1, 3, 5, ('block4a',))
    assert memory.images_held(SYSTEMS['ipu_pod16'].software, layout) == 12
    assert memory.images_held(TRAINER, layout) == 4 * 8 + 15
    assert memory.images_held(TRAINER, dataclasses.replace(layout, splits=())) == 4 * 15


def test_sweep(tmp_path, capsys):
    out = tmp_path / 'charts'
    text = planned('--sweep=systems', f'--out={out}', capsys=capsys)
    assert '| IPU-POD256 | 3 | 2 | 128 | 16 | 6144 |' in text
    assert (out / 'batch_sizes.md').read_text().strip() in text
    assert text.startswith('B4 G16, 380 pixels, batch 6,144, 350 epochs\n')
    assert '| (' not in text
    assert '| (IPU-POD16) | 48 |' in planned('--sweep=systems', '--micro_batch=48', f'--out={out}', capsys=capsys)
    for name in ('images_per_second', 'hours'):
        assert (out / f'{name}.png').read_bytes().startswith(b'\x89PNG')
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='cannot be written'):
        sweep.write([plan_on('ipu_pod16', Workload())], tmp_path / 'file' / 'charts')


@pytest.mark.parametrize(('schedule', 'stages'), [('grouped', 1), ('grouped', 3), ('sequential', 2)])
def test_timetables_as_pictures(schedule, stages):
    timing = timetable(schedule, stages, 4)
    axes = Figure().subplots()
    charts.draw_timetable(axes, timing, 'a title')
    drawn = {(text.get_text(), *text.get_position()) for text in axes.texts}
    expected = set()
    for tick, (forward, backward) in enumerate(zip(timing.forward.tolist(), timing.backward.tolist(), strict=True)):
        for stage in range(stages):
            expected |= {(f'f{forward[stage]}', tick + 0.5, stage + 0.27)} if forward[stage] != NONE else set()
            expected |= {(f'b{backward[stage]}', tick + 0.5, stage + 0.77)} if backward[stage] != NONE else set()
    assert drawn == expected
    assert axes.get_xlim() == (0, len(timing.forward))


def test_deviations_as_a_picture():
    axes = Figure().subplots()
    charts.draw_deviations(axes, ['hit', 'missed'], [0.05, -0.3], [0.1, 0.15])
    assert [text.get_text() for text in axes.texts] == ['+5.0%', '-30.0%']
    hit, missed = (axes.patches[index].get_facecolor() for index in (1, 3))
    assert hit != missed


def test_blocks_that_wait_for_memory():
    def share(stages=1, **device):
        system = dataclasses.replace(TOY, device=TOY.device._replace(**device))
        workload = dataclasses.replace(SMALL, stages=stages, splits='block4a' if stages > 1 else 'auto')
        return make_plan(system, workload, 1.0).memory_bound

    assert share(bandwidth=1e18) == 0
    assert share(bandwidth=1e6) == 1
    costs = block_costs(model_spec('b0', classes=10), 64)
    arithmetic = [2 * 2 * cost.macs / 1e12 for cost in costs]
    traffic = [(2 * 2 * 2 * cost.kept + 2 * cost.parameters) / 1e11 for cost in costs]
    waiting = sum(memory for work, memory in zip(arithmetic, traffic, strict=True) if memory > work)
    both = zip(arithmetic, traffic, strict=True)
    assert share(bandwidth=1e11) == pytest.approx(waiting / sum(map(max, both)))
    assert 0 < share(bandwidth=1e11) < 1
    # Of two stages the slower one sets the time; the first computes its forward once more.
    cut = [cost.name for cost in costs].index('block4a')
    layers = list(zip(arithmetic, traffic, strict=True))
    stages = {4 * sum(map(max, layers[:cut])): layers[:cut], 3 * sum(map(max, layers[cut:])): layers[cut:]}
    slowest = stages[max(stages)]
    waiting = sum(memory for work, memory in slowest if memory > work)
    assert share(stages=2, bandwidth=1e11) == pytest.approx(waiting / sum(map(max, slowest)))
    assert share(stages=2, bandwidth=1e11) != pytest.approx(share(bandwidth=1e11), rel=0.01)
