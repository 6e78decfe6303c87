"""The sides of a comparison: each builds, in a process of its own, what is measured of it.

A side's jobs are 'step' (all updates or evaluations of a round), 'reset' (of the peak of memory), 'peak', which
answers in bytes, and one for each distinct layer if layers are asked for.
"""

import ctypes
import functools
import math
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from efficientnet.model.costs import BlockCost, block_costs
from efficientnet.model.scaling import ModelSpec, boundary_shape, configured_spec
from experiments.benchmark.setup import make_config, random_batch, start_jax
from experiments.benchmark.timm_model import CLASSES
from experiments.benchmark.workers import Jobs, Worker

CHANNELS = 3  # of images
LAYER_CALLS = 10  # of a layer, in one measurement
COPIED = 2**28  # bytes of the copy by which a machine's peak is found
# Rows of the square matrices, likewise, and calls between two looks at the clock: an accelerator that is given one
# small product at a time rests for most of it.
PRODUCTS = {'cpu': (2048, 1), 'gpu': (8192, 10)}


class Layer(NamedTuple):
    """A convolution, or a norm with swish where `kernel` is 0."""

    side: int
    inputs: int
    outputs: int
    kernel: int = 0
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        image = f'{self.side}×{self.side}×{self.inputs}'
        if not self.kernel:
            return f'norm, swish {image}'
        return f'{image} → {self.outputs}, k{self.kernel} s{self.stride}, {self.groups} groups'

    @property
    def of_images(self) -> bool:
        """Whether it is the stem's convolution: training needs no gradient of what comes in, the images."""
        return self.inputs == CHANNELS


def measured_layers(args: Mapping[str, Any]) -> list[Layer]:
    """Returns the layers of the model that the flags describe, which are the same on both sides; none unless asked."""
    if not args['layers']:
        return []
    return distinct_layers(configured_spec(make_config(args).model, CLASSES), args['image_size'])


