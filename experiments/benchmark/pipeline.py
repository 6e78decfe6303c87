"""How close a pipelined update comes to its ideal time, and one stage to a train step written plainly.

Every stage of the pipeline is a CPU device with one thread, in a process of its own: the devices of one process
share its threads, and a stage that rests would lend its own to the others. In one more such process run the same
update in one stage, a train step as one would write it without any of this, and each stage's forward and forward +
backward by itself: no hand-over, no stash, no choice of branch. Rounds alternate between all of them and medians
count, so that what else the machine does falls on all alike. Cores share a clock and a memory, and are slower when
all work, as they do in the pipeline; so as many processes as stages do each part at once, and a line tells how much
longer the update in one stage takes that way than alone.

The ideal time is a walk along the timetable (efficientnet/parallel/pipeline.py) in which every tick takes as long as
the slowest of its stages does by itself, and the time of what is done once an update for the largest stage. Its parts
add up:

- the network there and back, shared out evenly over the stages;
- forward again: what stages before the last recompute, likewise;
- imbalance: how much longer the slowest stage takes than the mean;
- bubble: ticks in which the slowest stage rests, filling and draining;
- optimizer: it, rounding, norms and the check whether all is finite, once an update.

It needs as many idle cores as stages: beside other work the pipeline, which needs all of them at once, looks worse
than it is. The last lines say what share of a core the one-device process got, and compare one stage with the plain
step in processor time, which other work hardly changes. Hand-over between processes is dearer than within one,
some 2 ms a tick, so ticks should take much longer than that. Compiling takes minutes: in the first run or, where
convolutions are oneDNN's (efficientnet/model/onednn.py), whose programs cannot be cached, in every process of every
run.
"""

import argparse
import socket
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import numpy as np

from efficientnet.errors import ConfigError
from efficientnet.parallel.pipeline import NONE, Timetable, timetable
from experiments.benchmark.setup import (
    add_model_flags,
    check_flags,
    describe,
    machine_name,
    make_config,
    progress,
    random_batch,
    start_jax,
    table,
)
from experiments.benchmark.workers import Jobs, Worker, repeat

if TYPE_CHECKING:
    from efficientnet.loop.assemble import Parts

UPDATES = ('pipeline', 'one_stage', 'plain')
TARGETS = {'pipeline': 1.15, 'one_stage': 1.02}  # measured ÷ ideal; one stage ÷ plain step
IDLE = 0.95  # of a core; below, something else ran on the machine


class StageTime(NamedTuple):
    """What one stage does with a micro-batch, in seconds."""

    forward: float  # in the tick of its forward
    backward: float  # in the tick of its backward


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    add_model_flags(parser, model='b0', image_size=128, micro_batch=8, accumulation=8)
    parser.add_argument('--stages', type=int, default=2, help='devices of the pipeline (%(default)s)')
    parser.add_argument('--splits', default='auto', help="first block of every stage but the first, or 'auto'")
    parser.add_argument('--recompute', default='stage', help="'none', 'block' or 'stage' (%(default)s)")
    parser.add_argument('--rounds', type=int, default=10, help='times that everything is measured (%(default)s)')


def run(args: Mapping[str, Any]) -> dict[str, Any]:
    """Measures and returns seconds and ratios.

    Raises:
        ConfigError: A flag is out of range.
    """
    check_flags(args)
    if args['stages'] < 2:
        raise ConfigError(f'--stages={args["stages"]} must be at least 2; one stage is measured beside them')
    stages = args['stages']
    progress('compiling …')
    with socket.socket() as free:
        free.bind(('localhost', 0))
        meeting = f'localhost:{free.getsockname()[1]}'
    workers = [Worker(build_stage, args, meeting, stage) for stage in range(stages)]
    try:
        pipelined = list(workers)
        workers.append(Worker(build_single, args))
        *_, found = [worker.answer() for worker in workers]
        # After the first, which leaves them what it compiled where that can be cached.
        workers += [Worker(build_single, args) for _ in range(stages - 1)]
        singles = workers[stages:]
        for worker in singles[1:]:
            worker.answer()
        turns = {'pipeline': (measure, pipelined, 'pipeline')}
        turns |= {name: (measure, singles[:1], name) for name in ('one_stage', 'plain')}
        turns |= {name: (measure_together, singles, name) for name in found['jobs'] if name not in UPDATES}
        turns['one_stage_together'] = (measure_together, singles, 'one_stage')
        progress(f'splits {found["splits"]!r}; {args["rounds"]} rounds …')
        samples: dict[str, list[Sample]] = {name: [] for name in turns}
        for number in range(-1, args['rounds']):  # the one before the first warms up
            for name, (how, sharing, job) in turns.items():
                sample = how(sharing, job)
                if number >= 0:
                    samples[name].append(sample)
    finally:
        for worker in reversed(workers):  # the first is where the others report to
            worker.stop()
    return summary(args, samples, found['splits'], found['rows'])


class Sample(NamedTuple):
    """One measurement of a job: wall-clock seconds, and processor seconds of all processes that took part."""

    wall: float
    core: float


