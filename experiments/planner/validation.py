"""Predictions laid beside what was published or measured, whatever comes of it.

Nothing here was used to calibrate; the points that were are in calibration.py. Numbers marked unconfirmed are known
second-hand. This machine's rows come from the stored results of

  python -m experiments.planner --calibrate --machine=experiments/planner/results/this_machine.json
  python -m experiments.benchmark pipeline --rounds=6 --image_size=S --micro_batch=M --accumulation=N --json

in `results/`, of which only the former's update in one stage is used to predict the latter's times. Blocks were timed
at one image size; at others they are counted.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from efficientnet.errors import ConfigError
from efficientnet.parallel.stages import check_splits, parse_splits
from experiments.benchmark.setup import MIB, table
from experiments.planner.calibration import (
    BLOCK_FLAGS,
    NVIDIA_B4,
    REFERENCE,
    Machine,
    check_whole,
    load_machine,
    plan_on,
    solve,
)
from experiments.planner.plan import Plan, make_plan
from experiments.planner.systems import SYSTEMS
from experiments.planner.workload import Workload

RESULTS = pathlib.Path(__file__).parent / 'results'  # of one machine, as it was measured
CALIBRATION = RESULTS / 'this_machine.json'
GRAPHCORE = 'graphcore.cn/performance-results'
UNCONFIRMED = "Graphcore's SDK 2.4 table, unconfirmed"
UNMEASURED = 'none of a machine at hand: the pipeline_*.json in results are of another than the calibration'
NVIDIA = 'NVIDIA/DeepLearningExamples, efficientnet_v1'
MLPERF_POST = "Graphcore's MLPerf v1.1 post, December 2021, second-hand"


class Row(NamedTuple):
    """One prediction.

    Attributes:
        what: Was predicted.
        predicted: Number.
        found: Number, published or measured.
        unit: Of both.
        tolerance: Largest deviation that counts as a hit, as a share of what was found.
        source: Of what was found.
    """

    what: str
    predicted: float
    found: float
    unit: str
    tolerance: float
    source: str

    @property
    def deviation(self) -> float:
        """Predicted ÷ found − 1."""
        return self.predicted / self.found - 1

    @property
    def hit(self) -> bool:
        """Whether the prediction lies within the tolerance."""
        return abs(self.deviation) <= self.tolerance


class Claim(NamedTuple):
    """A prediction that is true or false."""

    what: str
    predicted: bool
    found: bool
    detail: str
    source: str

    @property
    def hit(self) -> bool:
        """Whether they agree."""
        return self.predicted == self.found


PUBLISHED = (
    ('bow_pod64', 34_943, f'{GRAPHCORE}, before SDK 2.5'),
    ('bow_pod64', 34_140, f'{GRAPHCORE}, SDK 3.0'),
    ('bow_pod256', 117_641, f'{GRAPHCORE}, before SDK 2.5'),
    ('bow_pod256', 122_665, f'{GRAPHCORE}, SDK 3.0'),
    ('ipu_pod16', 6_379, UNCONFIRMED),
    ('ipu_pod64', 24_946, UNCONFIRMED),
    ('ipu_pod128', 48_015, UNCONFIRMED),
    ('ipu_pod256', 87_968, UNCONFIRMED),
)
PUBLISHED_HOURS = (('ipu_pod256', 1.8, MLPERF_POST),)
NVIDIA_PUBLISHED = ((1, 470), (32, 12_908), (64, 25_455))  # GPUs, images/s
# `python -m experiments.benchmark memory`: splits, recomputation, MiB of temporaries that XLA plans a device.
PLANNED = (
    ('', 'none', 996),
    ('block3d', 'none', 1642),
    ('block2c,block3d,block5e', 'none', 2249),
    ('', 'block', 372),
    ('block3b', 'block', 318),
    ('block2b,block3c,block5c', 'block', 332),
    ('block3b', 'stage', 569),
    ('block2b,block3c,block5c', 'stage', 421),
)


def published_rows() -> list[Row]:
    """Returns throughputs of others' systems."""
    rows = []
    for name, found, source in PUBLISHED:
        speed = plan_on(name, REFERENCE).images_per_second
        rows.append(Row(f'{SYSTEMS[name].title}, B4 G16', speed, found, 'images/s', 0.1, source))
    for name, found, source in PUBLISHED_HOURS:
        hours = plan_on(name, REFERENCE).hours
        rows.append(Row(f'{SYSTEMS[name].title}, 350 epochs', hours, found, 'hours', 0.1, source))
    for gpus, found in NVIDIA_PUBLISHED:
        name, workload = f'dgx_a100_{gpus}', dataclasses.replace(NVIDIA_B4, global_batch=160 * gpus)
        speed = plan_on(name, workload).images_per_second
        rows.append(Row(f'{SYSTEMS[name].title}, B4 G1', speed, found, 'images/s', 0.1, NVIDIA))
    return rows


