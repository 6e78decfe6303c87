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


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='mallopt is of glibc')
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
