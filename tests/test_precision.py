import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientnet.errors import ConfigError
from efficientnet.precision import POLICIES, cast_floating, policy


@pytest.mark.parametrize(
    ('name', 'compute', 'master', 'state'),
    [
        ('32.32', 'float32', 'float32', 'float32'),
        ('bf16.32', 'bfloat16', 'float32', 'float32'),
        ('16.32', 'float16', 'float32', 'float32'),
        ('16.16', 'float16', 'float16', 'float16'),
        ('bf16.16', 'bfloat16', 'bfloat16', 'bfloat16'),
    ],
)
def test_table(name, compute, master, state):
    chosen = policy(name)
    assert (chosen.name, chosen.compute, chosen.master, chosen.state) == (name, compute, master, state)
    assert chosen.average == jnp.float32


def test_table_has_no_other_rows():
    assert set(POLICIES) == {'32.32', 'bf16.32', '16.32', '16.16', 'bf16.16'}


def test_unknown_policy_names_the_known():
    with pytest.raises(ConfigError, match=r"'16'.*32\.32, bf16\.32, 16\.32, 16\.16, bf16\.16"):
        policy('16')


def test_cast_floating_leaves_the_rest_alone():
    tree = {
        'weight': np.full((2, 3), 1.0 + 2.0**-12, np.float32),
        'half': jnp.ones((), jnp.bfloat16),
        'count': jnp.asarray(2**30 + 1, jnp.int32),
        'mask': jnp.asarray([True, False]),
        'key': jax.random.key(3),
    }
    cast = cast_floating(tree, jnp.float16)
    assert cast['weight'].dtype == cast['half'].dtype == jnp.float16
    np.testing.assert_array_equal(cast['weight'], np.float16(1.0))
    assert cast['count'] == 2**30 + 1
    assert cast['mask'].dtype == jnp.bool_
    assert cast['key'].dtype == tree['key'].dtype
