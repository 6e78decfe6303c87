"""Every test runs under the rules that keep a 16-bit codebase honest.

Strict dtype promotion turns a silent 16-bit -> fp32 upcast into an error, rank promotion "raise" does the
same for accidental broadcasting, and eight virtual CPU devices stand in for a machine with accelerators.
"""

import os
import pathlib

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax

jax.config.update('jax_num_cpu_devices', int(os.environ.get('TEST_DEVICES', '8')))
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tests compile the same small programs many times over.
jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(__file__).parent.parent / '.pytest_cache' / 'xla'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
