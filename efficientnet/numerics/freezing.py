"""Training a part of the network and leaving the rest exactly as it is.

Frozen parameters are no arguments of the differentiated function, so that their gradients cost nothing and leading
frozen blocks go forward only. That alone would not hold them still: weight decay, momentum and stochastic rounding
move a weight whose gradient is zero. So the update also puts back what it held before, weights and optimizer state.
"""

import fnmatch
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efficientnet.errors import ConfigError
from efficientnet.parallel.packing import StagedPacking

Tree = Any


def frozen_names(trainable: str, parameters: Sequence[str], statistics: Sequence[str]) -> frozenset[str]:
    """Returns which parameters stay as they are, and with them which running statistics.

    Args:
        trainable: Patterns with commas between them. One matches whole parameter names, such as '*/bias', or what is
            left of a slash: 'head', 'block7*', 'block1a/expand'. '' = everything is trained.
        parameters: Names of all, such as 'block1a/expand/kernel'.
        statistics: Names of the running statistics of batch norms, such as 'block1a/expand_norm/mean'. They stay if
            none of the norm's own parameters is trained.

    Raises:
        ConfigError: A pattern matches nothing, or there is none between the commas.
    """
    trained: set[str] = set()
    for pattern in filter(None, (part.strip() for part in trainable.split(','))):
        matched = [name for name in parameters if _matches(name, pattern)]
        if not matched:
            blocks = ', '.join(dict.fromkeys(name.split('/')[0] for name in parameters))
            raise ConfigError(
                f'optimizer.trainable={trainable!r}: {pattern!r} matches no parameter; there are the blocks {blocks}, '
                f"with names such as '{parameters[0]}'"
            )
        trained.update(matched)
    if not trained:
        if trainable:
            raise ConfigError(f"optimizer.trainable={trainable!r} names nothing; '' trains everything")
        return frozenset()
    norms = {name.rpartition('/')[0] for name in trained}
    return frozenset(parameters) - trained | {name for name in statistics if name.rpartition('/')[0] not in norms}


def leave_out(params: Tree, frozen: Collection[str]) -> Tree:
    """Returns a tree of parameters {block: …} with None in the place of the frozen ones."""

    def choose(path: tuple[jax.tree_util.KeyEntry, ...], leaf: jax.Array) -> jax.Array | None:
        return None if jax.tree_util.keystr(path, simple=True, separator='/') in frozen else leaf

    return jax.tree_util.tree_map_with_path(choose, params)


def join(trained: Tree, params: Tree) -> Tree:
    """Puts those of `params` where `trained` has None."""
    return jax.tree.map(lambda whole, part: whole if part is None else part, params, trained)


def hold(new: Tree, old: Tree, packing: StagedPacking, frozen: Collection[str]) -> Tree:
    """Returns `new` with the rows of frozen arrays as in `old`.

    Args:
        new: A tree of which every packed array [rows, ROW] is seen to; the rest, such as counts, passes.
        old: Likewise.
        packing: Of those arrays.
        frozen: Names of arrays; of other packings too.
    """
    if not frozen.intersection(packing.names):
        return new
    rows = packing.own(packing.rows_of(frozen))
    return jax.tree.map(lambda n, o: jnp.where(rows, o, n) if n.shape == packing.shape else n, new, old)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f'{pattern}/*')
