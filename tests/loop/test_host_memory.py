import platform
import subprocess
import sys

import pytest

from efficientnet.loop.host_memory import computes_on_cpu

FAULTS = """
import resource, sys
import numpy as np
from efficientnet.loop.host_memory import keep_freed_memory
if sys.argv[1] == 'keep':
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    before = faults()
    np.zeros(1, np.uint8), np.empty(2**26, np.uint8).fill(1)
print(faults() - before)
"""

PROGRAM = """
import resource, sys
from efficientnet.loop.host_memory import keep_freed_memory
if sys.argv[1] == 'keep':
    keep_freed_memory()
import jax
jax.config.update('jax_platforms', 'cpu')
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
@jax.jit
def program(x):  # the second sum waits for the first, so that all of y is stored: 144 MiB
    y = jax.lax.optimization_barrier(x[:, None] * x[None])
    return (y / y.sum()).sum(0)
x = jax.numpy.ones(2**12 + 2**11, jax.numpy.float32)
for call in range(20):
    if call == 10:
        before = faults()
    x = program(x)  # the last call's result, as a state that is updated
    x.block_until_ready()
print(faults() - before, program.lower(x).compile().memory_analysis().temp_size_in_bytes)
"""
THREADS = """
import ctypes, threading
from efficientnet.loop.host_memory import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def resident():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS'))
def fill():
    blocks = [libc.malloc(100_000) for _ in range(300)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks[:-1]:  # the last, still in use, keeps the others from joining what is free above them
        libc.free(block)
before = resident()
thread = threading.Thread(target=fill)
thread.start()
thread.join()
kept = resident()
give_back_freed_memory()
print(kept - before, kept - resident())
"""
TRACES = """
import sys
from efficientnet.loop.host_memory import give_back_freed_memory, keep_freed_memory
if sys.argv[1] == 'keep':
    keep_freed_memory()
import jax
traced = []
function = jax.jit(lambda x: traced.append(x) or x + 1)
assert function(1.0) == 2
give_back_freed_memory()
assert function(1.0) == 2
print(len(traced))
"""
ROOM = """
import ctypes
from efficientnet.loop.host_memory import keep_freed_memory, make_room
keep_freed_memory()
libc = ctypes.CDLL(None)
for function in (libc.memalign, libc.malloc, libc.sbrk):
    function.restype = ctypes.c_void_p
def resident():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS'))
before = resident()
make_room(2**26)
made, end = resident() - before, libc.sbrk(0)
block = libc.memalign(64, 2**26)
print(made, libc.sbrk(0) - end, block % 64, end - block)
"""
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='mallopt is of glibc')


@on_glibc
def test_memory_that_was_freed_is_not_fetched_again():
    found = {}
    for how in ('keep', 'plain'):
        done = subprocess.run([sys.executable, '-c', FAULTS, how], capture_output=True, text=True, check=True)
        found[how] = int(done.stdout)
    assert found['keep'] < 100
    assert found['plain'] > found['keep']  # 16384, or 32 with transparent huge pages


@on_glibc
def test_a_program_gets_its_temporaries_back():
    found = {}
    for how in ('keep', 'plain'):
        done = subprocess.run([sys.executable, '-c', PROGRAM, how], capture_output=True, text=True, check=True)
        found[how], temporaries = map(int, done.stdout.split())
        assert temporaries > 2**26  # what malloc reuses in the main thread's arena only
    # 368,640, or 720 with transparent huge pages; a block that does not fit by some bytes is fetched once more
    assert found['plain'] > 4 * found['keep']


@on_glibc
def test_what_threads_left_is_given_back():
    done = subprocess.run([sys.executable, '-c', THREADS], capture_output=True, text=True, check=True)
    kept, given_back = map(int, done.stdout.split())
    assert kept > 25_000  # KiB of 29,297
    assert given_back > 25_000


@on_glibc
def test_traces_are_forgotten_by_a_command_and_by_nobody_else():
    found = {}
    for how in ('keep', 'plain'):
        done = subprocess.run([sys.executable, '-c', TRACES, how], capture_output=True, text=True, check=True)
        found[how] = int(done.stdout)
    assert found == {'keep': 2, 'plain': 1}


@on_glibc
def test_room_is_a_free_block_apart_from_the_end_of_the_heap():
    done = subprocess.run([sys.executable, '-c', ROOM], capture_output=True, text=True, check=True)
    made, moved, offset, above = map(int, done.stdout.split())
    assert made < 1000  # KiB: nothing of it was touched
    assert moved == offset == 0  # the request found it
    assert above > 2**26 + 2**20  # and something lies between it and the end


@pytest.mark.parametrize(
    ('asked', 'installed', 'expected'),
    [
        ('', (), True),
        ('cpu', ('jax_plugins',), True),
        ('', ('jax_plugins',), False),
        ('', ('libtpu',), False),
        ('cuda', (), False),
        ('cuda,cpu', ('jax_plugins',), False),
    ],
)
def test_who_computes(monkeypatch, asked, installed, expected):
    monkeypatch.setenv('JAX_PLATFORMS', asked)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: name if name in installed else None)
    assert computes_on_cpu() is expected
