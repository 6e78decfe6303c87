"""Evaluation counts every example once, on one device or eight, and agrees with a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientnet.loop.evaluation import run_evaluation
from efficientnet.loop.programs import compile_evaluate, compile_gather
from efficientnet.parallel.accumulation import normalise
from tests.tiny import tiny_parts


def evaluate(parts, stop=lambda: False):
    state = jax.device_get(parts.init_state())
    variables = parts.grid.place({'params': state.params, 'batch_stats': state.batch_stats})
    variables = compile_gather(parts, variables['params'].dtype)(variables)
    return run_evaluation(compile_evaluate(parts), parts.grid, variables, parts.evaluation_batches(), stop=stop)


@pytest.fixture(scope='module')
def expected():
    """Means over the 360 test digits without batches, masks or devices."""
    parts = tiny_parts(blocks=1)
    images, labels = [], []
    for batch in parts.evaluation_batches():
        kept = batch['mask'] > 0
        images.append(np.asarray(batch['image'])[kept])
        labels.append(np.asarray(batch['label'])[kept])
    labels = np.concatenate(labels)
    x = normalise(jnp.asarray(np.concatenate(images)), parts.rule.mean, parts.rule.std, jnp.float32)
    logits = np.asarray(parts.model.apply(parts.init_variables(), x, train=False), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-logits, kind='stable')
    return {
        'loss': -log_p[np.arange(len(labels)), labels].mean(),
        'accuracy': (order[:, 0] == labels).mean(),
        'top5': (order[:, :5] == labels[:, None]).any(1).mean(),
        'count': 360,
    }


@pytest.mark.parametrize(
    ('replicas', 'splits', 'batch'),
    [(1, 'auto', 360), (1, 'auto', 7), (8, 'auto', 60), (8, 'auto', 11), (2, 'auto', 1000), (2, 'block1a,head', 7)],
)
def test_every_example_counts_once(expected, replicas, splits, batch):
    found = evaluate(tiny_parts(blocks=1, replicas=replicas, splits=splits, micro_batch=2, evaluation__batch=batch))
    assert found['count'] == 360
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_it_can_be_given_up():
    asked = iter([False, True])
    assert evaluate(tiny_parts(blocks=1, evaluation__batch=50), stop=lambda: next(asked)) is None
