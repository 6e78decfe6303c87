import jax.numpy as jnp
import pytest

from efficientnet.errors import ConfigError
from efficientnet.numerics.precision import POLICIES, policy


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
