"""What a backward function needs to run later, as one array of bytes that can be kept, sent or saved.

`jax.vjp` returns a function that is a pytree: the arrays it holds on to are its leaves. They differ from stage to
stage in number, shape and dtype, while devices under one `pmap` keep arrays of one shape.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


class Residuals:
    """Where the arrays that a backward function needs lie in one array of bytes; parameters are not among them.

    Args:
        pull: The function back, as `jax.vjp` returns it.
        params: The parameters it was made with.
    """

    def __init__(self, pull: Callable, params: Tree) -> None:
        leaves, self._structure = jax.tree.flatten(pull)
        self._params = self._which(leaves, params)
        self._shapes = [jax.typeof(leaf) for leaf, i in zip(leaves, self._params, strict=True) if i is None]
        self.size = sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in self._shapes)

    def pack(self, pull: Callable) -> jax.Array:
        """Returns the bytes of another backward function of the same stage, uint8 [size]."""
        leaves = [leaf for leaf, i in zip(jax.tree.leaves(pull), self._params, strict=True) if i is None]
        return jnp.concatenate([jnp.zeros(0, jnp.uint8), *map(_to_bytes, leaves)])  # a frozen first stage has none

    def unpack(self, data: jax.Array, params: Tree) -> Callable:
        """Returns the backward function again, from its bytes (and what pads them) and the parameters."""
        own, leaves, start, shapes = jax.tree.leaves(params), [], 0, iter(self._shapes)
        for i in self._params:
            if i is None:
                shape = next(shapes)
                size = math.prod(shape.shape) * shape.dtype.itemsize
                leaves.append(_from_bytes(data[start : start + size], shape))
                start += size
            else:
                leaves.append(own[i])
        return jax.tree.unflatten(self._structure, leaves)

    @staticmethod
    def _which(leaves: list, params: Tree) -> list[int | None]:
        places = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(params))}
        return [places.get(id(leaf)) for leaf in leaves]


def _to_bytes(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(-1)


def _from_bytes(data: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    if like.dtype == jnp.bool_:
        return data.reshape(like.shape).astype(jnp.bool_)
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        raw = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(like.shape, like.dtype))
        return jax.random.wrap_key_data(_from_bytes(data, raw))
    size = like.dtype.itemsize
    return jax.lax.bitcast_convert_type(data.reshape(*like.shape, *((size,) if size > 1 else ())), like.dtype)
