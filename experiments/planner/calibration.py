"""One efficiency a family of systems, from one published or measured point each.

An update takes work ÷ efficiency + everything else. Everything else (hand-over, accumulation, reduction, optimizer)
comes from bandwidths and latencies and is not touched, so one throughput gives one efficiency. All other throughputs
are predictions; validation.py lays them beside what was published or measured.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from efficientnet.errors import ConfigError
from efficientnet.model.scaling import block_names
from experiments.planner.plan import Plan, make_plan
from experiments.planner.systems import SYSTEMS, THIS_MACHINE, Device, Link, System, system_of
from experiments.planner.timing import BlockTime, TimedBlocks
from experiments.planner.workload import Workload

MACHINE_FILE = pathlib.Path('runs/planner/this_machine.json')  # what `--calibrate` writes unless told otherwise
# Of what was measured: least and greatest that a machine can be, in bytes, FLOP/s, bytes/s and seconds.
PLAUSIBLE = {
    'memory': (1e6, 1e18),
    'flops': (1e6, 1e18),
    'bandwidth': (1e6, 1e18),
    'link_bandwidth': (1e3, 1e18),
    'latency': (1e-9, 60.0),
    'update_seconds': (1e-6, 1e6),
}
BLOCK_FLAGS = ('model', 'group_size', 'image_size', 'micro_batch', 'policy')


class Point(NamedTuple):
    """A throughput of images a second that somebody published."""

    system: str
    workload: Workload
    images_per_second: float
    source: str


# The reference's own run: two stages, cut at block4a, micro-batch 3, 16.16 (graphcore/examples v2.5.0, configs.yml).
REFERENCE = Workload(splits='block4a')
# NVIDIA/DeepLearningExamples, TensorFlow2/…/efficientnet_v1/B4/training/AMP/train_benchmark_8xA100-80G.sh: depthwise,
# 160 images a GPU at once, mixed precision, which keeps fp32 weights.
NVIDIA_B4 = Workload(
    group_size=1, global_batch=1280, micro_batch=160, stages=1, recompute='none', policy='16.32', optimizer='rmsprop'
)
GOOGLE_B5 = Workload(
    model='b5', group_size=1, global_batch=65536, micro_batch=64, stages=1, recompute='none', policy='bf16.32'
)
POINTS = {
    'ipu': Point('bow_pod16', REFERENCE, 9_000, 'graphcore.cn/performance-results, SDK 3.0, TensorFlow 1'),
    'dgx': Point('dgx_a100_8', NVIDIA_B4, 3_550, 'NVIDIA/DeepLearningExamples, TensorFlow 2 efficientnet_v1 README'),
    # 1,281,167 images × 350 epochs in 64 minutes; that it was B5 and 350 epochs is not in the abstract.
    'tpu': Point('tpu_v3_1024', GOOGLE_B5, 1_281_167 * 350 / 3840, 'arXiv 2011.00071, abstract'),
}


def solve(system: System, workload: Workload, update_seconds: float, timed: TimedBlocks | None = None) -> float:
    """Returns the efficiency at which an update takes so long.

    Args:
        system: Where.
        workload: What.
        update_seconds: Measured.
        timed: The blocks, where they were measured.

    Raises:
        ConfigError: Everything but the blocks' work takes longer than that already.
    """
    ideal = make_plan(system, workload, 1.0, timed).seconds
    work = ideal['compute'] + ideal['bubble']
    rest = sum(ideal.values()) - work - ideal['input']
    if update_seconds <= rest:
        raise ConfigError(
            f'an update of {update_seconds:g} s on {system.name} leaves no time for computing; '
            f'all else takes {rest:g} s'
        )
    return work / (update_seconds - rest)


@functools.cache
def family_efficiency(family: str) -> float:
    """Returns the efficiency of a family of systems."""
    point = POINTS[family]
    update = point.workload.global_batch / point.images_per_second
    return solve(SYSTEMS[point.system], point.workload, update)


@dataclasses.dataclass(frozen=True)
class Machine:
    """This machine, as `measure.calibrate` found it.

    Attributes:
        system: Its cores as devices.
        workload: What was measured on one of them.
        update_seconds: Of an update of that.
        blocks: Its blocks.
        date: Of the measurement.
    """

    system: System
    workload: Workload
    update_seconds: float
    blocks: TimedBlocks
    date: str

    @property
    def name(self) -> str:
        """Its processor, cores and JAX."""
        return self.system.title

    def timed(self, workload: Workload) -> TimedBlocks | None:
        """Returns the measured blocks if they are those of a workload."""
        same = ['classes', *(name for name in BLOCK_FLAGS if name != 'micro_batch')]
        return self.blocks if all(getattr(workload, name) == getattr(self.workload, name) for name in same) else None


def check_whole(values: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError for what a results file has in the place of a whole number that can have been measured."""
    for name in names:
        if type(values[name]) is not int or not 1 <= values[name] <= 10_000:
            raise ValueError(f'{name}={values[name]!r} must be a whole number from 1 to 10,000')


