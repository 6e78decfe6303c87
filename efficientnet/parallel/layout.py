"""How a global batch is laid out over replicas, stages, time and processes; pure arithmetic.

global batch = micro-batch × replicas × accumulation count. Replica r computes rows
[r · rows, (r + 1) · rows) of the global batch with rows = micro-batch × accumulation count, one micro-batch
after the other, so a row's place in the batch says who computes it and when, and nothing else depends on that.

Devices stand in one line, the axis `AXIS` of every program: index = replica · stages + stage, so that a replica's
stages sit next to each other, in one process.
"""

import dataclasses

from efficientnet.errors import ConfigError
from efficientnet.parallel.stages import check_kinds

AXIS = 'grid'


@dataclasses.dataclass(frozen=True)
class Layout:
    """Replicas × stages devices, and the share of each in a weight update.

    Attributes:
        replicas: Copies of the model.
        micro_batch: Examples a replica computes at once.
        accumulation: Micro-batches a replica computes in one weight update.
        splits: First block of every stage but the first.
        schedule: When the stages work on which micro-batch, a key of `pipeline.SCHEDULES`.
        recompute: What the backward computes again instead of having kept it, a key of `stages.PASSES`.
        processes: Among which the replicas are shared out evenly.
    """

    replicas: int
    micro_batch: int
    accumulation: int
    splits: tuple[str, ...] = ()
    schedule: str = 'grouped'
    recompute: str = 'stage'
    processes: int = 1

    @property
    def stages(self) -> int:
        """Devices that one copy of the model is spread over."""
        return len(self.splits) + 1

    @property
    def rows(self) -> int:
        """Examples a replica computes in one weight update."""
        return self.micro_batch * self.accumulation

    @property
    def global_batch(self) -> int:
        """Examples in one weight update."""
        return self.rows * self.replicas

    @property
    def devices(self) -> int:
        """Devices in use."""
        return self.replicas * self.stages

    @property
    def replica_groups(self) -> list[list[int]]:
        """Indices of the devices that hold one copy of the model together."""
        return [[replica * self.stages + stage for stage in range(self.stages)] for replica in range(self.replicas)]

    @property
    def stage_groups(self) -> list[list[int]]:
        """Indices of the devices that hold the same stage."""
        return [list(group) for group in zip(*self.replica_groups, strict=True)]


class TooManyReplicasError(ConfigError):
    """Replicas that there are no devices for; `devices` are as many as they need."""

    def __init__(self, message: str, devices: int) -> None:
        super().__init__(message)
        self.devices = devices

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.devices)  # goes from process to process


def make_layout(
    *,
    global_batch: int,
    micro_batch: int,
    replicas: int,
    splits: tuple[str, ...],
    devices: int,
    processes: int = 1,
    schedule: str = 'grouped',
    recompute: str = 'stage',
) -> Layout:
    """Derives the accumulation count, and the number of replicas where it is left open.

    Args:
        global_batch: Examples a weight update.
        micro_batch: Examples a replica computes at once.
        replicas: Copies of the model; 0 takes as many as fit on the devices.
        splits: The first block of every stage but the first.
        devices: How many devices there are, in all processes.
        processes: How many processes share them evenly.
        schedule: As `Layout.schedule`.
        recompute: As `Layout.recompute`.

    Raises:
        ConfigError: A size is not positive, does not divide, or asks for more devices than there are.
    """
    for field, value, least in (
        ('global_batch', global_batch, 1),
        ('micro_batch', micro_batch, 1),
        ('replicas', replicas, 0),
    ):
        if value < least:
            raise ConfigError(f'{field}={value} must be at least {least}')
    check_kinds(recompute, schedule)
    stages = len(splits) + 1
    room = devices // processes // stages * processes  # a process owns whole replicas
    chosen = not replicas
    replicas = replicas or max(room, processes)
    if replicas > room or replicas % processes:
        raise TooManyReplicasError(_too_many(replicas, stages, devices, processes, room), replicas * stages)
    if global_batch % (micro_batch * replicas):
        proposal = _proposal(global_batch, micro_batch, replicas)
        counts = range(replicas - processes, 0, -processes) if chosen else ()
        fitting = [count for count in counts if global_batch % (micro_batch * count) == 0]
        if chosen:
            proposal = f'replicas=0 takes {replicas} here: {proposal}'
        raise ConfigError(proposal + (f', or replicas={fitting[0]}' if fitting else ''))
    accumulation = global_batch // (micro_batch * replicas)
    return Layout(replicas, micro_batch, accumulation, splits, schedule, recompute, processes)


def largest_replicas(global_batch: int, devices: int, processes: int) -> int:
    """Returns the largest number of replicas, at most `devices`, that divides the global batch and the processes share.

    Raises:
        ConfigError: There is none.
    """
    counts = range(processes, devices + 1, processes)
    dividing = [count for count in counts if global_batch % count == 0]
    if not dividing:
        raise ConfigError(f'global_batch={global_batch} cannot be shared among {processes} processes; start fewer')
    return max(dividing)


def _too_many(replicas: int, stages: int, devices: int, processes: int, room: int) -> str:
    """Says how many replicas would fit."""
    wanted = f'replicas={replicas} × stages={stages} needs {replicas * stages} devices, but there are {devices}'
    if processes == 1:
        remedy = f'set replicas={room}' if room else f'use at most {devices} stage{"s" if devices > 1 else ""}'
        return f'{wanted}; {remedy}'
    if replicas % processes:
        return f'replicas={replicas} must be a multiple of the {processes} processes, each of which owns whole replicas'
    return f'{wanted} in {processes} processes, which have room for {room} whole replicas; give each more devices'


def _proposal(global_batch: int, micro_batch: int, replicas: int) -> str:
    """Says which sizes near the wanted ones would divide."""
    portion = micro_batch * replicas
    below, above = global_batch // portion * portion, -(-global_batch // portion) * portion
    batches = ' or '.join(str(size) for size in (below, above) if size)
    message = (
        f'global_batch={global_batch} is not micro_batch={micro_batch} × replicas={replicas} × a whole '
        f'accumulation count; global_batch={batches} would be'
    )
    if global_batch % replicas == 0:
        rows = global_batch // replicas
        sizes = [size for size in range(1, rows + 1) if rows % size == 0]
        nearest = sorted(sorted(sizes, key=lambda size: abs(size - micro_batch))[:2])
        message += f', or micro_batch={" or ".join(map(str, nearest))}'
    return message
