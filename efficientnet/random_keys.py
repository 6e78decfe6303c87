"""Where every random number comes from: (seed, purpose) and then step, sample or name, never the layout."""

import zlib

import jax
import jax.numpy as jnp


def purpose_key(seed: int | jax.Array, purpose: str) -> jax.Array:
    """Returns the typed key of one purpose of a run: 'weights', 'samples' or 'rounding'; an array is [] uint32."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def sample_keys(key: jax.Array, step: jax.Array, samples: jax.Array) -> jax.Array:
    """Returns one typed key a sample.

    Args:
        key: The 'samples' key of the run.
        step: [] int32, weight updates so far.
        samples: [N] int32, rows in the global batch.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), samples)


def layer_keys(sample_keys: jax.Array, layer: str) -> jax.Array:
    """Returns one typed key a sample for whoever has this name: fold_in(sample key, crc32(name)), [N].

    Args:
        sample_keys: [N] typed keys.
        layer: A block, or another consumer such as 'mixup'.
    """
    code = jnp.uint32(zlib.crc32(layer.encode()))
    return jax.vmap(jax.random.fold_in, (0, None))(sample_keys, code)