def claims() -> list[Claim]:
    """Returns what the reference says fits, and its two hours."""
    found = []
    g1 = dataclasses.replace(REFERENCE, group_size=1, policy='16.32', optimizer='rmsprop', splits='auto')
    g1 = dataclasses.replace(g1, global_batch=768)
    g16 = dataclasses.replace(REFERENCE, splits='auto')
    configs = 'graphcore/examples v2.5.0, configs.yml'
    for title, workload, counts in (
        ('B4 G16, 16.16, LARS', g16, {1: False, 2: True}),
        ('B4 G1, 16.32, RMSProp', g1, {2: False, 4: True}),
    ):
        for stages, fits in counts.items():
            plan = plan_on('ipu_pod16', dataclasses.replace(workload, stages=stages))
            used = f'{sum(plan.memory.values()) / MIB:,.0f} of {plan.room / MIB:,.0f} MiB'
            found.append(Claim(f'{title}, micro-batch 3, fits {stages} IPUs', plan.fits, fits, used, configs))
    speeds = [plan_on('ipu_pod16', workload).images_per_second for workload in (g16, dataclasses.replace(g1, stages=4))]
    faster, paper = speeds[0] / speeds[1], 'arXiv 2106.03640: up to 3 times'
    found.append(Claim('B4 G16 trains faster than G1 on IPUs', faster > 1, True, f'{faster:.1f} times', paper))
    hours = plan_on('ipu_pod256', REFERENCE).hours
    blog = "the reference's blog"
    found.append(Claim('IPU-POD256 takes less than 2 hours', hours < 2, True, f'{hours:.2f} hours', blog))
    return found


def memory_rows() -> list[Row]:
    """Returns what XLA plans for this trainer by stages and recomputation."""
    rows = []
    for splits, recompute, found in PLANNED:
        stages = len(parse_splits(splits)) + 1
        workload = Workload(
            stages=stages,
            splits=splits,
            recompute=recompute,
            policy='32.32',
            global_batch=24,
            replicas=1,
            micro_batch=3,
        )
        memory = make_plan(SYSTEMS['dgx_a100_8'], workload, 1.0).memory
        predicted = sum(memory[part] for part in ('gradients', 'stash', 'activations')) / MIB
        what = f'B4 G16 32.32 temporaries, {stages} × {recompute}'
        rows.append(Row(what, predicted, found, 'MiB', 0.15, 'README, planned by XLA'))
    return rows


def machine_rows(machine_file: pathlib.Path = CALIBRATION, results: pathlib.Path = RESULTS) -> list[Row]:
    """Returns update times on this machine, from blocks timed one by one and from counts alone.

    Args:
        machine_file: What `--calibrate` wrote.
        results: Folder with what `experiments.benchmark pipeline --json` printed, in files pipeline_*.json.

    Returns:
        A row for each that was found on the machine that the calibration is of.

    Raises:
        ConfigError: A file is missing or damaged.
    """
    machine, rows = load_machine(machine_file), []
    for how in ('timed', 'counted'):
        for path in sorted(results.glob('pipeline_*.json')):
            found = _pipeline_result(path)
            if found['machine'] != machine.name:
                continue
            flags = found['flags']
            size = f'micro-batch {flags["micro_batch"]} × {flags["accumulation"]}'
            for stages, job in ((1, 'one_stage'), (flags['stages'], 'pipeline')):
                splits = found['splits'] if stages > 1 else ''
                if _workload(flags, splits) == machine.workload:
                    continue  # which the calibration is of
                plan = _measured_plan(machine, flags, splits, how)
                if plan is None:
                    continue
                count = f'{stages} stage{"s" if stages > 1 else ""}'
                what = f'{flags["model"].upper()} {flags["image_size"]} pixels, {size}, {count}, blocks {how}'
                measured = found['seconds'][job]
                rows.append(Row(what, 1000 * plan.update_seconds, 1000 * measured, 'ms', 0.15, f'results/{path.name}'))
    return rows


