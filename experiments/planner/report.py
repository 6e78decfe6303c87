"""A plan as text, and the batch-size table of several."""

from collections.abc import Mapping, Sequence
from typing import Any

from efficientnet.parallel.stages import PASSES
from experiments.benchmark.setup import MIB, table
from experiments.planner.plan import Plan
from experiments.planner.workload import IMAGE_BYTES


def show(plan: Plan, calibrated: str) -> str:
    """Returns a plan as text.

    Args:
        plan: What to show.
        calibrated: Where its efficiency is from.
    """
    workload, system = plan.workload, plan.system
    lines = [
        f'{workload.model}, group size {workload.group_size}, {workload.pixels} pixels, {workload.policy}, '
        f'{workload.optimizer}, recompute {workload.recompute}',
        f'{system.title}: {_count(system.devices, "device")}, {_count(system.hosts, "host")}; {system.software.name}',
        f'efficiency {plan.efficiency:.1%}, calibrated on {calibrated}',
        '',
        batch_line(plan),
        '',
        _stages(plan),
        '',
        _memory(plan),
        '',
        _update(plan),
        '',
        *_results(plan),
    ]
    return '\n'.join(lines)


def measured(found: Mapping[str, Any]) -> str:
    """Returns what `measure.calibrate` found as text."""
    flags = found['flags']
    rows = [('block', 'forward', 'forward + backward')]
    rows += [(name, _time(forward), _time(both)) for name, (forward, both) in found['blocks'].items()]
    return '\n'.join(
        [
            f'{found["machine"]}: {found["flops"] / 1e9:,.0f} GFLOP/s a core, {found["bandwidth"] / 1e9:,.1f} GB/s',
            f'between two: {1e6 * found["latency"]:,.0f} µs, {found["link_bandwidth"] / 1e9:,.2f} GB/s',
            f'{flags["model"]}, {flags["image_size"]} pixels, {flags["micro_batch"]} × {flags["accumulation"]}: an '
            f'update takes {_time(found["update_seconds"])}, a micro-batch in',
            table(rows),
        ]
    )


def batch_line(plan: Plan) -> str:
    """Returns the global batch as its factors."""
    layout = plan.layout
    stages = f'{layout.stages} stages, {layout.schedule} schedule' if layout.stages > 1 else 'one stage'
    return (
        f'global batch {layout.global_batch:,} = micro-batch {layout.micro_batch} × {layout.replicas} replicas × '
        f'accumulation {layout.accumulation}; {stages}'
    )


def _stages(plan: Plan) -> str:
    rows = [('stage', 'from', 'to', 'parameters', 'MACs/image', 'work/micro-batch', 'sends')]
    for number, stage in enumerate(plan.stages):
        row = (f'{stage.parameters:,}', f'{stage.macs / 1e6:,.0f} M', _time(stage.work), f'{stage.sent / MIB:.2f} MiB')
        rows.append((str(number), stage.blocks[0], stage.blocks[-1], *row))
    return table(rows)


def _memory(plan: Plan) -> str:
    used = sum(plan.memory.values())
    rows = [('memory of the fullest device', 'MiB')]
    rows += [(f'  {part}', f'{size / MIB:,.1f}') for part, size in plan.memory.items()]
    rows.append(
        (f'all: {"fits" if plan.fits else "DOES NOT FIT"} the {plan.room / MIB:,.0f} for arrays', f'{used / MIB:,.1f}')
    )
    kinds = [('activations of the stage with most', 'MiB')]
    kinds += [(f'  recompute {kind}', f'{plan.activations[kind] / MIB:,.1f}') for kind in PASSES]
    return f'{table(rows)}\n\n{table(kinds)}'


def _update(plan: Plan) -> str:
    rows = [('an update', '', '')]
    whole = plan.update_seconds
    rows += [(f'  {part}', _time(value), f'{value / whole:.1%}') for part, value in plan.seconds.items()]
    return table([*rows, ('all', _time(whole), '100.0%')])


def _results(plan: Plan) -> list[str]:
    system, workload = plan.system, plan.workload
    sent = ', '.join(f'{plan.host_bandwidth(images) / 1e9:,.2f} GB/s as {images}' for images in IMAGE_BYTES)
    return [
        f'{plan.images_per_second:,.0f} images/s; {workload.epochs:g} epochs of {workload.examples:,} images: '
        f'{plan.hours:,.2f} hours',
        f'from the hosts: {sent}, of {system.host_bandwidth / 1e9:,.1f} that they can send; each reads and decodes '
        f'{plan.images_per_second / system.hosts:,.0f} images/s',
        f'limited by {plan.limited_by}{_waiting(plan)}',
        *([] if plan.fits else ['it does not fit: speed and hours are what they would be if it did']),
    ]


def _waiting(plan: Plan) -> str:
    if plan.limited_by != 'compute':
        return ''
    return f', {plan.memory_bound:.0%} of it in blocks that wait for memory rather than arithmetic'


def batch_table(plans: Sequence[Plan]) -> str:
    """Returns how the global batch is shared out on each system, the reference's batch-size table, as Markdown."""
    titles = (
        'system',
        'micro-batch',
        'stages',
        'replicas',
        'accumulation',
        'global batch',
        'bubble',
        'images/s',
        'hours',
    )
    rows = [titles, ('---',) * len(titles)]
    for plan in plans:
        layout = plan.layout
        sizes = (layout.micro_batch, layout.stages, layout.replicas, layout.accumulation, layout.global_batch)
        bubble, speed = plan.seconds['bubble'] / plan.update_seconds, round(plan.images_per_second, -2)
        title = plan.system.title if plan.fits else f'({plan.system.title})'
        rows.append((title, *map(str, sizes), f'{bubble:.1%}', f'{speed:,.0f}', f'{plan.hours:.2f}'))
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _count(number: int, thing: str) -> str:
    return f'{number:,} {thing}{"" if number == 1 else "s"}'


def _time(seconds: float) -> str:
    return f'{1000 * seconds:,.3f} ms' if seconds < 0.1 else f'{1000 * seconds:,.1f} ms'
