"""What the benchmarks share: their flags, a config from them, the compiled update, a batch, a table.

Nothing here initialises JAX's devices on import: a benchmark says first how many it wants.
"""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np

from configs import base
from efficientnet.errors import ConfigError
from efficientnet.loop.host_memory import keep_freed_memory

if TYPE_CHECKING:
    from efficientnet.loop.assemble import Parts

MIB = 2**20
FIELDS = {  # flags that set a field of configs/base.py, and their types
    'model': ('model.variant', str, 'b0 … b7'),
    'group_size': ('model.group_size', int, 'channels a group in the spatial convolutions'),
    'width': ('model.width', float, "channel multiplier; 0 = the model's"),
    'depth': ('model.depth', float, "repeat multiplier; 0 = the model's"),
    'image_size': ('image_size', int, 'pixels a side'),
    'micro_batch': ('micro_batch', int, 'images computed at once'),
    'policy': ('precision.policy', str, 'compute.master numbers'),
    'schedule': ('pipeline', str, "timetable of the stages: 'grouped' or 'sequential'"),
}


DEFAULTS = {'group_size': 16, 'width': 0.0, 'depth': 0.0, 'policy': '32.32', 'schedule': 'grouped'}


def add_model_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Adds the flags of `FIELDS`, those of the accumulation count and of JSON.

    Args:
        parser: Of the benchmark.
        **defaults: Of the flags that `DEFAULTS` lacks, and of `accumulation`.
    """
    defaults = DEFAULTS | defaults
    for name, (_, kind, meaning) in FIELDS.items():
        parser.add_argument(f'--{name}', type=kind, default=defaults[name], help=f'{meaning} (%(default)s)')
    parser.add_argument(
        '--accumulation', type=int, default=defaults['accumulation'], help='micro-batches a weight update (%(default)s)'
    )
    parser.add_argument('--json', action='store_true', help='print one JSON object instead of text')


def check_flags(args: Mapping[str, Any]) -> None:
    """Raises ConfigError for sizes that nothing further on would name by their flag."""
    for name in ('image_size', 'micro_batch', 'batch', 'accumulation', 'group_size', 'rounds'):
        if args.get(name, 1) < 1:
            raise ConfigError(f'--{name}={args[name]} must be at least 1')


def make_config(
    args: Mapping[str, Any], *, stages: int = 1, splits: str = 'auto', recompute: str = 'stage'
) -> ml_collections.ConfigDict:
    """Returns the config of one replica in some stages, with everything else as in configs/base.py.

    Args:
        args: The flags of `add_model_flags`.
        stages: Devices of the pipeline.
        splits: First block of every stage but the first, or 'auto'.
        recompute: As in configs/base.py.
    """
    config = base.get_config()
    given = {field: args[name] for name, (field, *_) in FIELDS.items() if stages > 1 or name != 'schedule'}
    given |= {
        'replicas': 1,
        'global_batch': args['micro_batch'] * args['accumulation'],
        'stages': stages,
        'recompute': recompute,
        'steps': 1_000_000,  # a benchmark ends when it has seen enough
    }
    if stages > 1:
        given['splits'] = splits
    config.update_from_flattened_dict(given)
    return config


def start_jax(devices: int, *, threads: bool = True, platform: str = 'cpu', cache: str = '') -> None:
    """Sets JAX up; has to come before anything is computed.

    Args:
        devices: How many virtual CPU devices.
        platform: 'cpu', or 'gpu' for one that is there.
        cache: Folder of compiled programs; '' is the one that training uses.
        threads: Whether they may use several threads, which they share; otherwise there has to be one device.

    Raises:
        ConfigError: There is no such platform.
    """
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    if not threads:
        # The first alone has no effect in JAX 0.10; the second sizes the pool, which has a thread a device at least.
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_multi_thread_eigen=false'.strip()
        os.environ['NPROC'] = '1'
    keep_freed_memory()
    import jax

    from efficientnet.loop.program_cache import keep_programs

    jax.config.update('jax_platforms', {'cpu': 'cpu', 'gpu': 'cuda,cpu'}[platform])
    jax.config.update('jax_num_cpu_devices', devices)
    keep_programs(cache)
    if platform == 'gpu' and jax.default_backend() != 'gpu':  # without its plugin JAX takes the CPU and says nothing
        raise ConfigError('--device=gpu: JAX finds no GPU here; it needs one, and the wheel jax[cuda12] or jax[cuda13]')


def random_batch(parts: 'Parts') -> dict[str, np.ndarray]:
    """Returns a global batch of noise: an update takes as long as on photographs."""
    layout, size, random = parts.grid.layout, parts.config.image_size, np.random.default_rng(0)
    return {
        'image': random.integers(0, 256, (layout.global_batch, size, size, 3), np.uint8),
        'label': random.integers(0, parts.model.spec.classes, layout.global_batch, np.int32),
        'mask': np.ones(layout.global_batch, np.float32),
    }


def machine_name() -> str:
    """Returns what tells this machine's results from another's: its processor, its cores, the version of JAX."""
    cpuinfo = pathlib.Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    processor = models[0] if models else platform.processor() or platform.machine()
    return f'{processor}, {os.cpu_count()} cores, jax {importlib.metadata.version("jax")}'


def describe(args: Mapping[str, Any]) -> str:
    """Returns one line about the model and the sizes."""
    scale = ''.join(f', {name} {args[name]:g}' for name in ('width', 'depth') if args[name])
    return (
        f'{args["model"]}{scale}, group size {args["group_size"]}, {args["image_size"]} pixels, micro-batch '
        f'{args["micro_batch"]} × accumulation {args["accumulation"]}, {args["policy"]}'
    )


def table(rows: Iterable[Sequence[str]]) -> str:
    """Returns rows of text as aligned columns: the first to the left, the others to the right."""
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append('  '.join([first.ljust(widths[0]), *cells]).rstrip())
    return '\n'.join(lines)


def progress(text: str) -> None:
    """Says on stderr what is going on; stdout is for the result."""
    print(text, file=sys.stderr, flush=True)