def _pipeline_result(path: pathlib.Path) -> dict[str, Any]:
    """What `experiments.benchmark pipeline --json` printed.

    Raises:
        ConfigError: The file is something else, or of a network of another width or depth.
    """
    try:
        found = json.loads(path.read_text())
        flags = found['flags']
        if not isinstance(found['machine'], str):
            raise ValueError(f'machine={found["machine"]!r} must be its name')
        if not found['splits'] or flags['stages'] != found['splits'].count(',') + 2:
            raise ValueError(f'splits={found["splits"]!r} must make stages={flags["stages"]}')
        check_whole(flags, 'image_size', 'micro_batch', 'accumulation')
        if flags['width'] or flags['depth']:
            raise ValueError('width and depth must be 0, which is the model as it is')
        for job in ('one_stage', 'pipeline'):
            if not 0 < found['seconds'][job] < math.inf:
                raise ValueError(f'seconds.{job}={found["seconds"][job]!r} must be above 0')
        workload = _workload(flags, found['splits'])
        workload.check()
        check_splits(workload.spec(), parse_splits(workload.splits))
    except (OSError, AttributeError, KeyError, TypeError, ValueError, ConfigError) as error:
        raise ConfigError(
            f'{path} is not what python -m experiments.benchmark pipeline --json prints ({error!r})'
        ) from None
    return found


def _workload(flags: Mapping[str, Any], splits: str) -> Workload:
    return Workload(
        **{name: flags[name] for name in BLOCK_FLAGS},
        global_batch=flags['micro_batch'] * flags['accumulation'],
        replicas=1,
        stages=splits.count(',') + 2 if splits else 1,
        splits=splits or 'auto',
        schedule=flags['schedule'],
        recompute=flags['recompute'],
    )


def _measured_plan(machine: Machine, flags: dict, splits: str, how: str) -> Plan | None:
    """The plan of an update in one stage or more; None if its blocks should be timed ones and were not timed."""
    workload = _workload(flags, splits)
    timed = machine.timed(workload) if how == 'timed' else None
    if how == 'timed' and not timed:
        return None
    efficiency = solve(machine.system, machine.workload, machine.update_seconds, timed)
    return make_plan(machine.system, workload, efficiency, timed)


def show(rows: Sequence[Row], found: Sequence[Claim]) -> str:
    """Returns all predictions as text."""
    lines = [('prediction', 'predicted', 'found', 'off by', 'allowed', '', 'source')]
    for row in rows:
        digits = 0 if row.found >= 10 else 2
        numbers = (f'{row.predicted:,.{digits}f}', f'{row.found:,.{digits}f} {row.unit}', f'{row.deviation:+.1%}')
        lines.append((row.what, *numbers, f'{row.tolerance:.0%}', 'hit' if row.hit else 'MISSED', row.source))
    for claim in found:
        values = ('yes' if value else 'no' for value in (claim.predicted, claim.found))
        lines.append((claim.what, *values, '', '', 'hit' if claim.hit else 'MISSED', f'{claim.detail}; {claim.source}'))
    everything = [*rows, *found]
    hits = sum(each.hit for each in everything)
    note = '' if any(row.source.startswith('results/') for row in rows) else f'; {UNMEASURED}'
    return f'{table(lines)}\n\n{hits} of {len(everything)} predictions hit{note}'