def measure(workers: Sequence['Worker'], name: str) -> Sample:
    """Runs a job once, in all processes that share it."""
    for worker in workers:
        worker.send(name)
    walls, cores = zip(*(worker.answer() for worker in workers), strict=True)
    return Sample(max(walls), sum(cores))


def measure_together(workers: Sequence['Worker'], name: str) -> Sample:
    """Runs a job in all processes at once, each for itself, and returns the mean of what it took them."""
    for worker in workers:
        worker.send(name)
    walls, cores = zip(*(worker.answer() for worker in workers), strict=True)
    return Sample(statistics.mean(walls), statistics.mean(cores))


def build_stage(args: Mapping[str, Any], meeting: str, stage: int) -> tuple[Jobs, dict[str, Any]]:
    """The pipelined update, of which this process runs one stage."""
    start_jax(1, threads=False)
    import jax

    jax.distributed.initialize(meeting, num_processes=args['stages'], process_id=stage)
    return {'pipeline': _update_job(_assemble_pipelined(args), stage)}, {}


def build_single(args: Mapping[str, Any]) -> tuple[Jobs, dict[str, Any]]:
    """What runs on one device: the update in one stage, the plain step, the stages' parts and the optimizer."""
    start_jax(1, threads=False)
    import jax

    from efficientnet.loop.assemble import assemble
    from experiments.benchmark import plain

    pipelined, parts = _assemble_pipelined(args), assemble(make_config(args, recompute=args['recompute']))
    batch = jax.tree.map(jax.numpy.asarray, random_batch(parts))
    jobs = {'one_stage': _update_job(parts, 0), 'plain': plain.make_step(parts, batch)}
    jobs |= plain.make_stages(pipelined, parts.init_variables(), batch)
    jobs['optimizer'] = repeat(plain.make_weight_update(parts), args['accumulation'])
    for job in jobs.values():
        job()  # compiles what is not compiled yet
    rows = [part.shape[0] for part in pipelined.packings.params.parts]
    return jobs, {'splits': ','.join(pipelined.grid.layout.splits), 'rows': rows}


def summary(
    args: Mapping[str, Any], samples: Mapping[str, Sequence[Sample]], splits: str, rows: Sequence[int]
) -> dict[str, Any]:
    """Returns what the benchmark found.

    Args:
        args: The flags.
        samples: By job, one a round; jobs other than updates did their work `accumulation` times.
        splits: First block of every stage but the first.
        rows: Of each stage's packed weights.
    """
    count, stages = args['accumulation'], args['stages']
    walls = {name: [sample.wall for sample in found] for name, found in samples.items()}
    cores = {name: statistics.median(sample.core for sample in found) for name, found in samples.items()}
    times = {name: statistics.median(values) for name, values in walls.items()}
    timing = timetable(args['schedule'], stages, count)
    last = stages - 1
    forward = [times[f'forward_{stage}'] / count for stage in range(last)] + [0.0]
    both = [times[f'both_{stage}'] / count for stage in range(stages)]
    works = [stage_time(forward[n], both[n], args['recompute'], last=n == last) for n in range(stages)]
    parts = ideal_parts(timing, works, both)
    parts['optimizer'] = times['optimizer'] / count * max(rows) / sum(rows)
    ideal, ticks = sum(parts.values()), len(timing.forward)
    return {
        'benchmark': 'pipeline',
        'machine': machine_name(),
        'flags': dict(args),
        'splits': splits,
        'seconds': {name: times[name] for name in UPDATES},
        'range': {name: [min(walls[name]), max(walls[name])] for name in UPDATES},
        'forward': forward[:-1],
        'both': both,
        'works': [list(each) for each in works],
        'ideal_parts': parts,
        'ideal': ideal,
        'ticks': ticks,
        'blind_ideal': times['one_stage'] / stages * ticks / count,
        'pipeline_to_ideal': times['pipeline'] / ideal,
        'one_stage_to_plain': times['one_stage'] / times['plain'],
        'speedup': times['one_stage'] / times['pipeline'],
        'together_to_alone': times['one_stage_together'] / times['one_stage'],
        'core_one_stage_to_plain': cores['one_stage'] / cores['plain'],
        'core_share': cores['one_stage'] / times['one_stage'],
    }


def stage_time(forward: float, both: float, recompute: str, *, last: bool) -> StageTime:
    """Returns what a stage does with a micro-batch and when.

    Args:
        forward: Seconds of its forward alone.
        both: Seconds of its forward and backward.
        recompute: Under 'none' the backward uses what the forward kept; otherwise it goes forward once more.
        last: Whether it is the last stage, which does everything at once.
    """
    if last:
        return StageTime(0.0, both)
    return StageTime(forward, both - forward if recompute == 'none' else both)


def walk(timing: Timetable, works: Sequence[StageTime]) -> float:
    """Returns the seconds of a timetable whose every tick lasts as long as the slowest stage is at work in it."""
    forward, backward = np.array(works).T
    return float(((timing.forward != NONE) * forward + (timing.backward != NONE) * backward).max(axis=1).sum())


