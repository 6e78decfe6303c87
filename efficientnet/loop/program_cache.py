"""Where compiled programs lie from one start to the next."""

import os
import pathlib

import jax


def keep_programs(folder: str = '') -> None:
    """Has JAX keep what takes more than a fifth of a second to compile.

    Args:
        folder: Where; '' takes what JAX was told by its environment, or else a folder of the user's cache.
    """
    if not (folder or jax.config.jax_compilation_cache_dir):
        root = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
        folder = str(root / 'efficientnet-jax' / 'xla')
    if folder:
        jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
