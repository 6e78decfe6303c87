"""Keeps memory that a CPU program has freed for the next one.

XLA asks for a program's temporaries anew at every call. The C library returns blocks of that size to the kernel as
soon as they are freed, and getting them back costs a page fault, and the zeroing of a page, every 4 KiB: a fourth
of the processor time of an update of B0 (128 pixels, batch 8, 217 MiB of temporaries).
"""

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # options of mallopt(3), from malloc.h
LARGE = 2**31 - 1


def keep_freed_memory() -> None:
    """Has malloc keep what is freed; does nothing where the C library is not glibc.

    Freed memory is reused only within an arena and every arena but the first takes large blocks from the kernel, so
    all threads share the first. To be called before other threads have started.
    """
    if platform.libc_ver()[0] == 'glibc':
        libc = ctypes.CDLL(None)
        for option, value in ((ARENA_MAX, 1), (MMAP_THRESHOLD, LARGE), (TRIM_THRESHOLD, LARGE)):
            libc.mallopt(option, value)
