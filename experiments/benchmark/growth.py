"""How an update's time grows with its work, and what is spent beside the network.

One thing at a time is changed: micro-batch, accumulation count, image size, model. The ideal is the time of the update
that all four have in common, times the work: multiply-adds of the network, all images. It is the update that training
runs each time, and rounds go through all of them in turn, so that what else the machine does falls on all alike;
medians count. Each of the four has a process of its own: programs take memory mappings, of which one has only so many.

Beside the network there are the optimizer and the host. All that is done once an update, however many micro-batches it
has, optimizer, rounding, norms and the check whether all is finite, is measured alone in 32.32 and in 16.16 and given
as a share of the update of most micro-batches. The host's part is the time between updates in the loop that training
runs, which takes real batches from the input pipeline and reads metrics one update late. It is also compared with the
same update called again and again on one batch: on a CPU the input pipeline takes its time from the cores that compute.
The loop makes many more updates a round than the pipeline has batches ahead, which are thrown away: they were made
while others had their turns.

Updates have the convolutions that training would give them. Where oneDNN can be called it has those of images above
32 pixels and no others, so that points of one axis can differ in it; table and picture tell which do. Its programs
cannot be cached, and where there are any, every run compiles for minutes.
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from efficientnet.errors import ConfigError
from experiments.benchmark.host_input import AHEAD, take
from experiments.benchmark.setup import (
    add_model_flags,
    check_flags,
    describe,
    make_config,
    progress,
    random_batch,
    start_jax,
    table,
)
from experiments.benchmark.workers import Jobs, Worker, repeat

if TYPE_CHECKING:
    from efficientnet.loop.assemble import Parts

AXES = {  # flags that are changed one at a time, the flag with the values of each, and their default
    'micro_batch': ('micro_batches', '1,2,4,8,16'),
    'accumulation': ('accumulations', '1,2,4,8'),
    'image_size': ('image_sizes', '32,64,96,128'),
    'model': ('models', 'b0,b1,b2,b3'),
}
POLICIES = ('32.32', '16.16')  # that the optimizer is measured in
LOOPED = 4 * AHEAD  # updates of the training loop that are timed in a round
TARGETS = {'accumulation': 1.03, 'optimizer': 0.03, 'host': 0.01}  # the largest of each that will do


class Point(NamedTuple):
    """An update that is measured: a flag and its value, with all others as given."""

    flag: str
    value: Any

    def __str__(self) -> str:
        return f'{self.flag} {self.value}'


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    add_model_flags(parser, model='b0', image_size=64, micro_batch=8, accumulation=1)
    for name, (plural, values) in AXES.items():
        parser.add_argument(f'--{plural}', default=values, help=f'values that --{name} takes in turn (%(default)s)')
    parser.add_argument('--optimizer', default='lars', help="'lars', 'rmsprop' or 'sgd' (%(default)s)")
    parser.add_argument('--rounds', type=int, default=5, help='times that everything is measured (%(default)s)')
    parser.add_argument('--steps', type=int, default=3, help='updates a round (%(default)s)')
    parser.add_argument('--plot', type=pathlib.Path, help='picture to draw, such as growth.png')


def run(args: Mapping[str, Any]) -> dict[str, Any]:
    """Measures and returns seconds an update and how they compare with the work.

    Raises:
        ConfigError: A flag is out of range, or the picture cannot be written.
    """
    args = dict(args)
    plot = args.pop('plot', None)
    check_flags(args)
    if args['steps'] < 1:
        raise ConfigError(f'--steps={args["steps"]} must be at least 1')
    axes = {name: parse_values(name, args[plural]) for name, (plural, _) in AXES.items()}
    if plot and not plot.absolute().parent.is_dir():
        raise ConfigError(f'--plot={plot}: there is no folder {plot.parent}')
    workers, jobs, work, methods = [], {}, {}, {}
    try:
        for build, given in ((build_common, ()), *((build_points, (points(name, axes[name]),)) for name in axes)):
            workers.append(Worker(build, args, *given))
            found = workers[-1].answer()
            work |= found['work']
            methods |= found['methods']
            jobs |= dict.fromkeys(found['jobs'], workers[-1])
        progress(f'{args["rounds"]} rounds …')
        rounds = [{job: worker.run(job) for job, worker in jobs.items()} for _ in range(-1, args['rounds'])]
    finally:
        for worker in workers:
            worker.stop()
    updates = dict.fromkeys(jobs, args['steps']) | {'loop': LOOPED}
    seconds = {job: statistics.median(each[job][0] for each in rounds[1:]) / updates[job] for job in jobs}
    between = statistics.median(each['loop'][1] / each['loop'][0] for each in rounds[1:])
    result = summary(args, axes, seconds, between, work, methods)
    if plot:
        draw(result, plot)
    return result


def parse_values(name: str, text: str) -> list[Any]:
    """Reads the values of an axis.

    Raises:
        ConfigError: There are none, or numbers that are not above 0.
    """
    values = [part.strip() for part in text.split(',')]
    if name == 'model' and all(values):
        return values
    if not all(value.isdecimal() and int(value) for value in values):
        kind = 'names' if name == 'model' else 'whole numbers above 0'
        plural, example = AXES[name]
        raise ConfigError(f'--{plural}={text!r} must be {kind} with commas between them, such as {example}')
    return [int(value) for value in values]


def points(flag: str, values: Sequence[Any]) -> list[Point]:
    """Returns the updates of an axis."""
    return [Point(flag, value) for value in values]


def build_common(args: Mapping[str, Any]) -> tuple[Jobs, dict[str, Any]]:
    """The update that all axes have in common, the training loop with it, and the optimizer."""
    start_jax(1)
    import jax

    from experiments.benchmark.plain import make_weight_update

    progress('compiling what all have in common …')
    parts = _parts(args)
    start = jax.device_get(parts.init_state())
    jobs = {
        'common': _updates(parts, start, args['steps']),
        'loop': _loop(parts, start),
    }
    for policy in POLICIES:
        jobs[_optimizer_name(policy)] = repeat(make_weight_update(_parts(args, policy=policy)), args['steps'])
    return _ready(jobs), {'work': {'common': _work(parts)}, 'methods': {'common': parts.model.conv_method}}


def build_points(args: Mapping[str, Any], axis: Sequence[Point]) -> tuple[Jobs, dict[str, Any]]:
    """The updates of an axis; a job makes `--steps` of them."""
    start_jax(1)
    import jax

    jobs, work, methods = {}, {}, {}
    for point in axis:
        progress(f'compiling {point} …')
        parts = _parts(args, **{point.flag: point.value})
        jobs[str(point)] = _updates(parts, jax.device_get(parts.init_state()), args['steps'])
        work[str(point)], methods[str(point)] = _work(parts), parts.model.conv_method
    return _ready(jobs), {'work': work, 'methods': methods}


def summary(
    args: Mapping[str, Any],
    axes: Mapping[str, Sequence[Any]],
    seconds: Mapping[str, float],
    between: float,
    work: Mapping[str, float],
    methods: Mapping[str, str],
) -> dict[str, Any]:
    """Returns what the benchmark found.

    Args:
        args: The flags.
        axes: Values by flag.
        seconds: Of an update by job; of 'loop' with what the host does, of the others without.
        between: Share of the training loop's time in which no update runs.
        work: Multiply-adds of an update, by job.
        methods: Formulation of its convolutions, likewise.
    """
    common = seconds['common']
    rows = {
        flag: [
            {
                'value': value,
                'seconds': seconds[str(Point(flag, value))],
                'ideal': common * work[str(Point(flag, value))] / work['common'],
                'conv_method': methods[str(Point(flag, value))],
            }
            for value in values
        ]
        for flag, values in axes.items()
    }
    few, many = (choose(rows['accumulation'], key=lambda row: row['value']) for choose in (min, max))
    return {
        'benchmark': 'growth',
        'flags': dict(args),
        'seconds': common,
        'conv_method': methods['common'],
        'axes': rows,
        'accumulation': many['seconds'] / many['value'] / (few['seconds'] / few['value']),
        'optimizer_seconds': {policy: seconds[_optimizer_name(policy)] for policy in POLICIES},
        'optimizer': {policy: seconds[_optimizer_name(policy)] / many['seconds'] for policy in POLICIES},
        'host': between,
        'loop': seconds['loop'] / common,
    }


def show(result: Mapping[str, Any]) -> str:
    """Returns a table of all updates, and what is spent beside the network."""
    lines = [f'{describe(result["flags"])}: {1000 * result["seconds"]:,.1f} ms an update', '']
    table_rows = [('changed', 'ms an update', 'ideal', 'measured ÷ ideal', 'convolutions')]
    for flag, rows in result['axes'].items():
        for row in rows:
            numbers = (f'{1000 * row["seconds"]:,.1f}', f'{1000 * row["ideal"]:,.1f}')
            ratio = f'{row["seconds"] / row["ideal"]:.2f}'
            table_rows.append((f'{flag} {row["value"]}', *numbers, ratio, row['conv_method']))
    lines += [table(table_rows), '']
    counts = [row['value'] for row in result['axes']['accumulation']]
    what = f'time a micro-batch, {max(counts)} in an update ÷ {min(counts)}'
    lines.append(_verdict(what, f'{result["accumulation"]:.3f}', result['accumulation'], 'accumulation'))
    for policy, share in result['optimizer'].items():
        what = f'once an update in {policy}, of one with {max(counts)} micro-batches'
        text = f'{1000 * result["optimizer_seconds"][policy]:.1f} ms, {share:.1%}'
        lines.append(_verdict(what, text, share, 'optimizer'))
    lines.append(_verdict('time between updates in the training loop', f'{result["host"]:.2%}', result['host'], 'host'))
    lines.append(f'an update in the training loop ÷ one on a batch that is there: {result["loop"]:.3f}')
    return '\n'.join(lines)


def draw(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws a chart an axis: measured times and the ideal line; rings where convolutions are not the common update's.

    Raises:
        ConfigError: The picture cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure, common = Figure(figsize=(9, 6), layout='constrained'), result['conv_method']
    for axes, (flag, rows) in zip(figure.subplots(2, 2).flat, result['axes'].items(), strict=True):
        values = [row['value'] for row in rows]
        places = range(len(values)) if flag == 'model' else values
        axes.plot(places, [1000 * row['ideal'] for row in rows], '.--', color='tab:gray', label='ideal')
        axes.plot(places, [1000 * row['seconds'] for row in rows], 'o-', color='tab:blue', label='measured')
        others = [(place, row) for place, row in zip(places, rows, strict=True) if row['conv_method'] != common]
        if others:
            rings = {'color': 'tab:blue', 'markerfacecolor': 'white', 'label': 'with other convolutions'}
            axes.plot([place for place, _ in others], [1000 * row['seconds'] for _, row in others], 'o', **rings)
        axes.set_yscale('log', base=2)
        if flag != 'model':
            axes.set_xscale('log', base=2)
        axes.set_xticks(places, values)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
        axes.yaxis.set_major_formatter(lambda value, _: f'{value:,.0f}' if value >= 10 else f'{value:.3g}')
        axes.set(xlabel=flag.replace('_', ' '), ylabel='ms an update')
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(describe(result['flags']), fontsize=10)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise ConfigError(f'--plot={path} cannot be written: {error}') from None


def _parts(args: Mapping[str, Any], **changes: Any) -> 'Parts':
    from efficientnet.loop.assemble import assemble

    config = make_config({**args, **changes})
    config.optimizer.name = args['optimizer']
    return assemble(config)


def _ready(jobs: Jobs) -> Jobs:
    """Runs each job once, so that everything is compiled."""
    for job in jobs.values():
        job()
    return jobs


def _updates(parts: 'Parts', start: Any, steps: int) -> Callable[[], None]:
    """Some weight updates on one batch of noise."""
    import jax

    from efficientnet.loop.programs import compile_update

    grid, update = parts.grid, compile_update(parts)
    state, flag, batch = grid.place(start), grid.flag(False), grid.shard(random_batch(parts))

    def job() -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = update(state, batch, flag)
        jax.block_until_ready((state, metrics))

    return job


def _loop(parts: 'Parts', start: Any) -> Callable[[], tuple[float, float]]:
    """`LOOPED` weight updates as the training loop makes them; the job answers in seconds, all and between updates."""
    import jax

    from efficientnet.loop.programs import compile_update
    from efficientnet.parallel.update import read_metrics

    grid, update = parts.grid, compile_update(parts)
    state, flag = grid.place(start), grid.flag(False)
    batches = grid.prefetch(parts.train_batches(0), parts.config.input.prefetch)

    def job() -> tuple[float, float]:
        nonlocal state
        take(batches, AHEAD)
        # The first has to wait for a batch, however fast they come, now that none is ready.
        state, waiting = jax.block_until_ready(update(state, next(batches), flag))
        updating, began = 0.0, time.perf_counter()
        for _ in range(LOOPED):
            batch = next(batches)
            called = time.perf_counter()
            state, metrics = jax.block_until_ready(update(state, batch, flag))
            updating += time.perf_counter() - called
            del batch
            read_metrics(waiting)
            waiting = metrics
        jax.block_until_ready((state, waiting))
        seconds = time.perf_counter() - began
        return seconds, seconds - updating

    return job


def _work(parts: 'Parts') -> float:
    """Multiply-adds of the network for a global batch."""
    from efficientnet.model.costs import block_costs

    costs = block_costs(parts.model.spec, parts.config.image_size, norm=parts.config.model.norm)
    return float(parts.grid.layout.global_batch * sum(block.macs for block in costs))


def _optimizer_name(policy: str) -> str:
    return f'optimizer {policy}'


def _verdict(what: str, text: str, value: float, target: str) -> str:
    most = TARGETS[target]
    limit = f'{most:.0%}' if most < 1 else f'{most:.2f}'
    return f'{what}: {text} (target {limit}, {"met" if value <= most else "missed"})'
