"""How much memory an update takes on a device, by stages and recomputation, as the compiler has planned it.

Every layout's update is compiled for as many virtual CPU devices as it has stages, and never run. What XLA plans
is of one device: all devices of a `pmap` run the same program, so the plan is that of the largest stage, and of
the work of every stage at that. Temporaries are what the program needs besides its arguments (weights, optimizer
state, the images of the device) and results; a state that is donated is counted once, among the arguments.

The accumulation count is 8 by default because a pipeline of 4 stages keeps up to 6 micro-batches at once (2 ·
(stages − 1)); with more it keeps no more, and only the uint8 images grow. XLA computes 16-bit numbers in fp32 on a
CPU and keeps some of them so, hence 32.32; on an accelerator 16.16 takes about half of what 32.32 does.
"""

import argparse
import concurrent.futures
import concurrent.futures.process
import itertools
import multiprocessing
import time
from collections.abc import Mapping
from typing import Any

from efficientnet.errors import ConfigError, RunError
from efficientnet.parallel.stages import PASSES
from experiments.benchmark.setup import (
    MIB,
    add_model_flags,
    check_flags,
    describe,
    make_config,
    progress,
    start_jax,
    table,
)

SIZES = ('temp', 'argument', 'output', 'alias')


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    add_model_flags(parser, model='b4', image_size=380, micro_batch=3, accumulation=8)
    parser.add_argument('--stages', default='1,2,4', help='numbers of stages (%(default)s)')
    parser.add_argument('--recompute', default=','.join(PASSES), help='kinds of recomputation (%(default)s)')


def run(args: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles each layout in turn and returns what it takes, in bytes a device.

    Raises:
        ConfigError: A flag is out of range.
        RunError: A compilation died.
    """
    check_flags(args)
    stages, kinds = parse_stages(args['stages']), parse_recompute(args['recompute'])
    layouts = []
    for count, recompute in itertools.product(stages, kinds):
        if count == 1 and recompute == 'stage' and 'none' in kinds:
            continue  # the one stage is the last, and that never computes again
        began = time.monotonic()
        layout = _in_process(measure, args, count, recompute)
        layouts.append(layout)
        took = time.monotonic() - began
        progress(f'stages {count}, recompute {recompute}: {layout["temp"] / MIB:,.0f} MiB temporary ({took:.0f} s)')
    return {'benchmark': 'memory', 'flags': dict(args), 'layouts': layouts}


def measure(args: Mapping[str, Any], stages: int, recompute: str) -> dict[str, Any]:
    """Returns the plan of one layout's update: its stages' first blocks and bytes a device."""
    start_jax(stages)
    from efficientnet.loop.assemble import assemble
    from efficientnet.loop.programs import compile_update

    parts = assemble(make_config(args, stages=stages, recompute=recompute))
    plan = compile_update(parts).memory_analysis()
    sizes = {name: getattr(plan, f'{name}_size_in_bytes') for name in SIZES}
    return {'stages': stages, 'recompute': recompute, 'splits': ','.join(parts.grid.layout.splits), **sizes}


def show(result: Mapping[str, Any]) -> str:
    """Returns two tables: temporaries by stages and recomputation, and everything a layout at a time."""
    layouts = result['layouts']
    temporary = {(layout['stages'], layout['recompute']): layout['temp'] for layout in layouts}
    kinds = list(dict.fromkeys(layout['recompute'] for layout in layouts))
    wide = [('temporary, MiB a device', *(f'recompute {kind}' for kind in kinds))]
    for stages in dict.fromkeys(layout['stages'] for layout in layouts):
        # One stage that is not computed again is the same under both names.
        found = [temporary.get((stages, kind), temporary.get((stages, 'none'))) for kind in kinds]
        wide.append((f'{stages} {"stage" if stages == 1 else "stages"}', *(_mib(value) for value in found)))
    long = [('layout, MiB a device', 'temporary', 'arguments', 'results', 'of them donated', 'splits')]
    for layout in layouts:
        name = f'{layout["stages"]} × {layout["recompute"]}'
        long.append((name, *(_mib(layout[size]) for size in SIZES), layout['splits'] or '-'))
    return '\n'.join([f'{describe(result["flags"])}: as planned by XLA', '', table(wide), '', table(long)])


def parse_stages(text: str) -> list[int]:
    """Reads '1,2,4'.

    Raises:
        ConfigError: It is not whole numbers above 0.
    """
    parts = [part.strip() for part in text.split(',')]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f'--stages={text!r} must be whole numbers above 0 with commas between them, such as 1,2,4')
    return [int(part) for part in parts]


def parse_recompute(text: str) -> list[str]:
    """Reads 'none,block,stage'.

    Raises:
        ConfigError: One of them is unknown.
    """
    kinds = [part.strip() for part in text.split(',')]
    for kind in kinds:
        if kind not in PASSES:
            raise ConfigError(f'--recompute={text!r}: {kind!r} is unknown; choose among {", ".join(PASSES)}')
    return kinds


def _in_process(function: Any, *given: Any) -> Any:
    """Calls a function in a process of its own: compiled code takes memory mappings, of which one has only so many."""
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(function, *given).result()
        except concurrent.futures.process.BrokenProcessPool:
            raise RunError(
                'the compiling process died, most likely of too little memory; try a smaller model'
            ) from None


def _mib(size: float) -> str:
    return f'{size / MIB:,.1f}'
