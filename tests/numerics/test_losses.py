"""Loss and hits against plain numpy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from efficientnet.errors import ConfigError
from efficientnet.numerics.losses import cross_entropy, hits


def reference_loss(logits, target, smoothing, over):
    """`target` [N, classes]: how much of every class."""
    logits = logits.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    classes = logits.shape[1]
    if over == 'all':
        smoothed = (1 - smoothing) * target + smoothing / classes
    else:
        smoothed = (1 - smoothing) * target + smoothing / max(classes - 1, 1) * (1 - target)
    return -(smoothed * np.log(p)).sum(-1)


@pytest.mark.parametrize('over', ['others', 'all'])
@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.9])
@pytest.mark.parametrize('classes', [2, 10, 1000])
def test_cross_entropy(smoothing, classes, over):
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((7, classes)) * 5).astype(np.float32)
    labels = rng.integers(0, classes, 7).astype(np.int32)
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing, over)
    expected = reference_loss(logits, np.eye(classes)[labels], smoothing, over)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize('over', ['others', 'all'])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize(('classes', 'k'), [(2, 4), (10, 1), (10, 2), (1000, 4)])
def test_weighted_labels(classes, k, smoothing, over):
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((7, classes)) * 5).astype(np.float32)
    labels = rng.integers(0, classes, (7, k)).astype(np.int32)
    weights = rng.dirichlet(np.ones(k), 7).astype(np.float32)
    target = (np.eye(classes)[labels] * weights[:, :, None]).sum(1)
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing, over, jnp.asarray(weights))
    np.testing.assert_allclose(found, reference_loss(logits, target, smoothing, over), rtol=2e-5)


def test_one_label_with_all_the_weight_is_that_label():
    logits, labels = jnp.asarray(np.random.default_rng(2).standard_normal((5, 10)), jnp.float32), jnp.arange(5)
    alone = cross_entropy(logits, labels, 0.1)
    np.testing.assert_array_equal(cross_entropy(logits, labels[:, None], 0.1, weights=jnp.ones((5, 1))), alone)


def test_unknown_smoothing():
    with pytest.raises(ConfigError, match=r'augment\.smoothing_over'):
        cross_entropy(jnp.zeros((1, 2)), jnp.array([0]), 0.1, 'some')


def test_large_logits_do_not_overflow():
    logits = jnp.array([[60000.0, -60000.0, 0.0]])
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([2])), [60000.0])


def test_hits_against_sorting():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((200, 12)).astype(np.float32)
    labels = rng.integers(0, 12, 200).astype(np.int32)
    for k in (1, 5, 12):
        best = np.argsort(-logits, kind='stable')[:, :k]
        expected = (best == labels[:, None]).any(1)
        np.testing.assert_array_equal(hits(jnp.asarray(logits), jnp.asarray(labels), k), expected)


def test_ties_go_to_the_first_class():
    logits = jnp.zeros((3, 3))
    np.testing.assert_array_equal(hits(logits, jnp.array([0, 1, 2]), 1), [True, False, False])
    np.testing.assert_array_equal(hits(logits, jnp.array([0, 1, 2]), 2), [True, True, False])


@pytest.mark.parametrize('row', [[np.nan] * 3, [np.nan, 1.0, 2.0], [1.0, np.nan, 2.0]])
def test_nan_is_never_a_hit(row):
    nan_label = [i for i, value in enumerate(row) if np.isnan(value)]
    for label in nan_label:
        assert not hits(jnp.array([row]), jnp.array([label]), 1)[0]
    for label in range(3):
        assert not hits(jnp.array([row]), jnp.array([label]), 5)[0]
    assert not hits(jnp.array([[np.nan, 0.0, -1.0]]), jnp.array([1]), 1)[0]


def test_fewer_classes_than_k():
    assert hits(jnp.array([[0.0, 1.0]]), jnp.array([0]), 5)[0]
