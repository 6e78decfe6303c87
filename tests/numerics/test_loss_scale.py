import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientnet.errors import ConfigError
from efficientnet.numerics.loss_scale import LossScale, all_finite
from efficientnet.parallel.packing import ROW


def run(config, finite):
    """The scales after each of a series of updates, computed in one compiled scan."""

    def body(state, ok):
        state = config.adjust(state, ok)
        return state, state

    return jax.jit(lambda oks: jax.lax.scan(body, config.init(), oks))(jnp.asarray(finite))


def test_static_never_changes():
    last, states = run(LossScale(), [True, False, True] * 5)
    np.testing.assert_array_equal(states.scale, 128.0)
    assert last.good_steps == 0


def test_dynamic_against_a_plain_loop():
    config = LossScale('dynamic', initial=16.0, growth_interval=3, factor=4.0, min=2.0, max=256.0)
    finite = np.random.default_rng(0).random(300) < 0.8
    scale, good, expected = 16.0, 0, []
    for ok in finite:
        if not ok:
            scale, good = max(scale / 4, 2.0), 0
        else:
            good += 1
            if good == 3:
                scale, good = min(scale * 4, 256.0), 0
        expected.append((scale, good))
    _, states = run(config, finite)
    np.testing.assert_array_equal(np.stack([states.scale, states.good_steps], 1), expected)
    assert {2.0, 256.0} <= set(states.scale.tolist())


def test_default_interval():
    last, states = run(LossScale('dynamic'), [True] * 2001)
    assert states.scale[1998] == 128
    assert states.scale[1999] == 256
    assert (last.scale, last.good_steps) == (256, 1)


def test_state_has_fixed_types():
    state = LossScale('dynamic').init()
    after = LossScale('dynamic').adjust(state, jnp.asarray(False))
    for old, new in zip(state, after, strict=True):
        assert (old.dtype, old.shape, old.weak_type) == (new.dtype, new.shape, new.weak_type)


@pytest.mark.parametrize(
    ('settings', 'match'),
    [
        ({'kind': 'fixed'}, "loss_scale='fixed'.*static, dynamic"),
        ({'initial': 100.0}, 'precision.initial_loss_scale=100.0.*power of two'),
        ({'initial': float('inf')}, 'initial_loss_scale=inf'),
        ({'initial': 0.0}, 'initial_loss_scale=0.0'),
        ({'initial': -2.0}, 'initial_loss_scale=-2.0'),
        ({'initial': 0.5}, r'initial_loss_scale=0.5.*1\.0 …'),
        ({'max': 64.0}, 'initial_loss_scale=128.0'),
        ({'factor': 1.0}, 'factor=1.0'),
        ({'growth_interval': 0}, 'growth_interval=0'),
    ],
)
def test_mistakes(settings, match):
    with pytest.raises(ConfigError, match=match):
        LossScale(**settings)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize('bad', [jnp.inf, -jnp.inf, jnp.nan])
def test_all_finite_sees_one_bad_number(dtype, bad):
    good = {'a': jnp.ones((3, 4), dtype), 'count': jnp.int32(7), 'key': jax.random.key(0), 'none': jnp.zeros((0,))}
    assert jax.jit(all_finite)(good)
    assert not jax.jit(all_finite)(good | {'b': [jnp.ones((5,), dtype).at[4].set(bad)]})
    packed = jnp.ones((7, ROW), dtype)
    assert jax.jit(all_finite)(good | {'packed': packed})
    for place in ((0, 0), (3, 100), (6, ROW - 1)):
        assert not jax.jit(all_finite)(good | {'packed': packed.at[place].set(bad)})


def test_all_finite_of_nothing():
    assert all_finite({})
    assert all_finite({'count': jnp.int32(1)})
