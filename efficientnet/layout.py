"""How a global batch is laid out over replicas, stages and time; pure arithmetic.

global batch = micro-batch × replicas × accumulation count. Replica r computes rows
[r · rows, (r + 1) · rows) of the global batch with rows = micro-batch × accumulation count, one micro-batch
after the other, so a row's place in the batch says who computes it and when, and nothing else depends on that.
"""

import dataclasses

from efficientnet.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Replicas × stages devices, and the share of each in a weight update."""

    replicas: int
    stages: int
    micro_batch: int
    accumulation: int

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


def make_layout(
    *, global_batch: int, micro_batch: int, replicas: int, stages: int, splits: tuple[str, ...], devices: int
) -> Layout:
    """Derives the accumulation count, and the number of replicas where it is left open.

    Args:
        global_batch: Examples a weight update.
        micro_batch: Examples a replica computes at once.
        replicas: Copies of the model; 0 takes as many as there are devices.
        stages: Devices a copy of the model is spread over.
        splits: The first block of every stage but the first.
        devices: How many devices there are.

    Raises:
        ConfigError: A size is not positive, does not divide, or asks for more devices than there are.
    """
    for field, value, least in (
        ('global_batch', global_batch, 1),
        ('micro_batch', micro_batch, 1),
        ('replicas', replicas, 0),
        ('stages', stages, 1),
    ):
        if value < least:
            raise ConfigError(f'{field}={value} must be at least {least}')
    if stages != 1 or splits:
        raise ConfigError(
            f'stages={stages}, splits={tuple(splits)}: the model runs in one stage; set stages=1 and splits=()'
        )
    replicas = replicas or max(devices // stages, 1)
    if replicas * stages > devices:
        raise ConfigError(
            f'replicas={replicas} × stages={stages} needs {replicas * stages} devices, but there are {devices}; '
            f'set replicas={max(devices // stages, 1)}, or try on a CPU with --cpu_devices={replicas * stages}'
        )
    if global_batch % (micro_batch * replicas):
        raise ConfigError(_proposal(global_batch, micro_batch, replicas))
    return Layout(replicas, stages, micro_batch, global_batch // (micro_batch * replicas))


def largest_replicas(global_batch: int, devices: int) -> int:
    """Returns the largest number of replicas, at most `devices`, that divides the global batch."""
    return max(count for count in range(1, devices + 1) if global_batch % count == 0)


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
