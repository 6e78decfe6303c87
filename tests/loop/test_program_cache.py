import jax
import pytest

from efficientnet.loop.program_cache import keep_programs

OPTIONS = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')


@pytest.fixture(autouse=True)
def _options():
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ('told', 'given', 'root', 'folder'),
    [
        (None, '', '/root', '/root/efficientnet-jax/xla'),
        (None, '', '', '/home/anna/.cache/efficientnet-jax/xla'),
        ('/told', '', '/root', '/told'),
        ('/told', '/given', '/root', '/given'),
    ],
)
def test_programs_are_kept(monkeypatch, told, given, root, folder):
    monkeypatch.setenv('HOME', '/home/anna')
    monkeypatch.setenv('XDG_CACHE_HOME', root)
    jax.config.update('jax_compilation_cache_dir', told)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 9.0)
    keep_programs(given)
    assert jax.config.jax_compilation_cache_dir == folder
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.2
