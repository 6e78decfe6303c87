"""Keeps memory that a CPU program has freed for the next one.

XLA asks for a program's temporaries anew at every call. The C library returns blocks of that size to the kernel as
soon as they are freed, and getting them back costs a page fault, and the zeroing of a page, every 4 KiB: a fourth
of the processor time of an update of B0 (128 pixels, batch 8, 217 MiB of temporaries).
"""

import ctypes
import importlib.util
import os
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # options of mallopt(3), from malloc.h
LARGE = 2**31 - 1


def computes_on_cpu() -> bool:
    """Tells whether JAX will find nothing but the CPU, without starting it: told so, or no plugin is installed."""
    asked = os.environ.get('JAX_PLATFORMS', '')
    plugins = any(importlib.util.find_spec(name) for name in ('jax_plugins', 'libtpu'))
    return asked == 'cpu' or not (asked or plugins)


def keep_freed_memory() -> None:
    """Has malloc keep what is freed; does nothing where the C library is not glibc.

    On a machine with accelerators there is nothing to gain, and threads that decode images would wait for each other.

    Freed memory is reused only within an arena and every arena but the first takes large blocks from the kernel, so
    all threads share the first. To be called before other threads have started.
    """
    if platform.libc_ver()[0] == 'glibc':
        libc = ctypes.CDLL(None)
        for option, value in ((ARENA_MAX, 1), (MMAP_THRESHOLD, LARGE), (TRIM_THRESHOLD, LARGE)):
            libc.mallopt(option, value)
