import itertools
import threading

import jax
import numpy as np
import pytest

from efficientnet.parallel.grid import Grid
from efficientnet.parallel.layout import Layout
from input_pipeline.errors import DataError


def grid(replicas=4, splits=()):
    return Grid(Layout(replicas=replicas, micro_batch=2, accumulation=3, splits=splits))


@pytest.mark.parametrize('splits', [(), ('block4a',)])
def test_place_and_fetch(splits):
    stages = len(splits) + 1
    tree = {'a': np.arange(6 * stages, dtype=np.float16).reshape(stages, 2, 3), 'b': np.full(stages, 7), 'none': {}}
    placed = grid(splits=splits).place(tree)
    assert placed['a'].shape == (4 * stages, 2, 3)
    assert placed['b'].shape == (4 * stages,)
    for i, shard in enumerate(placed['a'].addressable_shards):
        assert shard.device == jax.devices()[i]
        np.testing.assert_array_equal(shard.data[0], tree['a'][i % stages])
    jax.tree.map(np.testing.assert_array_equal, grid(splits=splits).fetch(placed), tree)


def test_what_was_placed_can_be_donated():
    whole = np.zeros(2**12 + 16, np.float32)
    start = -whole.ctypes.data % 64 // 4
    rows = whole[start : start + 2**12].reshape(1, 16, 256)  # aligned as XLA wants it, so that it could be shared
    one = Grid(Layout(replicas=1, micro_batch=2, accumulation=1, splits=()))
    placed = one.place(rows)
    program = one.compile(lambda x: x + 1, jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), donate_argnums=0)
    pointer = placed.addressable_shards[0].data.unsafe_buffer_pointer()
    done = program(placed)
    assert done.addressable_shards[0].data.unsafe_buffer_pointer() == pointer
    assert done.sum() == 2**12
    assert rows.sum() == 0


def test_stages_share_the_rows_of_their_replica():
    rows = np.arange(1, 13)
    placed = grid(replicas=2, splits=('block3a', 'block4a', 'block5a')).shard({'label': rows})['label']
    np.testing.assert_array_equal(placed, [[1, 2], [3, 4], [5, 6], [0, 0], [7, 8], [9, 10], [11, 12], [0, 0]])


def test_rows_go_to_replicas_in_order():
    rows = np.arange(24).reshape(24, 1)
    placed = grid().shard({'image': rows})['image']
    assert placed.shape == (4, 6, 1)
    for replica, shard in enumerate(placed.addressable_shards):
        assert shard.device == jax.devices()[replica]
        np.testing.assert_array_equal(np.asarray(shard.data)[0, :, 0], np.arange(6) + 6 * replica)


def test_programs_have_the_axis_and_prefetched_batches_are_in_place():
    batches = [{'x': np.full((8, 2), i, np.float32)} for i in range(5)]
    shapes = {'x': jax.ShapeDtypeStruct((2, 2), np.float32)}
    double = grid().compile(lambda batch: jax.lax.psum(batch['x'].sum(), 'grid'), shapes, out_axes=None)
    with jax.transfer_guard('disallow'):
        sums = [double(batch) for batch in grid().prefetch(batches, 2)]
    assert [float(total) for total in sums] == [16.0 * i for i in range(5)]


def test_prefetch_stays_ahead_and_ends():
    taken, third = [], threading.Event()

    def batches():
        for i in range(4):
            taken.append(i)
            if i == 2:
                third.set()
            yield {'x': np.full((4, 1), i)}

    stream = grid().prefetch(batches(), 2)
    first = next(stream)
    assert third.wait(60)
    assert taken == [0, 1, 2]
    seen = [first, *stream]
    assert [int(batch['x'][0, 0, 0]) for batch in seen] == [0, 1, 2, 3]
    assert list(grid().prefetch([], 3)) == []
    assert len(list(grid().prefetch([{'x': np.zeros((4, 1))}] * 3, 0))) == 3


def test_what_goes_wrong_with_a_batch_is_raised_in_its_place_and_no_thread_is_left():
    def batches():
        yield {'x': np.zeros((4, 1))}
        raise DataError('a damaged image')

    before = threading.active_count()
    stream = grid().prefetch(batches(), 2)
    next(stream)
    with pytest.raises(DataError, match='a damaged image'):
        next(stream)
    endless = grid().prefetch(itertools.repeat({'x': np.zeros((4, 1))}), 2)
    next(endless)
    endless.close()
    assert threading.active_count() == before
