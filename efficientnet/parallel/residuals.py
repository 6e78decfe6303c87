"""What a backward function needs to run later, laid out in arrays that can be kept.

`jax.vjp` returns a function that is a pytree: the arrays it holds on to are its leaves. They differ from stage to
stage in number, shape and dtype, while devices under one `pmap` keep arrays of one shape. So they lie end to end in
one array for each size of a number, whatever its dtype: 'uint32' holds fp32 and keys, 'uint16' fp16 and bf16, 'uint8'
masks. Written and read one leaf at a time, none of it is ever in memory twice.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
Stash = dict[str, jax.Array]  # [places, numbers] by dtype


class Residuals:
    """Where the arrays that a backward function needs lie in a place of a stash; parameters are not among them.

    Args:
        pull: The function back, as `jax.vjp` returns it.
        params: The parameters it was made with.

    Attributes:
        sizes: Numbers in a place, by dtype.
    """

    def __init__(self, pull: Callable, params: Tree) -> None:
        leaves, self._structure = jax.tree.flatten(pull)
        places = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(params))}
        self._params = [places.get(id(leaf)) for leaf in leaves]
        self._shapes = [jax.typeof(leaf) for leaf in self._own(leaves)]
        self.sizes: dict[str, int] = {}
        self._starts = []
        for shape in self._shapes:
            raw = jax.eval_shape(_raw, shape)
            self._starts.append(self.sizes.get(str(raw.dtype), 0))
            self.sizes[str(raw.dtype)] = self._starts[-1] + raw.size

    def put(self, pull: Callable, stash: Stash, place: jax.Array) -> Stash:
        """Writes the leaves of another backward function of the same stage into a place of the stash."""
        stash = dict(stash)
        for leaf, start in zip(self._own(jax.tree.leaves(pull)), self._starts, strict=True):
            raw = _raw(leaf)
            name = str(raw.dtype)
            stash[name] = jax.lax.dynamic_update_slice(stash[name], raw[None], (place, start))
        return stash

    def take(self, stash: Stash, place: jax.Array, params: Tree) -> Callable:
        """Returns the backward function again, from a place of the stash and the parameters."""
        own, leaves, kept = jax.tree.leaves(params), [], zip(self._shapes, self._starts, strict=True)
        for i in self._params:
            leaves.append(_read(stash, place, *next(kept)) if i is None else own[i])
        return jax.tree.unflatten(self._structure, leaves)

    def _own(self, leaves: Iterable) -> list:
        return [leaf for leaf, i in zip(leaves, self._params, strict=True) if i is None]


def largest(residuals: Iterable[Residuals]) -> dict[str, int]:
    """Returns the sizes in which each of several has room."""
    sizes: dict[str, int] = {}
    for name, size in itertools.chain.from_iterable(each.sizes.items() for each in residuals):
        sizes[name] = max(size, sizes.get(name, 0))
    return sizes


def _raw(x: jax.Array) -> jax.Array:
    """The bits of x, as unsigned integers of its own size, [numbers]."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}').reshape(-1)


def _read(stash: Stash, place: jax.Array, like: jax.ShapeDtypeStruct, start: int) -> jax.Array:
    raw = jax.eval_shape(_raw, like)
    data = jax.lax.dynamic_slice(stash[str(raw.dtype)], (place, start), (1, raw.size))
    if like.dtype == jnp.bool_:
        return data.reshape(like.shape).astype(jnp.bool_)
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(like.shape, like.dtype))
        return jax.random.wrap_key_data(data.reshape(words.shape))
    return jax.lax.bitcast_convert_type(data.reshape(like.shape), like.dtype)
