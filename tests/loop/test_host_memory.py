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

PIECES = """
import ctypes, sys
from efficientnet.loop.host_memory import keep_freed_memory, retire_pieces
if sys.argv[1] == 'keep':
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def resident():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS'))
blocks = [libc.malloc(10_000 + 16 * (i % 997)) for i in range(20_000)]
for block in blocks:
    ctypes.memset(block, 1, 10_000)
for block in blocks[::2]:
    libc.free(block)
before = resident()
retire_pieces()
given_back = before - resident()
later = [libc.malloc(size) for size in range(1_500, 26_000, 10)]
print(sum(block < max(blocks) for block in later), given_back)
assert all(ctypes.string_at(block, 10_000) == bytes([1]) * 10_000 for block in blocks[1::2])
"""
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='mallopt is of glibc')


@on_glibc
def test_pieces_are_neither_used_nor_resident_any_more():
    def run(how: str) -> tuple[int, int]:
        done = subprocess.run([sys.executable, '-c', PIECES, how], capture_output=True, text=True, check=True)
        return tuple(map(int, done.stdout.split()))

    below, given_back = run('keep')
    assert below == 0
    assert given_back > 40_000  # KiB, of the 10,000 pieces of 10 to 26 kB, which hold two to six whole pages each
    below, given_back = run('plain')
    assert below > 1_000
    assert given_back < 1_000


@on_glibc
def test_memory_that_was_freed_is_not_fetched_again():
    found = {}
    for how in ('keep', 'plain'):
        done = subprocess.run([sys.executable, '-c', FAULTS, how], capture_output=True, text=True, check=True)
        found[how] = int(done.stdout)
    assert found['keep'] < 100
    assert found['plain'] > found['keep']  # 16384, or 32 with transparent huge pages


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