def load_machine(path: pathlib.Path) -> Machine:
    """Reads what `measure.calibrate` wrote.

    Raises:
        ConfigError: There is no such file, or it is not one of these.
    """
    try:
        found = json.loads(path.read_text())
        flags = found['flags']
        for name, (least, most) in PLAUSIBLE.items():
            if isinstance(found[name], bool) or not least <= found[name] <= most:
                raise ValueError(f'{name}={found[name]!r} must be from {least:g} to {most:g}')
        check_whole(found, 'devices')
        check_whole(flags, 'image_size', 'micro_batch', 'accumulation')
        if not isinstance(found['machine'], str):
            raise ValueError(f'machine={found["machine"]!r} must be its name')
        memory = found['memory'] / found['devices']
        device = Device({4: found['flops']}, found['bandwidth'], memory, 1.0, narrowest=4)  # 16 bits are widened
        link = Link(found['devices'], found['link_bandwidth'], found['latency'])
        times = {name: BlockTime(*seconds) for name, seconds in found['blocks'].items()}
        blocks = TimedBlocks(flags['micro_batch'], times)
        system = System(
            THIS_MACHINE, found['machine'], THIS_MACHINE, device, found['devices'], (link,), 1, found['bandwidth']
        )
        workload = Workload(
            **{name: flags[name] for name in BLOCK_FLAGS},
            global_batch=flags['micro_batch'] * flags['accumulation'],
            recompute=flags['recompute'],
            stages=1,
            replicas=1,
        )
        workload.check()
        if set(times) != set(block_names(workload.spec())):
            raise ValueError(f'blocks must be those of {workload.model}')
        for name, time in times.items():
            if not 0 < time.forward <= time.both < math.inf:
                raise ValueError(f'blocks.{name}={list(time)} must be seconds forward, and more forward and back')
        return Machine(system, workload, found['update_seconds'], blocks, found['date'])
    except FileNotFoundError:
        where = '' if path == MACHINE_FILE else f' --machine={path}'
        raise ConfigError(f'{path} is missing; python -m experiments.planner --calibrate{where} makes it') from None
    except OSError as error:
        raise ConfigError(f'--machine={path} cannot be read: {error.strerror}') from None
    except (AttributeError, KeyError, TypeError, ValueError, ConfigError) as error:
        raise ConfigError(f'{path} is not what --calibrate writes ({error!r}); measure again') from None


def plan_on(name: str, workload: Workload, machine_file: pathlib.Path = MACHINE_FILE) -> Plan:
    """Plans a workload on the system of a name.

    Args:
        name: Of a system in systems.py, or 'this_machine'.
        workload: What.
        machine_file: What `--calibrate` wrote.

    Raises:
        ConfigError: As `make_plan`, or the system is unknown.
    """
    if name != THIS_MACHINE:
        system = system_of(name)
        return make_plan(system, workload, family_efficiency(system.family))
    machine = load_machine(machine_file)
    timed = machine.timed(workload)  # if None, blocks are counted, here as there
    efficiency = solve(machine.system, machine.workload, machine.update_seconds, timed)
    return make_plan(machine.system, workload, efficiency, timed)
