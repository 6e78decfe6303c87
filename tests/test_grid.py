import jax
import numpy as np

from efficientnet.grid import Grid
from efficientnet.layout import Layout


def grid(replicas=4):
    return Grid(Layout(replicas=replicas, stages=1, micro_batch=2, accumulation=3))


def test_replicate_and_fetch():
    tree = {'a': np.arange(6, dtype=np.float16).reshape(2, 3), 'b': np.int32(7), 'none': {}}
    placed = grid().replicate(tree)
    assert placed['a'].shape == (4, 2, 3)
    assert {shard.device for shard in placed['a'].addressable_shards} == set(jax.devices()[:4])
    jax.tree.map(np.testing.assert_array_equal, grid().fetch(placed), tree)


def test_rows_go_to_replicas_in_order():
    rows = np.arange(24).reshape(24, 1)
    placed = grid().shard({'image': rows})['image']
    assert placed.shape == (4, 6, 1)
    for replica, shard in enumerate(placed.addressable_shards):
        assert shard.device == jax.devices()[replica]
        np.testing.assert_array_equal(np.asarray(shard.data)[0, :, 0], np.arange(6) + 6 * replica)


def test_pmap_has_the_axis_and_prefetched_batches_are_in_place():
    batches = [{'x': np.full((8, 2), i, np.float32)} for i in range(5)]
    double = grid().pmap(lambda batch: jax.lax.psum(batch['x'].sum(), 'grid'), out_axes=None)
    with jax.transfer_guard('disallow'):
        sums = [double(batch) for batch in grid().prefetch(batches, 2)]
    assert [float(total) for total in sums] == [16.0 * i for i in range(5)]


def test_prefetch_stays_ahead_and_ends():
    taken = []

    def batches():
        for i in range(4):
            taken.append(i)
            yield {'x': np.zeros((4, 1))}

    stream = grid().prefetch(batches(), 2)
    next(stream)
    assert taken == [0, 1, 2]
    assert sum(1 for _ in stream) == 3
    assert list(grid().prefetch([], 3)) == []
