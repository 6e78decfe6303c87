"""The grid of devices under one `pmap` axis, and what travels between it and the host.

Device index = replica · stages + stage, so that a replica's stages sit next to each other. Arrays on the grid
have a leading axis of that length with one row a device; a value that all devices share is one equal row each.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficientnet.layout import Layout

AXIS = 'grid'


class Grid:
    """The devices of a run, in grid order."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.devices = jax.devices()[: layout.devices]
        self._sharding = NamedSharding(Mesh(np.array(self.devices), (AXIS,)), PartitionSpec(AXIS))

    def pmap(self, function: Callable, **options: Any) -> Callable:
        """Returns `function` mapped over the grid, with the axis name `AXIS`."""
        return jax.pmap(function, axis_name=AXIS, devices=self.devices, **options)

    def replicate(self, tree: Any) -> Any:
        """Puts one copy of every leaf on every device."""
        return jax.tree.map(lambda leaf: self._place([np.asarray(leaf)[None]] * len(self.devices)), tree)

    def shard(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Splits the rows of a batch evenly over the devices: [rows, …] -> [devices, rows ÷ devices, …]."""
        return {name: self._place(np.split(rows[None], len(self.devices), axis=1)) for name, rows in batch.items()}

    def fetch(self, tree: Any) -> Any:
        """Copies the first device's row of every leaf to the host; they are all equal where this is used."""
        # Indexing a sharded array would run a program on the whole grid; a shard is already there.
        return jax.tree.map(lambda leaf: np.array(leaf.addressable_shards[0].data)[0], tree)

    def prefetch(self, batches: Iterable[dict[str, np.ndarray]], depth: int) -> Iterator[dict[str, jax.Array]]:
        """Yields sharded batches, keeping `depth` of them on their way to the devices ahead of the caller.

        The copies are asynchronous, so the devices find their next batch there when an update ends.
        """
        waiting: list[dict[str, jax.Array]] = []
        for batch in batches:
            waiting.append(self.shard(batch))
            if len(waiting) > depth:
                yield waiting.pop(0)
        yield from waiting

    def _place(self, rows: list[np.ndarray]) -> jax.Array:
        shape = (len(rows), *rows[0].shape[1:])
        shards = [jax.device_put(row, device) for row, device in zip(rows, self.devices, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, self._sharding, shards)
