"""What the planner has to know of the machine it runs on, measured in one process and thread a device.

  python -m experiments.planner --calibrate

times an update in one stage, each block of the network by itself, the machine's arithmetic and memory, and what it
takes two devices to hand something to each other, and writes a file from which `--system=this_machine` plans. Devices
are processes for the reason that experiments/benchmark/pipeline.py gives, whose parts do the measuring.
"""

import datetime
import json
import os
import pathlib
import socket
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from efficientnet.errors import ConfigError
from efficientnet.model.scaling import block_names, model_spec
from experiments.benchmark.pipeline import Sample, build_single, measure
from experiments.benchmark.setup import machine_name, progress, start_jax
from experiments.benchmark.workers import Jobs, Worker
from experiments.planner.calibration import BLOCK_FLAGS
from experiments.trainer import check_file

FLAGS = {  # of the update and its blocks; small enough for a core, 32.32 because a CPU computes 16 bits in fp32
    'model': 'b0',
    'group_size': 16,
    'width': 0.0,
    'depth': 0.0,
    'image_size': 96,
    'micro_batch': 4,
    'accumulation': 8,
    'policy': '32.32',
    'schedule': 'grouped',
    'recompute': 'stage',
}
ROUNDS = 6
SIDE = 2048  # of the matrices multiplied
NUMBERS = 2**25  # fp32, of the array copied: more than a cache holds
SENT = 2**20  # fp32, of the large message
TIMES = 50  # that a message is sent in one program


def calibrate(path: pathlib.Path) -> dict[str, Any]:
    """Measures this machine, writes what it found as JSON and returns it.

    Args:
        path: Of the file.

    Raises:
        ConfigError: The file cannot be written.
        RunError: A measuring process died.
    """
    check_file('machine', path)
    scale = {name: FLAGS[name] or None for name in ('width', 'depth')}
    names = block_names(model_spec(FLAGS['model'], group_size=FLAGS['group_size'], **scale))
    every = FLAGS | {'stages': len(names), 'splits': ','.join(names[1:])}
    progress('compiling …')
    with socket.socket() as free:
        free.bind(('localhost', 0))
        meeting = f'localhost:{free.getsockname()[1]}'
    pair = [Worker(build_exchange, meeting, number) for number in range(2)]
    single, machine = Worker(build_single, every), Worker(build_machine)
    workers = [*pair, single, machine]
    try:
        for worker in pair:
            worker.answer()
        jobs = {name: [single] for name in single.answer()['jobs'] if name not in ('plain', 'optimizer')}
        jobs |= {name: [machine] for name in machine.answer()['jobs']}
        jobs |= {'small': pair, 'large': pair}
        progress(f'{ROUNDS} rounds …')
        samples: dict[str, list[Sample]] = {name: [] for name in jobs}
        for number in range(-1, ROUNDS):  # the one before the first warms up
            for name, sharing in jobs.items():
                sample = measure(sharing, name)
                if number >= 0:
                    samples[name].append(sample)
    finally:
        for worker in reversed(workers):  # the first is where the others report to
            worker.stop()
    found = summary({name: typical(values, alone=len(jobs[name]) == 1) for name, values in samples.items()}, names)
    try:
        path.write_text(json.dumps(found, indent=1) + '\n')
    except OSError as error:
        raise ConfigError(f'--machine={path} cannot be written: {error.strerror}') from None
    return found


def typical(samples: Sequence[Sample], *, alone: bool) -> float:
    """Returns what a job takes on an idle machine, in seconds.

    Args:
        samples: Of several rounds.
        alone: Whether it is one process of one thread, whose processor time other work hardly changes; of what two
            processes do together the quickest round tells most.
    """
    if alone:
        return statistics.median(sample.core for sample in samples)
    return min(sample.wall for sample in samples)


def summary(seconds: Mapping[str, float], names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the file's content.

    Args:
        seconds: By job.
        names: Of the blocks.
    """
    count, last = FLAGS['accumulation'], len(names) - 1
    blocks = {}
    for number, name in enumerate(names):
        both = seconds[f'both_{number}'] / count
        # The last block goes forward and back at once; a third of that is taken to be forward.
        blocks[name] = [seconds[f'forward_{number}'] / count if number < last else both / 3, both]
    small, large = seconds['small'] / TIMES, seconds['large'] / TIMES
    return {
        'date': datetime.date.today().isoformat(),
        'machine': machine_name(),
        'flags': {name: FLAGS[name] for name in (*BLOCK_FLAGS, 'accumulation', 'recompute')},
        'devices': os.cpu_count(),
        'memory': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
        'flops': 2 * SIDE**3 / seconds['multiply'],
        'bandwidth': 2 * 4 * NUMBERS / seconds['copy'],
        'latency': small,
        'link_bandwidth': 4 * SENT / (large - small),
        'update_seconds': seconds['one_stage'],
        'blocks': blocks,
    }


def build_machine() -> tuple[Jobs, dict[str, Any]]:
    """A product of matrices and a pass over memory, on one device."""
    start_jax(1, threads=False)
    import jax
    import jax.numpy as jnp

    multiply, scale = jax.jit(lambda x: x @ x), jax.jit(lambda x: x * 2.0)
    matrix, numbers = jnp.ones((SIDE, SIDE)), jnp.ones(NUMBERS)
    return {'multiply': _job(multiply, matrix), 'copy': _job(scale, numbers)}, {}


def build_exchange(meeting: str, number: int) -> tuple[Jobs, dict[str, Any]]:
    """Two devices that send each other something, forward and back as stages do, again and again."""
    start_jax(1, threads=False)
    import jax
    import numpy as np

    jax.distributed.initialize(meeting, num_processes=2, process_id=number)

    def exchange(x: jax.Array) -> jax.Array:
        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            onward, back = carry
            return (jax.lax.ppermute(onward, 'pair', [(0, 1)]), jax.lax.ppermute(back, 'pair', [(1, 0)])), None

        return jax.lax.scan(step, (x, x), None, length=TIMES)[0]

    sizes = {'small': 1, 'large': SENT}
    run = jax.pmap(exchange, axis_name='pair')
    return {name: _job(run, np.ones((1, size), np.float32)) for name, size in sizes.items()}, {}


def _job(function: Callable, *given: Any) -> Callable[[], None]:
    import jax

    def job() -> None:
        jax.block_until_ready(function(*given))

    return job
