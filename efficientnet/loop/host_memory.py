"""Keeps memory that a CPU program has freed for the next one.

XLA asks for a program's temporaries anew at every call. The C library returns blocks of that size to the kernel as
soon as they are freed, and getting them back costs a page fault, and the zeroing of a page, every 4 KiB: a fourth
of the processor time of an update of B0 (128 pixels, batch 8, 217 MiB of temporaries).
"""

import ctypes
import importlib.util
import os
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # options of mallopt(3), from malloc.h
LARGE = 2**31 - 1
ALIGNMENT, SLACK = 64, 2**16  # bytes; of what XLA asks for, and more than it asks for
FILLER, MOST_FILLERS = 2**20, 1000  # bytes; smaller ones would fill gaps in pages that were given back

_kept = False  # whether freed memory is kept, which only commands ask for


def computes_on_cpu() -> bool:
    """Tells whether JAX will find nothing but the CPU, without starting it: told so, or no plugin is installed."""
    asked = os.environ.get('JAX_PLATFORMS', '')
    plugins = any(importlib.util.find_spec(name) for name in ('jax_plugins', 'libtpu'))
    return asked == 'cpu' or not (asked or plugins)


def keep_freed_memory() -> None:
    """Has malloc keep what is freed; does nothing where the C library is not glibc.

    To be called before JAX is imported, and only where it computes on the CPU.

    malloc reuses large blocks (above 64 MiB) in the main thread's arena alone. One arena for all threads would do, but
    they wait for each other then, and compiling takes 1.6 to 1.9 times as long. So every thread has its own, and JAX
    runs a program on the thread that calls it, which asks for the temporaries. A program for several devices has
    threads of its own all the same, and fetches large temporaries from the kernel.
    """
    global _kept
    if platform.libc_ver()[0] != 'glibc':
        return
    _kept = True
    libc = ctypes.CDLL(None)
    for option in (MMAP_THRESHOLD, TRIM_THRESHOLD):
        libc.mallopt(option, LARGE)
    import jax

    jax.config.update('jax_cpu_enable_async_dispatch', False)


def give_back_freed_memory() -> None:
    """Returns what is free to the kernel; for after compiling, whose threads leave gigabytes in arenas of their own.

    Where freed memory is kept, JAX forgets what it has traced as well, tens of MiB. Only there, since functions under
    `jax.jit` are traced anew when they are called next, and others than a command may have some.
    """
    if _kept:
        import jax

        jax.clear_caches()
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def make_room(size: int) -> None:
    """Makes a free block of memory for what this thread's programs will ask for again and again; touches none of it.

    glibc asks itself for some more, to align a block, and hands these bytes back at once. If a small request gets them
    meanwhile, the block is too short the next time, and a second one is taken beside it (in three runs of six, for
    B0's temporaries). A block that is longer, and not at the end of the heap, makes that rare (none of seven).

    Args:
        size: Bytes of the largest request; 0 = none will come.
    """
    if platform.libc_ver()[0] != 'glibc' or not 0 < size < LARGE:
        return
    libc = ctypes.CDLL(None)
    for request in (libc.malloc, libc.memalign):
        request.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    block = libc.memalign(ctypes.c_size_t(ALIGNMENT), ctypes.c_size_t(size + SLACK))
    fillers = []
    # Were the block to join the free end of the heap, small requests would come to lie behind what is cut from it. The
    # last filler, of which nothing is touched, keeps it from that and stays.
    while block and len(fillers) < MOST_FILLERS:
        fillers.append(libc.malloc(ctypes.c_size_t(FILLER)))
        if not fillers[-1] or fillers[-1] > block:
            break
    for pointer in (block, *fillers[:-1]):
        libc.free(pointer)
