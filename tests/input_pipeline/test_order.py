"""The order of examples: a permutation an epoch, every position computable alone, for any process count."""

import hashlib

import numpy as np
import pytest

from input_pipeline import order


@pytest.mark.parametrize('n', [1, 2, 7, 1000])
def test_an_epoch_visits_every_example_once(n):
    for epoch in range(3):
        assert sorted(order.epoch_order(3, epoch, n)) == list(range(n))


def test_orders_differ_between_epochs_and_seeds_and_are_cached_read_only():
    orders = [order.epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.01
    with pytest.raises(ValueError, match='read-only'):
        orders[0][0] = 1


def test_the_order_never_changes():
    # A new hash means that every run resumed across this change sees other examples than it should.
    digest = hashlib.sha256(order.epoch_order(7, 2, 10_000).astype('<i8').tobytes())
    digest.update(order.augmentation_seeds(7, 2, 10_000).astype('<u4').tobytes())
    assert digest.hexdigest()[:16] == 'e6e9426ca170ca1e'


def test_every_64_bit_seed_is_its_own():
    top = 2**64 - 1
    assert (order.epoch_order(top, 0, 100) != order.epoch_order(top - 1, 0, 100)).any()


def test_orders_are_uniform():
    # Where example 0 lands over 2,000 epochs: chi-square with 9 degrees of freedom stays below 27.9 (p = .001).
    counts = np.bincount([int(np.flatnonzero(order.epoch_order(5, e, 10) == 0)[0]) for e in range(2000)])
    assert ((counts - 200) ** 2 / 200).sum() < 27.9


def test_augmentation_seeds_belong_to_the_example_not_to_its_place():
    seeds = order.augmentation_seeds(1, 0, 100)
    assert seeds.dtype == np.uint32
    assert seeds.shape == (100, 2)
    indices, drawn = order.stream_rows(1, np.arange(100), 100)
    np.testing.assert_array_equal(drawn, seeds[indices])
    assert len(np.unique(seeds)) == 200
    assert 0.45 < seeds.mean() / 2**32 < 0.55


def test_the_stream_straddles_epochs_and_any_position_can_be_computed_alone():
    n = 10
    whole, seeds = order.stream_rows(1, np.arange(35), n)
    expected = np.concatenate([order.epoch_order(1, e, n) for e in range(4)])[:35]
    np.testing.assert_array_equal(whole, expected)
    for p in (0, 9, 10, 34):
        index, seed = order.stream_rows(1, np.array([p]), n)
        assert index[0] == whole[p]
        np.testing.assert_array_equal(seed[0], seeds[p])


@pytest.mark.parametrize('process_count', [1, 2, 3, 6])
def test_processes_share_every_batch_in_order(process_count):
    global_batch, batches = 12, 5
    local = global_batch // process_count
    parts = [
        order.process_positions(np.arange(batches * local), global_batch, k, process_count).reshape(batches, local)
        for k in range(process_count)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1).ravel(), np.arange(batches * global_batch))


def test_one_sequential_pass_is_padded_with_minus_one():
    indices, seeds = order.sequential_rows(np.arange(3, 8), 6)
    np.testing.assert_array_equal(indices, [3, 4, 5, -1, -1])
    assert not seeds.any()
