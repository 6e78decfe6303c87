"""A tree of arrays as one array of equal rows, with the names kept beside it.

Between updates weights, optimizer state and averages live packed: the optimizer, the rounding, the finite check
and the reduction are then a handful of operations over one array each, however many arrays the model has, which
is what keeps programs small enough to compile in seconds. Only the model itself sees the tree.

Every array starts a row of its own, so that a row has one owner; the rest of its last row is zero and stays zero.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
ROW = 256  # numbers in a row; random bits are drawn by the row, so changing it changes them


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the arrays of a tree lie among the rows.

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

    def unpacked_shapes(self) -> Tree:
        """Returns the tree with fp32 shapes in place of arrays."""
        return self.structure.unflatten([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in self.shapes])

    def pack(self, tree: Tree, dtype: jax.typing.DTypeLike) -> jax.Array | np.ndarray:
        """Lays the arrays of a tree of this structure out in rows, [rows, ROW] in `dtype`; of numpy, in numpy."""
        leaves = self.structure.flatten_up_to(tree)
        xp = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
        rows = [xp.zeros((0, ROW), dtype)]
        for leaf, count in zip(leaves, self.counts, strict=True):
            flat = leaf.ravel().astype(dtype)
            rows.append(xp.pad(flat, (0, count * ROW - flat.size)).reshape(count, ROW))
        return xp.concatenate(rows)

    def unpack(self, rows: jax.Array | np.ndarray) -> Tree:
        """Returns the tree that was packed, in the dtype of `rows`; numpy rows give numpy arrays."""
        leaves, start = [], 0
        for shape, count in zip(self.shapes, self.counts, strict=True):
            leaves.append(rows[start : start + count].reshape(-1)[: math.prod(shape)].reshape(shape))
            start += count
        return self.structure.unflatten(leaves)


class Packings(NamedTuple):
    """The packings of a model's variables: trained weights, and running statistics (none without batch norm)."""

    params: Packing
    batch_stats: Packing

    def unpack(self, variables: Tree) -> Tree:
        """Returns the {'params', 'batch_stats'} that `EfficientNet.apply` takes, from packed ones."""
        return {name: getattr(self, name).unpack(rows) for name, rows in variables.items()}


def make_packing(tree: Tree) -> Packing:
    """Returns the packing of a tree of arrays or of their shapes."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = tuple(jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves)
    return Packing(structure, names, tuple(tuple(leaf.shape) for _, leaf in leaves))
