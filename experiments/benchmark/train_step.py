"""A weight update, or an evaluation, beside that of timm in PyTorch or of XLA's own grouped convolution.

Both sides run in one go on one machine, each in a process of its own and never at the same time: rounds alternate
between them, the side that goes first too, and the ratio is the median of the rounds' ratios. Ours is the update that
training runs, from uint8 images to rounded weights; theirs is forward, cross-entropy, backward and SGD with momentum
on fp32 images that are ready (`autocast` and channels_last where the policy is 16 bits or there is a GPU; on a CPU
in fp32 NCHW is the faster). The architecture is the same, and so are the numbers of parameters, or it is an error.

Peak memory is what a side's process holds at most while it is measured, less what it held after its imports; on a
GPU what the device's allocator held. FLOP/s are two a multiply-add of the network, three times for a training step
whatever the formulation really does, given as a share of what a matrix product of this machine reaches. Bytes are
counted from the network as well, as if every layer ran by itself, read its tensors from memory and wrote them there
(sides.least_bytes), given as a share of what a large copy moves: who moves more is slower, who fuses or finds things
in the cache moves less.
"""

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

from efficientnet.errors import ConfigError
from experiments.benchmark import sides
from experiments.benchmark.setup import MIB, add_model_flags, check_flags, describe, progress, table
from experiments.benchmark.sides import LAYER_CALLS
from experiments.benchmark.workers import Worker

AGAINST = ('timm', 'timm-compile', 'native', 'none')
MODES = ('train', 'evaluate')
CHOICES = {'against': AGAINST, 'mode': MODES, 'recompute': ('none', 'block'), 'device': ('cpu', 'gpu')}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    add_model_flags(parser, model='b0', image_size=128, micro_batch=8, accumulation=1)
    parser.add_argument('--batch', type=int, default=argparse.SUPPRESS, help='the same as --micro_batch')
    parser.add_argument('--norm', default='group', help="'group' or 'batch' (%(default)s)")
    parser.add_argument('--optimizer', default='sgd', help="ours: 'sgd', 'lars' or 'rmsprop' (%(default)s)")
    parser.add_argument('--recompute', default='none', help="ours: 'none' or 'block' (%(default)s)")
    parser.add_argument(
        '--conv_method', default='auto', help='ours: formulation of the spatial convolutions (%(default)s)'
    )
    parser.add_argument('--against', default='timm', help=f'{", ".join(AGAINST)} (%(default)s)')
    parser.add_argument('--mode', default='train', help=f'{" or ".join(MODES)} (%(default)s)')
    parser.add_argument('--rounds', type=int, default=7, help='times that each side is measured (%(default)s)')
    parser.add_argument('--steps', type=int, default=5, help='updates or evaluations a round (%(default)s)')
    parser.add_argument('--device', default='cpu', help="'cpu' or 'gpu' (%(default)s)")
    parser.add_argument('--layers', action='store_true', help='measure layer by layer as well')


def run(args: Mapping[str, Any]) -> dict[str, Any]:
    """Measures both sides.

    Raises:
        ConfigError: A flag is out of range, or the two architectures differ.
        RunError: PyTorch or timm are missing, or a process died.
    """
    check_flags(args)
    args = dict(args)
    args['micro_batch'] = args.pop('batch', args['micro_batch'])
    for name, known in CHOICES.items():
        if args[name] not in known:
            raise ConfigError(f'--{name}={args[name]!r} must be one of {", ".join(known)}')
    if args['steps'] < 1:
        raise ConfigError(f'--steps={args["steps"]} must be at least 1')
    if args['mode'] == 'evaluate' and args['accumulation'] != 1:
        raise ConfigError(f'--accumulation={args["accumulation"]} means nothing to --mode=evaluate; leave it out')
    native = ('native', 'auto') if args['device'] == 'gpu' else ('native',)  # --conv_method with which ours is as well
    if args['against'] == 'native' and args['conv_method'] in native:
        raise ConfigError(
            f'--against=native is what --conv_method={args["conv_method"]} is with --device={args["device"]}: '
            'give another --conv_method, or compare with timm'
        )
    names = ['ours'] if args['against'] == 'none' else ['ours', args['against']]
    progress('measuring a matrix product and a copy …')
    peaks, workers, found = sides.measure_peaks(args), {}, {}
    try:
        for name in names:
            progress(f'{name}: compiling …')
            workers[name], found[name] = sides.start(name, args)
        parameters = {name: side['parameters'] for name, side in found.items()}
        if len(set(parameters.values())) > 1:
            raise ConfigError(f'the architectures differ: {parameters} parameters')
        progress(f'{args["rounds"]} rounds …')
        seconds = _alternate(workers, 'step', args['rounds'])
        memory = {name: worker.run('peak') for name, worker in workers.items()}
        layers = _measure_layers(workers, found, args['rounds']) if args['layers'] else []
    finally:
        for worker in workers.values():
            worker.stop()
    return summary(args, found, peaks, seconds, memory) | {'layers': layers}


