"""A grid with every stage in a process of its own, so that each is a device with threads of its own."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficientnet.parallel.grid import Grid
from efficientnet.parallel.layout import AXIS, Layout


class SpreadGrid(Grid):
    """One replica whose stages are devices of different processes, which a run keeps in one."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.devices = sorted(jax.devices(), key=lambda device: device.process_index)
        self.local_devices = jax.local_devices()
        self._sharding = NamedSharding(Mesh(np.array(self.devices), (AXIS,)), PartitionSpec(AXIS))
