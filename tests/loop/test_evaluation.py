"""Evaluation counts every example once, on one device or eight, and agrees with a plain loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientnet.loop.evaluation import run_evaluation
from efficientnet.loop.programs import compile_evaluate, compile_gather
from efficientnet.parallel.accumulation import normalise
from input_pipeline.sources import WHOLE_IMAGE, Examples
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
    logits = np.asarray(jax.jit(parts.model.apply)(parts.init_variables(), x), np.float64)
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


class Sets:
    """Twenty-three pictures with sets of up to three of ten classes, six of them with none."""

    name, classes, num_examples, image_shape, label_sets = 'sets', tuple('0123456789'), 23, (8, 8, 3), True
    images = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), np.uint8)
    labels = np.random.default_rng(1).random((23, 10)) < np.array([0.0, 0.1, 0.2, 0.3])[np.arange(23) % 4, None]

    def read(self, indices):
        """Pictures, sets and boxes."""
        boxes = [WHOLE_IMAGE] * len(indices)
        return Examples(self.images[indices], self.labels[indices].astype(np.uint8), boxes)


def test_any_class_of_a_set_is_right_and_no_class_is_not_counted():
    parts = dataclasses.replace(tiny_parts(blocks=1, replicas=2, evaluation__batch=5), test_source=Sets())
    found = evaluate(parts)
    x = normalise(jnp.asarray(Sets.images), parts.rule.mean, parts.rule.std, jnp.float32)
    logits = np.asarray(jax.jit(parts.model.apply)(parts.init_variables(), x), np.float64)
    best = np.argsort(-logits, kind='stable')
    odds = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows = [i for i in range(23) if Sets.labels[i].any()]
    assert 10 < len(rows) < 20
    want = {
        'loss': np.mean([-np.log(odds[i][Sets.labels[i]].sum()) for i in rows]),
        'accuracy': np.mean([Sets.labels[i, best[i, 0]] for i in rows]),
        'top5': np.mean([Sets.labels[i, best[i, :5]].any() for i in rows]),
        'count': len(rows),
    }
    assert 0 < want['accuracy'] < want['top5'] < 1
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
