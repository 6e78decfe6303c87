"""Machines to plan for, as plain data with the source of each number beside it.

A source in brackets is one of these; 'assumed' marks a number for which none was found.

| name      | source                                                                                              |
| --------- | --------------------------------------------------------------------------------------------------- |
| peak      | Graphcore's "IPU peak FLOPS" notebook (tessellate-ipu): 1472 tiles × 128 fp16 FLOP a cycle          |
| blake     | thecharlieblake.co.uk/ipus: Mk2 SRAM, its bandwidth, 10 IPU-Links with 320 GB/s together            |
| gcl       | docs.graphcore.ai Poplar user guide, "GCL": IPUs form a ladder, a replica of two is a rung of it    |
| kit       | docs.graphcore.ai IPU-POD DA build guide: 8 IPU-Link ports a machine, one 100 GbE NIC a host        |
| datasheet | IPU-POD64/128/256 and IPU-M2000 datasheets: machines, hosts, 2 GW-Links of 100 Gb/s a machine       |
| config    | graphcore/examples v2.5.0, TF1 CNNs, configs.yml and README: the reference's own settings           |
| poplibs   | graphcore/poplibs, ConvPlan: 16 × 16 weights a convolution unit in fp16                              |
| nvidia    | NVIDIA's data sheets of DGX A100 (80 GB), DGX H100, DGX H200; dense tensor-core peaks               |
| jax       | docs.jax.dev "GPU memory allocation": a process takes 75 % of a GPU's memory                        |
| google    | cloud.google.com/tpu/docs/v3 and /v4, values a chip; JAX sees a v3 chip as two devices              |
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from efficientnet.errors import ConfigError

GIB = 2**30


class Link(NamedTuple):
    """One level of a network, which joins groups of the level before.

    Attributes:
        devices: In one group of this level.
        bandwidth: Bytes a second that a device sends, in one direction.
        latency: Seconds until a message of no length has arrived.
    """

    devices: int
    bandwidth: float
    latency: float


class Device(NamedTuple):
    """One accelerator, as JAX counts them.

    Attributes:
        flops: Peak multiplications and additions a second, by the bytes of a number.
        bandwidth: Of its memory, bytes a second.
        memory: Bytes.
        usable: Share of the memory that arrays may take.
        group: Channels of a group that its arithmetic takes at once; smaller groups leave the rest of it idle.
        narrowest: Bytes of the least number that it computes in.
    """

    flops: Mapping[int, float]
    bandwidth: float
    memory: float
    usable: float
    group: int = 1
    narrowest: int = 2


class Software(NamedTuple):
    """How a training program uses a device, where programs differ.

    Attributes:
        name: For people.
        accumulator: Bytes of a number of the gradient accumulators and of the reduction.
        gradients: Arrays as large as the accumulators that are there at once: they, and what is added to them.
        averages: Averages of the weights kept on the device, fp32.
        uniform: Whether every device holds arrays as large as the largest stage's.
        streamed: Whether images come a micro-batch at a time; otherwise an update's images are there at once.
        prefetch: Batches (or streamed micro-batches) fetched ahead.
        apart: Whether norm, swish and gate are differentiated one by one, so that the tensors between the former two
            and between gate and projection are kept as well.
        published: Whether 'auto' takes the reference's own splits where there are some.
    """

    name: str
    accumulator: int
    gradients: int
    averages: int
    uniform: bool
    streamed: bool
    prefetch: int
    apart: bool
    published: bool


# Gradients: the sums, a micro-batch's as a tree, and the same packed.
TRAINER = Software('this trainer', 4, 3, 1, True, False, 3, False, False)
# fp16 accumulators, averages on the host, a program a stage, an infeed with prefetch depth 3, norm and swish as two
# operations [config]. What Poplar's convolutions need besides is a share of the memory, see `usable` below.
POPLAR = Software("the reference's TensorFlow 1", 2, 1, 0, False, True, 3, True, True)


@dataclasses.dataclass(frozen=True)
class System:
    """Devices, what joins them, and the hosts that feed them.

    Attributes:
        name: As on the command line.
        title: For people.
        family: Systems of a family share one calibrated efficiency.
        device: Each of them.
        devices: How many.
        links: Levels of the network, innermost first; the last joins all.
        hosts: How many.
        host_bandwidth: Bytes a second from all hosts to all devices.
        software: What runs on it.
    """

    name: str
    title: str
    family: str
    device: Device
    devices: int
    links: tuple[Link, ...]
    hosts: int
    host_bandwidth: float
    software: Software = TRAINER


def _ipu(clock: float) -> Device:
    """A Mk2 IPU at a clock in Hz."""
    fp16 = 1472 * 128 * clock  # [peak]
    return Device(
        flops={2: fp16, 4: fp16 / 4},  # [peak]
        bandwidth=47.5e12 * clock / 1.33e9,  # [blake] at 1.33 GHz; SRAM keeps pace with the tiles
        memory=1440 * 624 * 1024,  # 1472 tiles of 624 KiB [blake], of which 32 do input and output [config]
        usable=0.6,  # convolutions may take 0.4 for temporaries: availableMemoryProportion [config]
        group=16,  # the AMP unit wants 16 channels in and out a group [poplibs]
    )


MK2, BOW = _ipu(1.33e9), _ipu(1.85e9)  # clocks: 250 TFLOP/s an IPU [datasheet]; Bow's [peak]
# A stage's replicas sit on one rail of the ladder [gcl]. Of the 8 IPU-Link ports of a machine [kit] a rail's end has
# two, of 32 GB/s both ways together [blake]. Between racks a machine's 4 IPUs share 2 GW-Links of 12.5 GB/s a
# direction [datasheet]. Latencies: assumed.
RAIL, GATEWAY = Link(64, 2 * 16e9, 2e-6), Link(256, 2 * 12.5e9 / 4, 10e-6)
ETHERNET = 12.5e9  # one 100 GbE NIC a host [kit]


def _pod(name: str, title: str, device: Device, devices: int, hosts: int) -> System:
    links = (RAIL,) if devices <= RAIL.devices else (RAIL, GATEWAY)
    return System(name, title, 'ipu', device, devices, links, hosts, hosts * ETHERNET, POPLAR)


class _Dgx(NamedTuple):
    title: str
    device: Device
    nvlink: float  # bytes/s a GPU, one direction
    network: float  # likewise
    host: float  # PCIe to a GPU, likewise


_DGX = {
    # fp32 runs as TF32; HBM, NVLink 600 GB/s both ways, 8 × 200 Gb/s InfiniBand, PCIe 4 x16 [nvidia]; usable [jax].
    'a100': _Dgx('A100', Device({2: 312e12, 4: 156e12}, 2.039e12, 80e9, 0.75), 300e9, 25e9, 32e9),
    # NVLink 900 GB/s both ways, 8 × 400 Gb/s, PCIe 5 x16 [nvidia].
    'h100': _Dgx('H100', Device({2: 989e12, 4: 494e12}, 3.35e12, 80e9, 0.75), 450e9, 50e9, 64e9),
    'h200': _Dgx('H200', Device({2: 989e12, 4: 494e12}, 4.8e12, 141e9, 0.75), 450e9, 50e9, 64e9),
}


def _dgx(kind: str, devices: int) -> System:
    """So many GPUs in machines of eight."""
    dgx = _DGX[kind]
    nodes = -(-devices // 8)
    links = (Link(8, dgx.nvlink, 5e-6), Link(max(devices, 16), dgx.network, 10e-6))[
        : 1 + (nodes > 1)
    ]  # latencies: assumed
    title = f'{nodes} × DGX {dgx.title}' if devices >= 8 else f'{devices} × {dgx.title}'
    return System(f'dgx_{kind}_{devices}', title, 'dgx', dgx.device, devices, links, nodes, devices * dgx.host)


# A v3 device is a core, half a chip; a v4 device a chip. Peak, HBM and all-reduce bandwidth (of a pod, shared out over
# its devices, half of it a direction) [google]. fp32 at a quarter of bf16's rate, latency, 16 GB/s a host: assumed.
_TPU = {
    3: (Device({2: 123e12 / 2, 4: 123e12 / 8}, 900e9 / 2, 16 * GIB, 1.0), Link(2048, 340e12 / 2048 / 2, 2e-6), 8),
    4: (Device({2: 275e12, 4: 275e12 / 4}, 1200e9, 32 * GIB, 1.0), Link(4096, 1.1e15 / 4096 / 2, 2e-6), 4),
}


def _tpu(version: int, devices: int) -> System:
    device, link, share = _TPU[version]
    hosts = -(-devices // share)
    cores = devices if version == 3 else 2 * devices  # slices are named by cores
    title = f'TPU v{version}-{cores}'
    return System(f'tpu_v{version}_{cores}', title, 'tpu', device, devices, (link,), hosts, hosts * 16e9)


# Hosts: 1, then 4 a POD64 [datasheet], as the reference's own launches have them [config]; a POD32's are assumed.
_HOSTS = {16: 1, 32: 2, 64: 4, 128: 8, 256: 16}
SYSTEMS = {
    system.name: system
    for system in (
        *(_pod(f'ipu_pod{n}', f'IPU-POD{n}', MK2, n, hosts) for n, hosts in _HOSTS.items()),
        *(_pod(f'bow_pod{n}', f'Bow Pod{n}', BOW, n, hosts) for n, hosts in _HOSTS.items()),
        *(_dgx(kind, n) for kind in _DGX for n in (1, 8, 16, 32, 64, 128, 256)),
        *(_tpu(3, n) for n in (8, 32, 128, 512, 1024)),
        *(_tpu(4, n) for n in (4, 16, 64, 256)),
    )
}
THIS_MACHINE = 'this_machine'


def system_of(name: str) -> System:
    """Returns the system called `name`.

    Raises:
        ConfigError: There is none; the message lists those there are.
    """
    if name not in SYSTEMS:
        known = ', '.join([*SYSTEMS, THIS_MACHINE])
        raise ConfigError(f'--system={name!r} is unknown; choose one of {known}')
    return SYSTEMS[name]
