"""The grid of devices under one `pmap` axis, and what travels between it and the host.

Device index = replica · stages + stage, so that a replica's stages sit next to each other, in one process. Arrays
on the grid have a leading axis of that length with one row a device; a process sees and fills its own rows.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficientnet.errors import ConfigError
from efficientnet.parallel.layout import AXIS, Layout


def compiler_options(platform: str) -> dict[str, str | bool]:
    """Returns what XLA has to be told for programs on a platform to be as fast and as small as they are meant to be."""
    if platform == 'gpu':
        # What is rounded to 16 bits and widened again would be kept in 32, written to memory and read.
        return {'xla_allow_excess_precision': False}
    if platform != 'cpu':
        return {}
    # This pass drops optimisation barriers before fusion: what is one number a channel would then be computed in every
    # pixel, and what is to be computed again would be shared with what was kept (of B4 at 380 pixels under
    # recompute=block an update would take 1,567 MiB of temporaries instead of 452).
    return {'xla_disable_hlo_passes': 'cse_barrier_expander'}


class Grid:
    """The devices of a run, in grid order.

    Attributes:
        layout: Replicas, stages and processes.
        devices: Of all processes.
        local_devices: Of this process, whole replicas.

    Raises:
        ConfigError: A process has fewer devices than its replicas need.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        share = layout.devices // layout.processes
        self.devices = [device for process in range(layout.processes) for device in _devices_of(process, share, layout)]
        self.local_devices = [device for device in self.devices if device.process_index == jax.process_index()]
        self._sharding = NamedSharding(Mesh(np.array(self.devices), (AXIS,)), PartitionSpec(AXIS))

    def compile(self, function: Callable, *shapes: Any, **options: Any) -> Callable:
        """Returns the program of `function` mapped over the grid, with the axis name `AXIS`.

        Args:
            function: What one device does.
            shapes: Of its arguments, one a tree: what one device holds.
            options: Of `jax.pmap`.
        """

        def stand_in(leaf: Any) -> np.ndarray:
            # Lowering wants arrays when there are several processes; these take no memory.
            return np.broadcast_to(np.zeros((), leaf.dtype), (len(self.local_devices), *leaf.shape))

        mapped = jax.pmap(function, axis_name=AXIS, devices=self.devices, **options)
        options = compiler_options(self.devices[0].platform)
        return mapped.lower(*jax.tree.map(stand_in, shapes)).compile(compiler_options=options)

    def flag(self, value: bool) -> jax.Array:
        """Returns one number a device, fp32 [devices], set in all devices of this process."""
        return self._place([np.full(1, value, np.float32)] * len(self.local_devices))

    def place(self, tree: Any) -> Any:
        """Puts every stage's entry of [stages, …] on the devices of that stage, in all replicas.

        The devices have copies of their own, even a CPU, which would share numpy's memory where that is aligned: that
        cannot be donated, and the first update would make all of the state a second time.
        """
        stages = self.layout.stages

        def place(leaf: Any) -> jax.Array:
            rows = np.asarray(leaf)
            return self._place([rows[i % stages][None] for i in range(len(self.local_devices))], own=True)

        return jax.tree.map(place, tree)

    def fetch(self, tree: Any) -> Any:
        """Copies one replica's entries to the host, [stages, …]; all replicas have equal ones where this is used."""
        devices = self.local_devices[: self.layout.stages]

        def fetch(leaf: jax.Array) -> np.ndarray:
            # Indexing a sharded array would run a program on the whole grid; a shard is already there.
            shards = {shard.device: shard.data for shard in leaf.addressable_shards}
            return np.concatenate([np.asarray(shards[device]) for device in devices])

        return jax.tree.map(fetch, tree)

    def shard(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Gives each replica of this process its rows, in order, and each of its stages an equal share of them.

        [rows, …] -> [devices, rows ÷ devices, …], rounded up: the last shares are filled up with zeros.
        """
        replicas, stages = len(self.local_devices) // self.layout.stages, self.layout.stages

        def shares(rows: np.ndarray) -> list[np.ndarray]:
            split = []
            for own in np.split(rows, replicas):
                missing = -len(own) % stages
                filled = np.pad(own, ((0, missing), *[(0, 0)] * (own.ndim - 1))) if missing else own
                split += np.split(filled[None], stages, axis=1)
            return split

        return {name: self._place(shares(rows)) for name, rows in batch.items()}

    def prefetch(self, batches: Iterable[dict[str, np.ndarray]], depth: int) -> Iterator[dict[str, jax.Array]]:
        """Yields sharded batches, keeping `depth` of them on their way to the devices ahead of the caller.

        The copies are asynchronous, so the devices find their next batch there when an update ends. A thread takes
        the batches and starts the copies: a GPU's kernels are launched one by one by the thread that calls the
        program, and what the host did in between would be time in which nothing is launched.
        """
        left = iter(batches)

        def take() -> dict[str, jax.Array] | None:
            batch = next(left, None)
            return None if batch is None else self.shard(batch)

        thread = futures.ThreadPoolExecutor(1, 'prefetch')
        try:
            ahead = collections.deque(thread.submit(take) for _ in range(depth + 1))
            while (batch := ahead.popleft().result()) is not None:
                yield batch
                # Freed before the thread goes on, if the caller has let go of it: freeing an array gives the
                # interpreter's lock away, which the thread then keeps for as long as its Python takes.
                del batch
                ahead.append(thread.submit(take))
        finally:
            thread.shutdown(cancel_futures=True)  # once the batch in hand is taken

    def _place(self, rows: list[np.ndarray], own: bool = False) -> jax.Array:
        shape = (len(self.devices), *rows[0].shape[1:])
        shards = [jax.device_put(row, device) for row, device in zip(rows, self.local_devices, strict=True)]
        if own:  # of numpy's arrays `device_put` makes no copy, whatever it is told
            shards = [jax.device_put(shard, shard.device, may_alias=False) for shard in shards]
        return jax.make_array_from_single_device_arrays(shape, self._sharding, shards)


def _devices_of(process: int, count: int, layout: Layout) -> list[jax.Device]:
    """The first devices of one process."""
    devices = sorted((d for d in jax.devices() if d.process_index == process), key=lambda d: d.id)
    if len(devices) < count:
        raise ConfigError(
            f'process {process} has {len(devices)} devices, but replicas={layout.replicas} × stages={layout.stages} '
            f'over {layout.processes} processes needs {count} in each'
        )
    return devices[:count]