def distinct_layers(spec: ModelSpec, image_size: int) -> list[Layer]:
    """Returns the layers of stem, blocks and head in order, each shape once; of the norms those with swish."""
    side, channels = -(-image_size // spec.stem_stride), spec.stem_channels
    layers = [Layer(image_size, CHANNELS, channels, 3, spec.stem_stride), Layer(side, channels, channels)]
    for block in spec.blocks:
        side, _, _ = boundary_shape(spec, block.name, image_size)
        mid, after = block.mid_channels, -(-side // block.stride)
        if mid != block.in_channels:
            layers += [Layer(side, block.in_channels, mid, 1), Layer(side, mid, mid)]
        layers += [Layer(side, mid, mid, block.kernel, block.stride, block.groups), Layer(after, mid, mid)]
        layers.append(Layer(after, mid, block.out_channels, 1))
    side, _, channels = boundary_shape(spec, 'head', image_size)
    layers += [Layer(side, channels, spec.head_channels, 1), Layer(side, spec.head_channels, spec.head_channels)]
    return list(dict.fromkeys(layers))


def start(name: str, args: Mapping[str, Any]) -> tuple[Worker, dict[str, Any]]:
    """Starts a side and returns its process and what it says of itself.

    Ours is compiled twice if it can be cached: in a process that ends, and again from what that left in a cache, so
    that what the compiler takes is not in the memory that is measured.
    """
    if name.startswith('timm'):
        worker = Worker(build_timm, args)
        return worker, worker.answer()
    method = 'native' if name == 'native' else args['conv_method']
    with tempfile.TemporaryDirectory() as cache:
        worker = Worker(build_ours, args, method, cache)
        found = worker.answer() | {'cached_compile_seconds': None}
        if found.pop('cached'):
            worker.stop()
            worker = Worker(build_ours, args, method, cache)
            found['cached_compile_seconds'] = worker.answer()['compile_seconds']
    return worker, found


def measure_peaks(args: Mapping[str, Any]) -> dict[str, float]:
    """Returns what the device reaches, in a process that ends: what it takes is in no side's memory."""
    worker = Worker(build_peaks, args)
    try:
        found = worker.answer()
    finally:
        worker.stop()
    return {name: found[name] for name in ('peak_flops', 'peak_bandwidth')}


def build_peaks(args: Mapping[str, Any]) -> tuple[Jobs, dict[str, float]]:
    """FLOP/s of a matrix product and bytes a second of a copy (read and written), the best of ten."""
    start_jax(1, platform=args['device'])
    import jax

    from efficientnet.numerics.precision import policy

    rows, calls = PRODUCTS[args['device']]
    matrix = jax.numpy.ones((rows, rows), policy(args['policy']).compute)
    large = jax.numpy.ones(COPIED // 4, jax.numpy.float32)
    product = _best_seconds(jax.jit(jax.numpy.matmul), calls, matrix, matrix)
    copy = _best_seconds(jax.jit(lambda x: x + 1.0), calls, large)
    return {}, {'peak_flops': 2 * rows**3 / product, 'peak_bandwidth': 2 * COPIED / copy}


def build_ours(args: Mapping[str, Any], method: str, cache: str) -> tuple[Jobs, dict[str, Any]]:
    """This project's side, with a formulation of the spatial convolutions and a folder of compiled programs."""
    start_jax(1, platform=args['device'], cache=cache)
    import jax

    from efficientnet.loop.assemble import assemble
    from efficientnet.loop.host_memory import give_back_freed_memory, make_room
    from efficientnet.loop.programs import compile_evaluate, compile_gather, compile_update, largest_temporaries
    from input_pipeline.sources import ArraySource

    jax.block_until_ready(jax.numpy.ones(()) + 1)  # JAX starts when it is first used, which counts as importing it
    imported = _resident()
    config = make_config(args, recompute=args['recompute'])
    config.model.norm, config.model.conv_method = args['norm'], method
    config.averaging.epoch_decay = 0.0  # timm has none
    config.optimizer.name, config.evaluation.batch = args['optimizer'], args['micro_batch']
    # Batches are noise: neither scikit-learn nor TensorFlow is needed, or counted in the memory.
    nothing = ArraySource('nothing', tuple('0123456789'), np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int32))
    parts = assemble(config, (nothing, nothing))
    grid, device = parts.grid, parts.grid.devices[0]
    state, batch, flag = grid.place(parts.init_state()), grid.shard(random_batch(parts)), grid.flag(False)
    began = time.perf_counter()
    if args['mode'] == 'train':
        update = compile_update(parts)
        seconds = time.perf_counter() - began

        def step() -> None:
            nonlocal state
            for _ in range(args['steps']):
                state, metrics = update(state, batch, flag)
            jax.block_until_ready((state, metrics))
    else:
        evaluate = compile_evaluate(parts)
        seconds = time.perf_counter() - began
        packed = {'params': state.params, 'batch_stats': state.batch_stats}
        variables = compile_gather(parts, state.params.dtype)(packed)

        def step() -> None:
            for _ in range(args['steps']):
                sums = evaluate(variables, batch, flag)
            jax.block_until_ready(sums)

    program = update if args['mode'] == 'train' else evaluate
    layers, method = measured_layers(args), parts.model.conv_method
    jobs = {'step': step} | {str(layer): _on_demand(_our_layer, layer, args, method) for layer in layers}
    if device.platform == 'cpu':
        jobs |= {'reset': _reset_peak, 'peak': lambda: _resident('VmHWM') - imported}
    else:
        jobs |= {'reset': lambda: None, 'peak': lambda: device.memory_stats()['peak_bytes_in_use']}
    jax.config.update('jax_persistent_cache_min_compile_time_secs', math.inf)  # what layers compile finds no folder
    temporaries = largest_temporaries(parts, [program])
    give_back_freed_memory()
    make_room(temporaries)
    costs = block_costs(parts.model.spec, args['image_size'], norm=args['norm'])
    return jobs, {
        'parameters': sum(block.parameters for block in costs),
        'macs': sum(block.macs for block in costs),
        'layers': list(map(str, layers)),
        'compile_seconds': seconds,
        'cached': method != 'onednn',
        'bytes': least_bytes(args, costs),
        'device': f'{device.device_kind} ({platform.machine()})',
    }


def least_bytes(args: Mapping[str, Any], costs: Sequence[BlockCost]) -> int:
    """Returns the bytes that a step reads and writes if every layer runs by itself and finds nothing in a cache.

    In training each tensor that a layer reads is written and read forward, read again backward, and its gradient
    written and read; each parameter is read forward and backward, its gradient written and read, its momentum read
    and written, and it is written. In evaluation tensors are written and read, and parameters read.

    Args:
        args: The flags.
        costs: Of the blocks.
    """
    from efficientnet.numerics.precision import policy

    chosen, images = policy(args['policy']), args['micro_batch'] * args['accumulation']
    tensors, parameters = (5, 7) if args['mode'] == 'train' else (2, 1)
    kept = images * sum(block.kept_bytes(chosen.compute.itemsize) for block in costs)
    return tensors * kept + parameters * chosen.master.itemsize * sum(block.parameters for block in costs)


def build_timm(args: Mapping[str, Any]) -> tuple[Jobs, dict[str, Any]]:
    """timm's side, eager or compiled."""
    from experiments.timm_import import import_timm

    import_timm()
    import torch

    from efficientnet.numerics.precision import policy
    from experiments.benchmark.timm_model import make_model

    imported = _resident()
    gpu = args['device'] == 'gpu'
    where = torch.device('cuda' if gpu else 'cpu')
    compute = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}[
        np.dtype(policy(args['policy']).compute).name
    ]
    narrow = compute != torch.float32
    layout = torch.channels_last if gpu or narrow else torch.contiguous_format
    model = make_model(args).to(where, memory_format=layout)
    parameters = sum(leaf.numel() for leaf in model.parameters())
    count, size = args['micro_batch'], args['image_size']
    images = torch.randn(count, 3, size, size).to(where, memory_format=layout)
    labels = torch.randint(model.num_classes, (count,), device=where)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scaler = torch.amp.GradScaler(where.type, enabled=compute == torch.float16)
    network = torch.compile(model) if args['against'] == 'timm-compile' else model
    autocast = functools.partial(torch.autocast, where.type, compute, enabled=narrow)

    def update() -> None:
        for _ in range(args['accumulation']):
            with autocast():
                loss = torch.nn.functional.cross_entropy(network(images), labels)
            scaler.scale(loss / args['accumulation']).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def evaluate() -> None:
        with torch.inference_mode(), autocast():
            network(images)

    work = update if args['mode'] == 'train' else evaluate
    model.train(args['mode'] == 'train')

    def step() -> None:
        for _ in range(args['steps']):
            work()
        if gpu:
            torch.cuda.synchronize()

    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    step()
    seconds -= time.perf_counter() - began
    jobs = {'step': step}
    for layer in measured_layers(args):
        jobs[str(layer)] = _on_demand(_torch_layer, layer, args, where, layout, compute)
    if gpu:
        jobs |= {'reset': torch.cuda.reset_peak_memory_stats, 'peak': torch.cuda.max_memory_allocated}
    else:
        jobs |= {'reset': _reset_peak, 'peak': lambda: _resident('VmHWM') - imported}
    return jobs, {'parameters': parameters, 'compile_seconds': max(seconds, 0.0)}


def _on_demand(build: Callable[..., Callable[[], None]], *given: Any) -> Callable[[], None]:
    """Returns a job that is built when it first runs: what a layer takes is not in the memory of the updates before."""
    built = functools.cache(functools.partial(build, *given))
    return lambda: built()()


def _our_layer(layer: Layer, args: Mapping[str, Any], method: str) -> Callable[[], None]:
    """One layer there and back, `LAYER_CALLS` times; with the formulation that the model gives it."""
    import jax

    from efficientnet.model.convolution import grouped_conv
    from efficientnet.model.normalization import BatchPool, GroupPool, norm_swish
    from efficientnet.numerics.precision import policy
    from efficientnet.parallel.grid import compiler_options

    dtype = policy(args['policy']).compute
    x = jax.numpy.ones((args['micro_batch'], layer.side, layer.side, layer.inputs), dtype)
    if layer.kernel:
        weights = jax.numpy.ones((layer.kernel, layer.kernel, layer.inputs // layer.groups, layer.outputs), dtype)
        if layer.kernel == 1 or (layer.of_images and method != 'onednn'):
            method = 'auto'
        function = functools.partial(grouped_conv, stride=layer.stride, groups=layer.groups, method=method)
    else:
        pool = BatchPool(None) if args['norm'] == 'batch' else GroupPool(4, 'strided')
        weights = jax.numpy.ones(layer.inputs)

        def function(x: jax.Array, scale: jax.Array) -> jax.Array:
            return norm_swish(x, scale, scale, pool, 1e-3, True)[0]

    def both(x: jax.Array, weights: jax.Array) -> tuple:
        y, pull = jax.vjp(function, x, weights)
        return y, pull(y)[layer.of_images :]

    both = jax.jit(both, compiler_options=compiler_options(args['device'])).lower(x, weights).compile()

    def job() -> None:
        for _ in range(LAYER_CALLS):
            done = both(x, weights)
        jax.block_until_ready(done)

    return job


def _torch_layer(layer: Layer, args: Mapping[str, Any], where: Any, layout: Any, compute: Any) -> Callable[[], None]:
    """The same in PyTorch, in 16 bits as in its update: what comes in is, and so is what `autocast` says."""
    import torch
    from torch import nn

    shape = (args['micro_batch'], layer.inputs, layer.side, layer.side)
    if layer.kernel:
        pads = layer.kernel // 2
        module = nn.Conv2d(
            layer.inputs, layer.outputs, layer.kernel, layer.stride, pads, groups=layer.groups, bias=False
        )
    else:
        norm = nn.BatchNorm2d(layer.inputs) if args['norm'] == 'batch' else nn.GroupNorm(4, layer.inputs)
        module = nn.Sequential(norm, nn.SiLU(inplace=True))
    module = module.to(where, memory_format=layout)
    x = torch.ones(shape, dtype=compute, device=where).to(memory_format=layout).requires_grad_(not layer.of_images)
    autocast = functools.partial(torch.autocast, where.type, compute, enabled=compute != torch.float32)

    def job() -> None:
        for _ in range(LAYER_CALLS):
            with autocast():
                y = module(x)
            y.backward(y.detach())
            x.grad = None
            module.zero_grad()
        if where.type == 'cuda':
            torch.cuda.synchronize()

    return job


def _best_seconds(function: Callable, calls: int, *given: Any) -> float:
    """Seconds of a call, of which several are made before any is waited for."""
    import jax

    seconds = []
    for _ in range(11):
        began = time.perf_counter()
        for _ in range(calls):
            done = function(*given)
        jax.block_until_ready(done)
        seconds.append((time.perf_counter() - began) / calls)
    return min(seconds[1:])


def _resident(field: str = 'VmRSS') -> int:
    """Bytes of memory that this process has, or under 'VmHWM' had at most since `_reset_peak`; 0 if not on Linux."""
    status = pathlib.Path('/proc/self/status')
    if not status.exists():
        return 0
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f'{field}:'))
    return int(line.split()[1]) * 1024


def _reset_peak() -> None:
    """Gives freed memory back, so that what was there before does not count, and forgets the peak."""
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)
    peak = pathlib.Path('/proc/self/clear_refs')
    if peak.exists():
        peak.write_text('5')
