"""Keeps memory that a CPU program has freed for the next one, and what a compiler has left in pieces out of its way.

XLA asks for a program's temporaries anew at every call. The C library returns blocks of that size to the kernel as
soon as they are freed, and getting them back costs a page fault, and the zeroing of a page, every 4 KiB: a fourth
of the processor time of an update of B0 (128 pixels, batch 8, 217 MiB of temporaries).

Compiling the recipe for the digits leaves 139,000 free blocks of 1.6 GiB in all, and malloc walks along lists of them
for every temporary: a third of the processor time, and with the waiting for its lock half of the speed.
"""

import ctypes
import importlib.util
import os
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # options of mallopt(3), from malloc.h
LARGE = 2**31 - 1
LARGEST_PIECE, SMALLEST_PIECE = 2**30, 2**10  # bytes; malloc finds the smaller ones without a walk

_keeps = False  # whether malloc has been told to


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
    global _keeps
    if platform.libc_ver()[0] == 'glibc':
        libc = ctypes.CDLL(None)
        for option, value in ((ARENA_MAX, 1), (MMAP_THRESHOLD, LARGE), (TRIM_THRESHOLD, LARGE)):
            libc.mallopt(option, value)
        _keeps = True


def retire_pieces() -> None:
    """Takes out of use what is free between blocks in use; to be called when everything has been compiled.

    The kernel gets the pages back first. Then the pieces are allocated, from the largest to the smallest, and neither
    written nor freed, so that they cost addresses and no memory, and later blocks come from one connected region above
    them. Does nothing unless `keep_freed_memory` has put everything into one arena.
    """
    if not _keeps:
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.malloc_trim(ctypes.c_size_t(0))
    end = libc.sbrk(0) - os.sysconf('SC_PAGESIZE')  # less than a page is left of the region that grows
    size = LARGEST_PIECE
    while size >= SMALLEST_PIECE:
        block = libc.malloc(size)
        if block is None or block + size > end:  # no piece is as large any more
            libc.free(block)
            size //= 2
