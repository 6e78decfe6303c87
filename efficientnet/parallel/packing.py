"""A tree of arrays as one array of equal rows, with the names kept beside it.

Between updates weights, optimizer state and averages live packed: the optimizer, the rounding, the finite check
and the reduction are then a handful of operations over one array each, however many arrays the model has, which
is what keeps programs small. Only the model itself sees the tree.

Every array starts a row of its own, so that a row has one owner; the rest of its last row is zero, its gradients
are zero, and nothing reads it. A pipeline stage packs its own blocks' arrays; all stages have as many rows as the
largest, since devices under one `pmap` hold equal shapes.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficientnet.model.pixel_sums import pixel_sum
from efficientnet.parallel.layout import AXIS

Tree = Any
ROW = 256  # numbers in a row; random bits are drawn by the row, so changing it changes them


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the arrays of a tree lie among the rows of one stage.

    Attributes:
        structure: Of the tree.
        names: Of its arrays, such as 'block1a/expand/kernel', in the order of their rows.
        shapes: Of its arrays.
    """

    structure: jax.tree_util.PyTreeDef
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def counts(self) -> list[int]:
        """Rows of each array."""
        return [-(-math.prod(shape) // ROW) for shape in self.shapes]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the packed array: [rows, ROW]."""
        return sum(self.counts), ROW

    @property
    def owners(self) -> np.ndarray:
        """Index into `names` of each row's array, int32 [rows]."""
        return np.repeat(np.arange(len(self.names), dtype=np.int32), self.counts)

    @property
    def indices(self) -> np.ndarray:
        """Number of each row within its array, uint32 [rows]."""
        return np.concatenate([np.arange(count, dtype=np.uint32) for count in (0, *self.counts)])

    def select(self, tree: Tree) -> Tree:
        """Returns the part of a whole tree {block: …} that this packing is of."""
        blocks = {name.split('/')[0] for name in self.names}
        return {name: sub for name, sub in tree.items() if name in blocks}

    def unpacked_shapes(self) -> Tree:
        """Returns the tree with fp32 shapes in place of arrays."""
        return self.structure.unflatten([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in self.shapes])

    def pack(self, tree: Tree, dtype: jax.typing.DTypeLike) -> jax.Array | np.ndarray:
        """Lays the arrays of a tree of this structure out in rows, [rows, ROW] in `dtype`; of numpy, in numpy.

        Where there is None instead of an array, rows are zero.
        """
        leaves = self.structure.flatten_up_to(tree)
        xp = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
        rows = [xp.zeros((0, ROW), dtype)]
        for leaf, count in zip(leaves, self.counts, strict=True):
            flat = xp.zeros(0, dtype) if leaf is None else leaf.ravel().astype(dtype)
            rows.append(xp.pad(flat, (0, count * ROW - flat.size)).reshape(count, ROW))
        return xp.concatenate(rows)

    def add(self, rows: jax.Array, tree: Tree) -> jax.Array:
        """Returns packed rows, these or more, with the arrays of a tree of this structure added; None adds nothing.

        Each is added where it lies: to pack them first, in every tick of a pipeline, would copy all of them once more.
        """
        start = 0
        for leaf, count in zip(self.structure.flatten_up_to(tree), self.counts, strict=True):
            if leaf is not None:
                flat = leaf.ravel().astype(rows.dtype)
                more = jnp.pad(flat, (0, count * ROW - flat.size)).reshape(count, ROW)
                rows = jax.lax.dynamic_update_slice_in_dim(rows, rows[start : start + count] + more, start, 0)
            start += count
        return rows

    def unpack(self, rows: jax.Array | np.ndarray) -> Tree:
        """Returns the tree that was packed, in the dtype of `rows`; numpy rows give numpy arrays."""
        leaves, start = [], 0
        for shape, count in zip(self.shapes, self.counts, strict=True):
            leaves.append(rows[start : start + count].reshape(-1)[: math.prod(shape)].reshape(shape))
            start += count
        return self.structure.unflatten(leaves)


@dataclasses.dataclass(frozen=True)
class StagedPacking:
    """The packings of every stage's share of a tree, padded to the longest so that all devices hold equal shapes.

    On the host a packed tree has its stages in front, [stages, rows, ROW]; a device holds its own stage's [rows, ROW].

    Attributes:
        parts: Of each stage's arrays.
    """

    parts: tuple[Packing, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of what one device holds: [rows of the largest stage, ROW]."""
        return max(part.shape[0] for part in self.parts), ROW

    @property
    def names(self) -> tuple[str, ...]:
        """Of all arrays, stage after stage."""
        return tuple(name for part in self.parts for name in part.names)

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all arrays, by name."""
        return {name: shape for part in self.parts for name, shape in zip(part.names, part.shapes, strict=True)}

    @property
    def size(self) -> int:
        """Numbers in all arrays, padding not counted."""
        return sum(math.prod(shape) for part in self.parts for shape in part.shapes)

    def pack(self, tree: Tree, dtype: jax.typing.DTypeLike) -> jax.Array | np.ndarray:
        """Lays out a whole tree {block: …}, [stages, rows, ROW] in `dtype`."""
        rows = [self.pad(part.pack(part.select(tree), dtype)) for part in self.parts]
        xp = np if all(isinstance(part, np.ndarray) for part in rows) else jnp
        return xp.stack(rows)

    def unpack(self, rows: jax.Array | np.ndarray) -> Tree:
        """Returns the whole tree from [stages, rows, ROW]."""
        tree: Tree = {}
        for part, own in zip(self.parts, rows, strict=True):
            tree |= part.unpack(own[: part.shape[0]])
        return tree

    def pad(self, rows: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """Adds rows of zeros to one stage's until they are as many as the largest stage's."""
        missing = self.shape[0] - rows.shape[0]
        xp = np if isinstance(rows, np.ndarray) else jnp
        return xp.pad(rows, ((0, missing), (0, 0))) if missing else rows

    def unpacked_shapes(self) -> Tree:
        """Returns the whole tree with fp32 shapes in place of arrays."""
        return {name: sub for part in self.parts for name, sub in part.unpacked_shapes().items()}

    # What differs from array to array or row to row, as tables that a device reads its own stage's part of.

    def own(self, table: np.ndarray) -> np.ndarray | jax.Array:
        """Returns this device's entry of a table [stages, …]: a constant if there is one stage, else looked up."""
        return table[0] if len(self.parts) == 1 else jnp.asarray(table)[own_stage(len(self.parts))]

    def per_array(self, value: Callable[[str], Any], dtype: jax.typing.DTypeLike) -> np.ndarray:
        """Tabulates a function of an array's name, [stages, most arrays of a stage]; zero where there is none."""
        table = np.zeros((len(self.parts), max(len(part.names) for part in self.parts)), dtype)
        for stage, part in enumerate(self.parts):
            table[stage, : len(part.names)] = [value(name) for name in part.names]
        return table

    def rows_of(self, names: Collection[str]) -> np.ndarray:
        """Marks the rows of the arrays that have these names, bool [stages, rows, 1]."""
        chosen = self.per_array(lambda name: name in names, bool)
        return np.take_along_axis(chosen, self.owners, axis=1)[:, :, None]

    @property
    def owners(self) -> np.ndarray:
        """Index of each row's array among those of its stage, int32 [stages, rows]; 0 for rows of padding."""
        return self._stack([part.owners for part in self.parts])

    @property
    def indices(self) -> np.ndarray:
        """Number of each row within its array, uint32 [stages, rows]."""
        return self._stack([part.indices for part in self.parts])

    @property
    def counts(self) -> np.ndarray:
        """Rows of each array, int32 [stages, most arrays of a stage]."""
        counts = {name: count for part in self.parts for name, count in zip(part.names, part.counts, strict=True)}
        return self.per_array(counts.__getitem__, np.int32)

    def _stack(self, tables: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.pad(table, (0, self.shape[0] - len(table))) for table in tables])


def own_stage(stages: int) -> jax.Array:
    """Returns the stage of the device that runs this, int32 []; inside a function over the grid."""
    return jax.lax.axis_index(AXIS) % stages


def row_sums(rows: jax.Array) -> jax.Array:
    """Adds up the numbers of each row, fp32 [rows, ROW] -> [rows]."""
    return pixel_sum(rows[:, None, :, None])[:, 0]


class Packings(NamedTuple):
    """The packings of a model's variables: trained weights, and running statistics (none without batch norm)."""

    params: StagedPacking
    batch_stats: StagedPacking

    def unpack(self, variables: Tree) -> Tree:
        """Returns the {'params', 'batch_stats'} that `EfficientNet.apply` takes, from packed ones of all stages."""
        return {name: getattr(self, name).unpack(rows) for name, rows in variables.items()}

    def unpack_stage(self, stage: int, variables: Tree) -> Tree:
        """Returns one stage's variables from the rows that its device holds."""
        parts = {name: getattr(self, name).parts[stage] for name in variables}
        return {name: part.unpack(variables[name][: part.shape[0]]) for name, part in parts.items()}


def make_packing(tree: Tree, stages: Sequence[Collection[str]] | None = None) -> StagedPacking:
    """Returns the packing of a tree of arrays or of their shapes.

    Args:
        tree: A dict; its keys are blocks.
        stages: The blocks of each stage; by default there is one with all of them.
    """
    return StagedPacking(tuple(_pack_part(tree, blocks) for blocks in stages or (tree.keys(),)))


def _pack_part(tree: Tree, blocks: Collection[str]) -> Packing:
    part = {name: sub for name, sub in tree.items() if name in blocks}
    leaves, structure = jax.tree_util.tree_flatten_with_path(part)
    names = tuple(jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves)
    return Packing(structure, names, tuple(tuple(leaf.shape) for _, leaf in leaves))
