"""How long blocks, stages and a weight update take; plan.py says what goes in."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from efficientnet.model.costs import BlockCost, block_costs
from efficientnet.model.scaling import ModelSpec, block_names, boundary_shape
from efficientnet.parallel.layout import Layout
from efficientnet.parallel.pipeline import timetable
from efficientnet.parallel.stages import PASSES, StageCost, Storage
from experiments.benchmark.pipeline import StageTime, walk
from experiments.planner.systems import Device, Link, Software, System


class BlockTime(NamedTuple):
    """Seconds of a block on a micro-batch, nothing computed twice."""

    forward: float
    both: float  # forward and backward


class TimedBlocks(NamedTuple):
    """Blocks as they were measured, and on how many images."""

    micro_batch: int
    times: Mapping[str, BlockTime]

    def scaled(self, there: Mapping[str, BlockTime], here: Mapping[str, BlockTime]) -> dict[str, BlockTime]:
        """Returns the times on another micro-batch, which are to the measured ones as their counts are.

        A block's time is not in proportion to its images where reading its weights counts.

        Args:
            there: Counted times on the measured micro-batch.
            here: Counted times on the other.
        """
        return {
            name: BlockTime(*(t * b / a for t, a, b in zip(time, there[name], here[name], strict=True)))
            for name, time in self.times.items()
        }


def count_blocks(spec: ModelSpec, size: int, software: Software) -> tuple[BlockCost, ...]:
    """Returns the costs of all blocks as a program keeps their activations.

    Args:
        spec: The network.
        size: Pixels a side of an image.
        software: The program.
    """
    costs = block_costs(spec, size)
    if not software.apart:
        return costs
    names = [block.name for block in costs]
    pixels = [height * width for height, width, _ in (boundary_shape(spec, name, size) for name in names)]
    between = [spec.stem_channels * pixels[1]]
    for block, before, after in zip(spec.blocks, pixels[1:-1], pixels[2:], strict=True):
        expands = block.mid_channels != block.in_channels
        between.append(block.mid_channels * (before * expands + after + after * bool(block.se_channels)))
    between.append(spec.head_channels * pixels[-1])
    return tuple(
        dataclasses.replace(block, kept=block.kept + tensor) for block, tensor in zip(costs, between, strict=True)
    )


def idle_macs(spec: ModelSpec, size: int, group: int) -> dict[str, int]:
    """Returns the multiply-adds of an image that grouped convolutions leave undone on a unit of wider groups, by block.

    Args:
        spec: The network.
        size: Pixels a side of an image.
        group: Channels of a group that the unit takes at once.
    """
    names = block_names(spec)
    idle = dict.fromkeys(names, 0)
    for block, after in zip(spec.blocks, names[2:], strict=True):
        height, width, _ = boundary_shape(spec, after, size)
        channels = block.mid_channels // block.groups
        missing = max(group - channels, 0)
        idle[block.name] = block.kernel**2 * missing * block.mid_channels * height * width
    return idle


def count_times(
    costs: Sequence[BlockCost], idle: Mapping[str, int], device: Device, micro_batch: int, size: int
) -> dict[str, BlockTime]:
    """Returns the time of each block on a micro-batch at a device's peak, from counts alone.

    Args:
        costs: Of all blocks, with group norm, which keeps what layers hand to each other and nothing else.
        idle: Multiply-adds of an image that take time but are not done, by block; see `idle_macs`.
        device: Where.
        micro_batch: Images.
        size: Bytes of a computed number.
    """
    times = {}
    for block in costs:
        arithmetic = 2 * micro_batch * (block.macs + idle[block.name]) / device.flops[size]
        traffic = 2 * micro_batch * block.kept_bytes(size) + block.parameters * size
        forward = max(arithmetic, traffic / device.bandwidth)
        times[block.name] = BlockTime(forward, 3 * forward)
    return times


def stage_works(
    layout: Layout, table: Sequence[StageCost], times: Mapping[str, BlockTime], efficiency: float
) -> list[StageTime]:
    """Returns what each stage does with a micro-batch in the ticks of its forward and of its backward, in seconds."""
    works = []
    for number, stage in enumerate(table):
        last = number == len(table) - 1
        forward, both = (
            sum(values) / efficiency for values in zip(*(times[name] for name in stage.blocks), strict=True)
        )
        total = both + (PASSES[layout.recompute][last] - 3) * forward
        works.append(StageTime(0.0, total) if last else StageTime(forward, total - forward))
    return works


def update_parts(
    system: System,
    layout: Layout,
    table: Sequence[StageCost],
    storage: Storage,
    times: Mapping[str, BlockTime],
    efficiency: float,
) -> dict[str, float]:
    """Returns the seconds of an update by part, input excepted; see plan.py.

    Args:
        system: Where.
        layout: Replicas, stages and accumulation.
        table: The stages.
        storage: Bytes of numbers.
        times: Of the blocks at full efficiency.
        efficiency: Share of it that they reach.
    """
    timing = timetable(layout.schedule, layout.stages, layout.accumulation)
    works = stage_works(layout, table, times, efficiency)
    busy, ticks = walk(timing, works), len(timing.forward)
    compute = layout.accumulation * max(sum(work) for work in works)
    most, bandwidth = max(stage.parameters for stage in table), system.device.bandwidth
    state = 2 * (storage.master + storage.buffers * storage.state + 4 * storage.averages)
    return {
        'compute': compute,
        'bubble': max(busy - compute, 0.0),  # not -1e-17
        'hand-over': ticks * _hand_over(system.links[0], table),
        'accumulation': ticks * most * 3 * storage.accumulator / bandwidth,
        'reduction': reduction(system.links, layout, most * storage.accumulator),
        'optimizer': most * (storage.accumulator + state) / bandwidth,
    }


def _hand_over(link: Link, table: Sequence[StageCost]) -> float:
    if len(table) == 1:
        return 0.0
    return link.latency + max(stage.sent for stage in table) / link.bandwidth


def reduction(links: Sequence[Link], layout: Layout, size: float) -> float:
    """Returns the seconds of summing `size` bytes over all replicas, ring by ring up the levels of a network."""
    seconds, joined = 0.0, 1
    for link in links:
        group = min(max(link.devices // layout.stages, 1), layout.replicas)
        ring = -(-group // joined)
        seconds += 2 * (ring - 1) * (link.latency + size / ring / link.bandwidth)
        size, joined = size / ring, joined * ring
    return seconds
