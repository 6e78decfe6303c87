"""What a weight update costs on a system: memory a device, and where its time goes.

Blocks are counted by efficientnet/model/costs.py, stages by stages.py, ticks by pipeline.py, replicas and accumulation
by layout.py: the trainer's own numbers. To these a plan adds seconds:

- a block's forward pass takes the longer of 2 × its multiply-adds ÷ the device's peak (with those that a unit made
  for wider groups leaves undone) and its bytes ÷ the bandwidth of the device's memory, both divided by one
  efficiency, which is calibrated on one measured or published point (calibration.py). Its bytes are what its layers
  hand to each other, written once and read once, and its weights, read once a micro-batch. Its backward takes two
  forward passes, recomputation one more each time. Where the blocks were timed on the machine, their times stand in
  for the counts, which then only say by how much another micro-batch takes longer;
- a tick lasts as long as the slowest stage is at work in it, then the stages hand over to each other (latency +
  bytes ÷ bandwidth; both ways at once) and add up gradients (accumulator read and written, gradient read);
- gradients are reduced once an update, by rings: within the groups of each level of the network and then, with what
  is left to each device, between them. A ring of n takes 2 (n − 1) messages, of 1/n of the bytes each;
- the optimizer reads gradients and reads and writes weights, state and averages, once an update;
- images come from the hosts while the device computes: an update takes as long as the slower of the two.

Not modelled: the time of starting kernels, which very small micro-batches on a GPU feel; reading and decoding images
on the hosts; collisions between stages that share links; evaluation and checkpoints.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from efficientnet.errors import ConfigError
from efficientnet.model.costs import BlockCost
from efficientnet.numerics.precision import policy
from efficientnet.parallel.layout import Layout, make_layout
from efficientnet.parallel.stages import (
    PASSES,
    PUBLISHED,
    StageCost,
    Storage,
    balance,
    check_splits,
    parse_splits,
    stage_table,
    storage_of,
)
from experiments.planner.memory import memory_parts
from experiments.planner.systems import System
from experiments.planner.timing import BlockTime, TimedBlocks, count_blocks, count_times, idle_macs, update_parts
from experiments.planner.workload import IMAGE_BYTES, Workload

STAGES = (1, 2, 4, 8)  # that 'auto' tries
LARGEST = 256  # micro-batch that is tried
BUDGETS = 32  # shares of the largest stage that the others are tried to stay within


@dataclasses.dataclass(frozen=True)
class Plan:
    """A workload on a system.

    Attributes:
        system: Where.
        workload: What.
        layout: Replicas, stages and accumulation.
        stages: What each stage does and holds.
        efficiency: Share of the device's peak that blocks reach.
        seconds: Of an update by part; their sum is its time. 'input' is what the device waits for images.
        input_seconds: What sending an update's images takes, beside the device's work.
        memory: Bytes of the fullest device by part.
        room: Bytes that may be used there.
        activations: Bytes that the backward in progress needs in the stage that needs most, by kind of recomputation.
        memory_bound: Share of the compute in blocks that by their counts wait for memory, not for arithmetic.
    """

    system: System
    workload: Workload
    layout: Layout
    stages: Sequence[StageCost]
    efficiency: float
    seconds: Mapping[str, float]
    input_seconds: float
    memory: Mapping[str, float]
    room: float
    activations: Mapping[str, float]
    memory_bound: float

    @property
    def update_seconds(self) -> float:
        """Seconds of a weight update."""
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Images trained a second."""
        return self.layout.global_batch / self.update_seconds

    @property
    def hours(self) -> float:
        """Hours of all epochs; the last, incomplete update of the run is not made."""
        workload = self.workload
        updates = int(workload.examples * workload.epochs / workload.global_batch)
        return updates * self.update_seconds / 3600

    @property
    def fits(self) -> bool:
        """Whether the fullest device has room."""
        return sum(self.memory.values()) <= self.room

    @property
    def limited_by(self) -> str:
        """The part of an update that takes longest, or 'memory' if it does not fit."""
        return max(self.seconds, key=self.seconds.get) if self.fits else 'memory'

    def host_bandwidth(self, images: str) -> float:
        """Returns the bytes a second that all hosts send together if images are 'uint8' or 'fp32'."""
        return self.images_per_second * self.workload.image_bytes(images)

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as plain data; its workload has what was left open filled in."""
        layout = self.layout
        return {
            'system': self.system.name,
            'workload': dataclasses.asdict(self.workload)
            | {
                'image_size': self.workload.pixels,
                'stages': layout.stages,
                'splits': ','.join(layout.splits),
                'replicas': layout.replicas,
            },
            'images_per_second': self.images_per_second,
            'update_seconds': self.update_seconds,
            'hours': self.hours,
            'epochs': self.workload.epochs,
            'stages': layout.stages,
            'splits': list(layout.splits),
            'replicas': layout.replicas,
            'accumulation': layout.accumulation,
            'devices': layout.devices,
            'per_stage': [dataclasses.asdict(stage) for stage in self.stages],
            'fits': self.fits,
            'memory_bytes': sum(self.memory.values()),
            'memory_room_bytes': self.room,
            'memory': dict(self.memory),
            'activations': dict(self.activations),
            'seconds': dict(self.seconds),
            'input_seconds': self.input_seconds,
            'host_bytes_per_second': {images: self.host_bandwidth(images) for images in IMAGE_BYTES},
            'efficiency': self.efficiency,
            'limited_by': self.limited_by,
            'memory_bound': self.memory_bound,
        }


def make_plan(system: System, workload: Workload, efficiency: float, timed: TimedBlocks | None = None) -> Plan:
    """Plans a workload on a system.

    Args:
        system: Where.
        workload: What.
        efficiency: Share of the device's peak that blocks reach, or, if they were timed, what remains of their speed.
        timed: The blocks, where they were measured.

    Returns:
        The fastest plan that fits, of the stages and micro-batches that are left open; if none fits, the smallest.
        Micro-batches are tried from the largest that fits down, until a plan is slower than the one before: one stage
        gets ever slower, several rest less.

    Raises:
        ConfigError: A size is out of range or does not divide, or an option is unknown.
    """
    workload.check()
    counts = (workload.stages,)
    if not workload.stages and workload.chooses_splits:
        counts = [count for count in STAGES if count <= system.devices]
    plans, problem = [], None
    for stages in counts:
        try:
            fastest = 0.0
            for size in micro_batches(system, workload, stages):
                planner = _Planner(system, dataclasses.replace(workload, micro_batch=size), efficiency, timed)
                plans.append(plan := planner.plan(stages))
                if plan.fits and plan.images_per_second < fastest:
                    break
                fastest = plan.images_per_second if plan.fits else fastest
        except ConfigError as error:  # such as a batch that does not divide by so many replicas
            problem = problem or error
    if not plans:
        raise problem
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return max(fitting, key=lambda plan: plan.images_per_second)
    return min(plans, key=lambda plan: sum(plan.memory.values()))


def micro_batches(system: System, workload: Workload, stages: int) -> Sequence[int]:
    """Returns the micro-batches to try, largest first: the one given, or all that divide a replica's rows.

    Args:
        system: Where.
        workload: What.
        stages: Of the pipeline; 0 for as many as the splits make.
    """
    if workload.micro_batch:
        return (workload.micro_batch,)
    stages = stages or len(parse_splits(workload.splits)) + 1
    replicas = workload.replicas or max(system.devices // stages, 1)
    rows = max(workload.global_batch // replicas, 1)
    return [size for size in range(min(rows, LARGEST), 0, -1) if rows % size == 0]


@dataclasses.dataclass(frozen=True)
class _Planner:
    """Makes the plans of one workload, micro-batch included; the fields are as in `make_plan`."""

    system: System
    workload: Workload
    efficiency: float
    timed: TimedBlocks | None

    @functools.cached_property
    def costs(self) -> Sequence[BlockCost]:
        return count_blocks(self.workload.spec(), self.workload.pixels, self.system.software)

    @functools.cached_property
    def storage(self) -> Storage:
        software = self.system.software
        storage = storage_of(policy(self.workload.policy), self.workload.optimizer, software.averages)
        return dataclasses.replace(storage, accumulator=software.accumulator)

    @functools.cached_property
    def times(self) -> Mapping[str, BlockTime]:
        counted = self.count(self.workload.micro_batch)
        return self.timed.scaled(self.count(self.timed.micro_batch), counted) if self.timed else counted

    def count(self, micro_batch: int, **better: float) -> dict[str, BlockTime]:
        """Returns the times of the blocks on so many images at the peak of the device, or of a better one."""
        device, workload = self.system.device._replace(**better), self.workload
        idle = idle_macs(workload.spec(), workload.pixels, device.group)
        return count_times(self.costs, idle, device, micro_batch, max(self.storage.compute, device.narrowest))

    def memory_bound(self, blocks: Sequence[str]) -> float:
        """Returns the share of the blocks' time in those that by their counts wait for memory, not for arithmetic."""
        counted = self.count(self.workload.micro_batch)
        arithmetic = self.count(self.workload.micro_batch, bandwidth=math.inf)
        waiting = (self.times[name].both for name in blocks if counted[name].both > arithmetic[name].both)
        return sum(waiting) / sum(self.times[name].both for name in blocks)

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Of `balance` and `stage_table`, beside the recomputation."""
        return {
            'schedule': self.workload.schedule,
            'micro_batch': self.workload.micro_batch,
            'storage': self.storage,
            'seconds': {name: time.both / 3 / self.efficiency for name, time in self.times.items()},
        }

    def plan(self, stages: int) -> Plan:
        """Returns the plan in so many stages; 0 for as many as the given splits make."""
        workload, software = self.workload, self.system.software
        given = () if workload.chooses_splits else parse_splits(workload.splits)
        if not workload.chooses_splits:
            check_splits(workload.spec(), given)
            if stages not in (0, len(given) + 1):
                raise ConfigError(f'--stages={stages} is not what --splits={workload.splits!r} make, {len(given) + 1}')
            return self.cut(given)
        published = PUBLISHED.get(workload.model, ()) if software.published and workload.group_size == 16 else ()
        if workload.splits == 'auto' and 1 < stages == len(published) + 1:
            return self.cut(published)
        plan = self.cut(balance(self.costs, stages, workload.recompute, **self.options))
        if plan.fits:
            return plan
        if stages == 2:  # few enough to try them all, with all that a budget of counted bytes leaves out
            plans = [self.cut((block.name,)) for block in self.costs[1:]]
            return max((one for one in plans if one.fits), key=lambda one: one.images_per_second, default=plan)
        accumulators = self.storage.accumulator * software.gradients
        options = self.options | {'storage': dataclasses.replace(self.storage, accumulator=accumulators)}
        table = stage_table(self.costs, plan.layout.splits, workload.recompute, **options)
        plans, largest = [], max(stage.total for stage in table)
        for part in range(BUDGETS, 0, -1):  # a stage's total is not all that a device holds, so several are tried
            budget = largest * part // BUDGETS
            try:
                plans.append(self.cut(balance(self.costs, stages, workload.recompute, budget=budget, **options)))
            except ConfigError:  # no stages are that small
                break
        return max((one for one in plans if one.fits), key=lambda one: one.images_per_second, default=plan)

    def cut(self, splits: tuple[str, ...]) -> Plan:
        """Returns the plan with such splits."""
        system, workload = self.system, self.workload
        layout = make_layout(
            global_batch=workload.global_batch,
            micro_batch=workload.micro_batch,
            replicas=workload.replicas,
            splits=splits,
            devices=system.devices,
            schedule=workload.schedule,
            recompute=workload.recompute,
        )
        tables = {kind: stage_table(self.costs, splits, kind, **self.options) for kind in PASSES}
        table = tables[workload.recompute]
        input_seconds = workload.global_batch * workload.image_bytes() / system.host_bandwidth
        seconds = update_parts(system, layout, table, self.storage, self.times, self.efficiency)
        seconds['input'] = max(0.0, input_seconds - sum(seconds.values()))
        slowest = max(table, key=lambda stage: stage.work)
        return Plan(
            system=system,
            workload=workload,
            layout=layout,
            stages=table,
            efficiency=self.efficiency,
            seconds=seconds,
            input_seconds=input_seconds,
            memory=memory_parts(system.software, workload.image_bytes(), layout, table, self.storage),
            room=system.device.memory * system.device.usable,
            activations={kind: max(stage.activations for stage in found) for kind, found in tables.items()},
            memory_bound=self.memory_bound(slowest.blocks),
        )
