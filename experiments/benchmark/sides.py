"""The sides of a comparison: each builds, in a process of its own, what is measured of it.

A side's jobs are 'step' (all updates or evaluations of a round), 'reset' (of the peak of memory), 'peak', which
answers in bytes, and one for each distinct layer if layers are asked for.
"""

import ctypes
import functools
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from efficientnet.model.costs import block_costs
from efficientnet.model.scaling import ModelSpec, boundary_shape
from experiments.benchmark.setup import make_config, random_batch, start_jax
from experiments.benchmark.workers import Jobs, Worker

MATRIX, COPIED = 2048, 2**28  # rows of the square matrices, bytes of the copy, by which a machine's peak is found


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


def distinct_layers(spec: ModelSpec, image_size: int) -> list[Layer]:
    """Returns the layers of all blocks in order, each shape once."""
    layers = []
    for block in spec.blocks:
        side, _, _ = boundary_shape(spec, block.name, image_size)
        mid, after = block.mid_channels, -(-side // block.stride)
        if mid != block.in_channels:
            layers += [Layer(side, block.in_channels, mid, 1), Layer(side, mid, mid)]
        layers += [Layer(side, mid, mid, block.kernel, block.stride, block.groups), Layer(after, mid, mid)]
        layers.append(Layer(after, mid, block.out_channels, 1))
    return list(dict.fromkeys(layers))


def start(name: str, args: Mapping[str, Any]) -> tuple[Worker, dict[str, Any]]:
    """Starts a side and returns its process and what it says of itself.

    Ours is compiled twice if it can be cached: in a process that ends, and again from what that left in a cache, so
    that what the compiler takes is not in the memory that is measured.
    """
    if name.startswith('timm'):
        worker = Worker(build_timm, args)
        return worker, worker.answer()
    method = 'native' if name == 'native' else 'auto'
    with tempfile.TemporaryDirectory() as cache:
        worker = Worker(build_ours, args, method, cache)
        found = worker.answer() | {'cached_compile_seconds': None}
        if found.pop('cached'):
            worker.stop()
            worker = Worker(build_ours, args, method, cache)
            found['cached_compile_seconds'] = worker.answer()['compile_seconds']
    return worker, found


def build_ours(args: Mapping[str, Any], method: str, cache: str) -> tuple[Jobs, dict[str, Any]]:
    """This project's side, with a formulation of the spatial convolutions and a folder of compiled programs."""
    start_jax(1, platform=args['device'], cache=cache)
    import jax

    from efficientnet.loop.assemble import assemble
    from efficientnet.loop.host_memory import give_back_freed_memory, make_room
    from efficientnet.loop.programs import compile_evaluate, compile_gather, compile_update, largest_temporaries
    from efficientnet.numerics.precision import policy
    from input_pipeline.sources import ArraySource

    peaks = _peaks(policy(args['policy']).compute)
    _reset_peak()
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
    spec = parts.model.spec
    layers = distinct_layers(spec, args['image_size']) if args['layers'] else []
    jobs = {'step': step} | {str(layer): _our_layer(layer, args, parts.model.conv_method) for layer in layers}
    if device.platform == 'cpu':
        jobs |= {'reset': _reset_peak, 'peak': lambda: _resident('VmHWM') - imported}
    else:
        jobs |= {'reset': lambda: None, 'peak': lambda: device.memory_stats()['peak_bytes_in_use']}
    give_back_freed_memory()
    make_room(largest_temporaries(parts, [program]))
    costs = block_costs(spec, args['image_size'], norm=args['norm'])
    return jobs, {
        'parameters': sum(block.parameters for block in costs),
        'macs': sum(block.macs for block in costs),
        'layers': list(map(str, layers)),
        'compile_seconds': seconds,
        'cached': parts.model.conv_method != 'onednn',
        'bytes': program.cost_analysis()['bytes accessed'],
        'device': f'{device.device_kind} ({platform.machine()})',
        **peaks,
    }


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
    if args['layers']:
        from efficientnet.model.scaling import model_spec

        spec = model_spec(args['model'], group_size=args['group_size'])
        jobs |= {str(layer): _torch_layer(layer, args, where, layout) for layer in distinct_layers(spec, size)}
    if gpu:
        jobs |= {'reset': torch.cuda.reset_peak_memory_stats, 'peak': torch.cuda.max_memory_allocated}
    else:
        jobs |= {'reset': _reset_peak, 'peak': lambda: _resident('VmHWM') - imported}
    return jobs, {'parameters': parameters, 'compile_seconds': max(seconds, 0.0)}


def _our_layer(layer: Layer, args: Mapping[str, Any], method: str) -> Callable[[], None]:
    """One layer there and back, ten times a call; with the model's formulation of spatial convolutions."""
    import jax

    from efficientnet.model.convolution import grouped_conv
    from efficientnet.model.normalization import BatchPool, GroupPool, norm_swish
    from efficientnet.numerics.precision import policy
    from efficientnet.parallel.grid import compiler_options

    dtype = policy(args['policy']).compute
    x = jax.numpy.ones((args['micro_batch'], layer.side, layer.side, layer.inputs), dtype)
    if layer.kernel:
        weights = jax.numpy.ones((layer.kernel, layer.kernel, layer.inputs // layer.groups, layer.outputs), dtype)
        function = functools.partial(
            grouped_conv, stride=layer.stride, groups=layer.groups, method=method if layer.kernel > 1 else 'auto'
        )
    else:
        pool = BatchPool(None) if args['norm'] == 'batch' else GroupPool(4, 'strided')
        weights = jax.numpy.ones(layer.inputs)

        def function(x: jax.Array, scale: jax.Array) -> jax.Array:
            return norm_swish(x, scale, scale, pool, 1e-3, True)[0]

    def both(x: jax.Array, weights: jax.Array) -> tuple:
        y, pull = jax.vjp(function, x, weights)
        return y, pull(y)

    both = jax.jit(both, compiler_options=compiler_options(args['device'])).lower(x, weights).compile()

    def job() -> None:
        for _ in range(10):
            done = both(x, weights)
        jax.block_until_ready(done)

    return job


def _torch_layer(layer: Layer, args: Mapping[str, Any], where: Any, layout: Any) -> Callable[[], None]:
    """The same in PyTorch."""
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
    x = torch.ones(shape, device=where).to(memory_format=layout).requires_grad_()

    def job() -> None:
        for _ in range(10):
            y = module(x)
            y.backward(y.detach())
            x.grad = None
            module.zero_grad()
        if where.type == 'cuda':
            torch.cuda.synchronize()

    return job


def _peaks(dtype: Any) -> dict[str, float]:
    """FLOP/s of a matrix product and bytes a second of a copy (read and written), the best of ten."""
    import jax

    matrix = jax.numpy.ones((MATRIX, MATRIX), dtype)
    large = jax.numpy.ones(COPIED // 4, jax.numpy.float32)
    product = _best_seconds(jax.jit(jax.numpy.matmul), matrix, matrix)
    copy = _best_seconds(jax.jit(lambda x: x + 1.0), large)
    return {'peak_flops': 2 * MATRIX**3 / product, 'peak_bandwidth': 2 * COPIED / copy}


def _best_seconds(function: Callable, *given: Any) -> float:
    import jax

    seconds = []
    for _ in range(11):
        began = time.perf_counter()
        jax.block_until_ready(function(*given))
        seconds.append(time.perf_counter() - began)
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