def summary(
    args: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Any]],
    peaks: Mapping[str, float],
    seconds: Mapping[str, list[float]],
    memory: Mapping[str, int],
) -> dict[str, Any]:
    """Returns what the benchmark found, by side; `ratio` is how many times as fast ours is.

    Args:
        args: The flags.
        found: What each side said of itself.
        peaks: FLOP/s and bytes a second that the device reaches, of `sides.measure_peaks`.
        seconds: Of each round's steps, by side.
        memory: Peak bytes, by side.
    """
    images = args['micro_batch'] * args['accumulation'] * args['steps']
    rates = {name: images / statistics.median(values) for name, values in seconds.items()}
    ours = found['ours']
    other = next((name for name in seconds if name != 'ours'), None)
    ratios = [theirs / mine for theirs, mine in zip(seconds[other], seconds['ours'], strict=True)] if other else []
    passes = 3 if args['mode'] == 'train' else 1
    flops = {name: 2 * passes * ours['macs'] * rate for name, rate in rates.items()}
    steps = {name: statistics.median(values) / args['steps'] for name, values in seconds.items()}
    moved = {name: ours['bytes'] / seconds for name, seconds in steps.items()}
    return {
        'benchmark': 'train_step',
        'flags': dict(args),
        'parameters': ours['parameters'],
        'images_per_second': rates,
        'ratio': statistics.median(ratios) if ratios else None,
        'ratio_range': [min(ratios), max(ratios)] if ratios else None,
        'compile_seconds': {name: side['compile_seconds'] for name, side in found.items()},
        'cached_compile_seconds': ours['cached_compile_seconds'],
        'peak_bytes': dict(memory),
        'flops_per_second': flops,
        'flops_share': {name: value / peaks['peak_flops'] for name, value in flops.items()},
        'bytes_per_second': moved,
        'bandwidth_share': {name: value / peaks['peak_bandwidth'] for name, value in moved.items()},
        'machine': {'device': ours['device'], **peaks},
    }


def show(result: Mapping[str, Any]) -> str:
    """Returns a table of the sides, and one of the layers if they were measured."""
    args, machine = result['flags'], result['machine']
    rows = [('', 'images/s', 'compiling, s', 'peak MiB', 'GFLOP/s', 'of a matrix product', 'GB/s', 'of a copy')]
    for name, rate in result['images_per_second'].items():
        rows.append(
            (
                name,
                f'{rate:,.1f}',
                f'{result["compile_seconds"][name]:.1f}',
                f'{result["peak_bytes"][name] / MIB:,.0f}',
                f'{result["flops_per_second"][name] / 1e9:,.0f}',
                f'{result["flops_share"][name]:.0%}',
                f'{result["bytes_per_second"][name] / 1e9:.1f}',
                f'{result["bandwidth_share"][name]:.0%}',
            )
        )
    work = args['mode'] if args['mode'] != 'train' else f'train, recompute {args["recompute"]}'
    lines = [
        f'{describe(args)}, norm {args["norm"]}, convolutions {args["conv_method"]}, {work}, '
        f'{result["parameters"]:,} parameters, {args["rounds"]} rounds of {args["steps"]}',
        f'{machine["device"]}: a matrix product reaches {machine["peak_flops"] / 1e9:,.0f} GFLOP/s, '
        f'a copy {machine["peak_bandwidth"] / 1e9:,.1f} GB/s',
        '',
        table(rows),
        '',
    ]
    if result['ratio'] is not None:
        low, high = result['ratio_range']
        lines.append(f'ours ÷ {args["against"]}: {result["ratio"]:.3f} (rounds {low:.3f} to {high:.3f})')
    cached = result['cached_compile_seconds']
    again = 'anew in every process' if cached is None else f'in {cached:.1f} s from the cache'
    lines.append(f'ours compiles {again}')
    if result['layers']:
        lines += ['', table(_layer_rows(result['layers']))]
    return '\n'.join(lines)


def _alternate(workers: Mapping[str, Worker], job: str, rounds: int) -> dict[str, list[float]]:
    """Wall-clock seconds of a job by side, one a round; the first of each side warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for worker in workers.values():
        worker.run(job)
        worker.run('reset')
    for number in range(rounds):
        for name in list(workers)[:: 1 if number % 2 else -1]:
            seconds[name].append(workers[name].run(job)[0])
    return seconds


def _measure_layers(workers: Mapping[str, Worker], found: Mapping[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Median seconds of each distinct layer there and back, by side."""
    rows = []
    for layer in found['ours']['layers']:
        seconds = _alternate(workers, layer, rounds)
        medians = {name: statistics.median(values) / LAYER_CALLS for name, values in seconds.items()}
        rows.append({'layer': layer} | medians)
    return rows


def _layer_rows(layers: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    names = [name for name in layers[0] if name != 'layer']
    rows = [('forward + backward, ms', *names, *('ratio' for _ in names[1:]))]
    for row in layers:
        ratio = [f'{row[name] / row["ours"]:.2f}' for name in names[1:]]
        rows.append((row['layer'], *(f'{1000 * row[name]:.3f}' for name in names), *ratio))
    return rows
