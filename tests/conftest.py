"""Every test runs under the rules that keep a 16-bit codebase honest.

Strict dtype promotion turns a silent 16-bit -> fp32 upcast into an error, rank promotion "raise" does the
same for accidental broadcasting, and eight virtual CPU devices stand in for a machine with accelerators.
"""

import gc
import os
import pathlib

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Most of a test's time went into optimising programs that then run for milliseconds, here and in the processes that
# tests start. `make test-slow` sets this to nothing and so runs what users run.
QUICK = ('backend_optimization_level=0', 'llvm_disable_expensive_passes=true', 'cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(f'--xla_{flag}' for flag in QUICK))
# Tests compile the same small programs many times over.
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(pathlib.Path(__file__).parent.parent / '.pytest_cache' / 'xla')

import jax
import pytest

jax.config.update('jax_num_cpu_devices', int(os.environ.get('TEST_DEVICES', '8')))
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
CACHED_FROM = 0.1  # seconds of compiling

# Every compiled program takes memory mappings, of which Linux lets a process have 65,530; without any left it crashes.
MAPPINGS = pathlib.Path('/proc/self/maps')
MANY = 20_000


@pytest.fixture(autouse=True)
def _programs_are_cached():
    """Whatever a test before has traced: programs that call oneDNN end the writing for their own process."""
    jax.config.update('jax_persistent_cache_min_compile_time_secs', CACHED_FROM)


@pytest.fixture(autouse=True)
def _few_mappings():
    """Forgets compiled programs when there are many."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b'\n') > MANY:
        jax.clear_caches()
        gc.collect()