def ideal_parts(timing: Timetable, works: Sequence[StageTime], both: Sequence[float]) -> dict[str, float]:
    """Returns what the walk consists of, in seconds of an update; see the module's docstring.

    Args:
        timing: Of the update.
        works: Of the stages.
        both: Seconds of each stage's forward and backward, nothing computed twice.
    """
    stages, count = len(works), int(timing.forward.max()) + 1
    loads = [sum(each) for each in works]
    return {
        'network': count * sum(both) / stages,
        'forward again': count * (sum(loads) - sum(both)) / stages,
        'imbalance': count * (max(loads) - sum(loads) / stages),
        'bubble': walk(timing, works) - count * max(loads),
    }


def show(result: Mapping[str, Any]) -> str:
    """Returns the stages, where an update's time goes, and the two ratios."""
    args, seconds = result['flags'], result['seconds']
    stages = args['stages']
    lines = [
        f'{describe(args)}',
        f'{stages} stages, splits {result["splits"]!r}, {args["schedule"]} schedule ({result["ticks"]} ticks), '
        f'recompute {args["recompute"]}; medians of {args["rounds"]} rounds',
        '',
    ]
    rows = [('a micro-batch in one stage', 'forward', 'forward + backward', 'both ticks')]
    for stage, (both, load) in enumerate(zip(result['both'], result['works'], strict=True)):
        forward = _ms(result['forward'][stage]) if stage < stages - 1 else '-'
        rows.append((f'stage {stage}', forward, _ms(both), _ms(sum(load))))
    lines += [table(rows), '']
    rows = [('an update', '', 'of ideal')]
    rows += [
        (f'  {name}', _ms(value), f'{value / result["ideal"]:.1%}') for name, value in result['ideal_parts'].items()
    ]
    for name, value in (
        ('ideal', result['ideal']),
        (f'measured, {stages} stages', seconds['pipeline']),
        ('measured, one stage', seconds['one_stage']),
        (f'one stage ÷ {stages}', seconds['one_stage'] / stages),
        (f'one stage ÷ {stages} × {result["ticks"]} ticks ÷ {args["accumulation"]}', result['blind_ideal']),
        ('measured, plain step', seconds['plain']),
    ):
        rows.append((name, _ms(value), f'{value / result["ideal"]:.1%}'))
    lines += [table(rows), '']
    lines.append(_verdict(f'{stages} stages ÷ ideal', result['pipeline_to_ideal'], TARGETS['pipeline']))
    lines.append(_verdict('one stage ÷ plain step', result['one_stage_to_plain'], TARGETS['one_stage']))
    lines.append(f'{stages} stages are {result["speedup"]:.2f} × as fast as one')
    lines.append(f'one stage takes {result["together_to_alone"]:.2f} × as long while {stages} cores do the same')
    share = result['core_share']
    busy = '' if share >= IDLE else '; the machine was busy with something else, wall-clock times say little'
    lines.append(f'the one-device process had {share:.0%} of a core{busy}')
    lines.append(f'one stage ÷ plain step in processor time: {result["core_one_stage_to_plain"]:.3f}')
    return '\n'.join(lines)


def _assemble_pipelined(args: Mapping[str, Any]) -> 'Parts':
    """Assembles the pipelined run in a process that has only one of its devices."""
    import jax

    from efficientnet.loop import assemble
    from experiments.benchmark.spread import SpreadGrid

    config = make_config(args, stages=args['stages'], splits=args['splits'], recompute=args['recompute'])
    everywhere = {'device_count': lambda: args['stages'], 'process_count': lambda: 1, 'process_index': lambda: 0}
    with mock.patch.multiple(jax, **everywhere), mock.patch.object(assemble, 'Grid', SpreadGrid):
        return assemble.assemble(config)


def _update_job(parts: 'Parts', stage: int) -> Callable[[], None]:
    """One weight update, as training runs it, with one stage of it in this process."""
    import jax

    from efficientnet.loop.programs import compile_update

    grid, stages, rows = parts.grid, parts.grid.layout.stages, parts.grid.layout.rows
    share = -(-rows // stages)

    def own(shares: np.ndarray) -> np.ndarray:
        return shares[stage : stage + 1]

    def split(rows_: np.ndarray) -> np.ndarray:
        filled = np.pad(rows_, ((0, share * stages - rows), *[(0, 0)] * (rows_.ndim - 1)))
        return own(filled.reshape(stages, share, *rows_.shape[1:]))

    program, going_on = compile_update(parts), grid.flag(False)
    batch = grid.place(jax.tree.map(split, random_batch(parts)))
    state = grid.place(jax.tree.map(own, jax.device_get(parts.init_state())))

    def job() -> None:
        nonlocal state
        state, metrics = program(state, batch, going_on)
        jax.block_until_ready((state, metrics))

    return job  # not run yet: the stages find each other at the first collective, which does not wait for compilers


def _verdict(name: str, ratio: float, target: float) -> str:
    return f'{name}: {ratio:.3f} (target {target:.2f}, {"met" if ratio <= target else "missed"})'


def _ms(seconds: float) -> str:
    return f'{1000 * seconds:,.1f} ms'
