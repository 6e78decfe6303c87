import jax
import jax.numpy as jnp
import numpy as np

from efficientnet.parallel.packing import ROW, Packings, make_packing


def tree():
    rng = np.random.default_rng(0)
    shapes = {'a': {'kernel': (3, 3, 2, 40), 'bias': (1,)}, 'b': {'scale': (ROW,), 'one': (), 'more': (ROW + 1,)}}
    draw = lambda shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))


def test_round_trip_on_device_and_host():
    packing = make_packing(tree())
    rows = packing.pack(tree(), jnp.float32)
    assert rows.shape == (1, *packing.shape) == (1, 1 + 3 + 2 + 1 + 1, ROW)
    for unpacked in (packing.unpack(rows), packing.unpack(np.asarray(rows))):
        jax.tree.map(np.testing.assert_array_equal, unpacked, tree())
    assert isinstance(jax.tree.leaves(packing.unpack(np.asarray(rows)))[0], np.ndarray)


def test_adding_is_packing_and_adding():
    packing = make_packing(tree())
    (rows,), (part,) = packing.pack(tree(), np.float32), packing.parts
    more = jax.tree.map(lambda leaf: np.float16(-3 * leaf), tree())
    below = np.ones((2, ROW), np.float32)  # other stages have more rows
    found = part.add(jnp.concatenate([rows, below]), more)
    np.testing.assert_array_equal(found, np.concatenate([rows + part.pack(more, np.float32), below]))
    more['a']['kernel'] = None
    np.testing.assert_array_equal(part.add(jnp.asarray(rows), more)[1:4], rows[1:4])


def test_padding_is_zero_and_nothing_is_lost():
    rows = np.asarray(make_packing(tree()).pack(tree(), jnp.float32))
    leaves = jax.tree.leaves(tree())
    assert np.count_nonzero(rows) == sum(leaf.size for leaf in leaves)
    np.testing.assert_allclose(np.sum(np.float64(rows)), sum(leaf.sum(dtype=np.float64) for leaf in leaves), rtol=1e-6)


def test_every_row_has_one_owner():
    packing = make_packing(tree())
    assert packing.names == ('a/bias', 'a/kernel', 'b/more', 'b/one', 'b/scale')
    np.testing.assert_array_equal(packing.owners[0], [0, 1, 1, 1, 2, 2, 3, 4])
    np.testing.assert_array_equal(packing.indices[0], [0, 0, 1, 2, 0, 1, 0, 0])
    rows = packing.pack(tree(), jnp.float32)[0]
    sums = jax.ops.segment_sum(jnp.square(rows).sum(1), packing.owners[0], len(packing.names))
    np.testing.assert_allclose(sums, [np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree())], rtol=1e-5)


def test_an_empty_tree_has_no_rows():
    packing = make_packing({})
    assert packing.pack({}, jnp.float32).shape == (1, *packing.shape) == (1, 0, ROW)
    assert packing.unpack(jnp.zeros((1, 0, ROW))) == {}


def test_shapes_are_enough():
    shapes = jax.eval_shape(tree)
    assert make_packing(shapes) == make_packing(tree())


STAGES = [('a',), ('b', 'c'), ('d',)]


def staged_tree():
    rng = np.random.default_rng(1)
    shapes = {'d': {'w': (5,)}, 'b': {'w': (2 * ROW,)}, 'a': {'w': (ROW + 1,), 'v': ()}, 'c': {'v': (3, 300)}}
    draw = lambda shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))


def test_stages_hold_their_blocks_and_are_as_long_as_the_largest():
    packing = make_packing(staged_tree(), STAGES)
    rows = packing.pack(staged_tree(), jnp.float32)
    assert packing.shape == (2 + 4, ROW)
    assert rows.shape == (3, 6, ROW)
    jax.tree.map(np.testing.assert_array_equal, packing.unpack(rows), staged_tree())
    assert [part.names for part in packing.parts] == [('a/v', 'a/w'), ('b/w', 'c/v'), ('d/w',)]
    np.testing.assert_array_equal(rows[2, 0, :5], staged_tree()['d']['w'])
    assert np.count_nonzero(rows) == packing.size == sum(leaf.size for leaf in jax.tree.leaves(staged_tree()))


def test_tables_of_stages():
    packing = make_packing(staged_tree(), STAGES)
    np.testing.assert_array_equal(packing.counts, [[1, 2], [2, 4], [1, 0]])
    np.testing.assert_array_equal(packing.owners, [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0] * 6])
    np.testing.assert_array_equal(packing.per_array(len, np.int32), [[3, 3], [3, 3], [3, 0]])
    devices = jax.devices()[:6]  # two replicas
    own = jax.pmap(lambda _: packing.own(packing.counts), axis_name='grid', devices=devices)(jnp.zeros(6))
    np.testing.assert_array_equal(own, np.concatenate([packing.counts, packing.counts]))


def test_one_stage_unpacked_from_what_its_device_holds():
    packings = Packings(make_packing(staged_tree(), STAGES), make_packing({}, STAGES))
    rows = {'params': packings.params.pack(staged_tree(), jnp.float32), 'batch_stats': jnp.zeros((3, 0, ROW))}
    for stage, blocks in enumerate(STAGES):
        found = packings.unpack_stage(stage, jax.tree.map(lambda r: r[stage], rows))  # noqa: B023
        expected = {name: staged_tree()[name] for name in blocks}
        jax.tree.map(np.testing.assert_array_equal, found, {'params': expected, 'batch_stats': {}})
