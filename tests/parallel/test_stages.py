import itertools
import math
import random

import jax
import jax.numpy as jnp
import pytest

from efficientnet.errors import ConfigError
from efficientnet.model.costs import BlockCost, block_costs
from efficientnet.model.scaling import block_names, model_spec
from efficientnet.numerics.optimizers import OPTIMIZERS, make_optimizer
from efficientnet.numerics.precision import POLICIES
from efficientnet.parallel.packing import make_packing
from efficientnet.parallel.pipeline import NONE, SCHEDULES, timetable
from efficientnet.parallel.stages import (
    BUFFERS,
    MOVED,
    PASSES,
    Storage,
    balance,
    check_splits,
    parse_splits,
    stage_blocks,
    stage_table,
    storage_of,
)

B4 = block_costs(model_spec('b4'), 380)


def random_costs(rng, count, most):
    """Blocks a, b, c, … with small numbers, so that ties are common."""
    numbers = [[rng.randint(0, most) for _ in range(count)] for _ in range(5)]
    return [BlockCost('abcdefgh'[i], *values) for i, values in enumerate(zip(*numbers, strict=True))]


def brute_force(costs, stages, budget=math.inf, **options):
    """All splits, best first by the documented order of criteria, that fit into the budget."""
    found = []
    for cut in itertools.combinations(range(1, len(costs)), stages - 1):
        splits = tuple(costs[i].name for i in cut)
        rows = stage_table(costs, splits, **options)
        work, total, sent = (max(getattr(row, field) for row in rows) for field in ('work', 'total', 'sent'))
        if total <= budget:
            found.append((work, total, sent, cut, splits))
    return sorted(found)


def test_balance_is_the_best_of_all_splits():
    rng = random.Random(0)
    for trial in range(400):
        costs = random_costs(rng, rng.randint(1, 8), rng.choice([1, 3, 1000]))
        stages = rng.randint(1, len(costs))
        options = {
            'recompute': rng.choice(sorted(PASSES)),
            'schedule': rng.choice([*SCHEDULES]),
            'micro_batch': rng.randint(1, 3),
            'storage': Storage(rng.choice([2, 4]), rng.choice([2, 4]), 2, rng.randint(1, 2), rng.randint(0, 2)),
        }
        if trial % 3 == 0:
            options['seconds'] = {block.name: rng.choice([rng.random(), 0.1, 0.2]) for block in costs}
        ranked = brute_force(costs, stages, **options)
        assert balance(costs, stages, **options) == ranked[0][-1]

        totals = [total for _, total, *_ in ranked]
        for budget in {min(totals), rng.choice(totals)}:
            want = brute_force(costs, stages, budget, **options)[0][-1]
            assert balance(costs, stages, budget=budget, **options) == want
        with pytest.raises(ConfigError, match=rf'budget={min(totals) - 1} .* stages={stages}; .* {min(totals)}$'):
            balance(costs, stages, budget=min(totals) - 1, **options)


def block(name, macs=1, parameters=0, boundary=0, kept=0, kept_fp32=0):
    return BlockCost(name, parameters, macs, boundary, kept, kept_fp32)


def test_ties_go_to_memory_then_boundary_then_the_front():
    # The last block alone decides the work; where the first two part is a tie.
    slow = block('d', macs=9)
    assert balance([block('a'), block('b'), block('c'), slow], 3, 'none') == ('b', 'd')
    heavy = [block('a'), block('b', parameters=5), block('c', parameters=5), slow]
    assert balance(heavy, 3, 'none') == ('c', 'd')
    narrow = [block('a'), block('b', boundary=2), block('c', boundary=1), slow]
    assert balance(narrow, 3, 'none') == ('c', 'd')
    # Best by itself would be to cut the rest at c, which holds less; but a holds most anyway, and d is narrower.
    first = block('a', macs=9, parameters=9)
    rest = [block('b', parameters=2), block('c', parameters=2, boundary=9), block('d', parameters=1, boundary=1)]
    assert balance(rest, 2, 'none') == ('c',)
    assert balance([first, *rest], 3, 'none') == ('b', 'd')


def test_recomputation_is_counted_where_it_happens():
    costs = [block(name, macs=10) for name in 'abcd']
    work = {}
    for recompute in PASSES:
        work[recompute] = [row.work for row in stage_table(costs, ('b', 'd'), recompute, micro_batch=2)]
    assert work == {'none': [60, 120, 60], 'stage': [80, 160, 60], 'block': [100, 200, 80]}
    assert [row.work for row in stage_table(costs, (), 'stage')] == [120]
    assert [row.work for row in stage_table(costs, (), 'block')] == [160]
    # What a block keeps takes time too.
    kept = [block('a', macs=10, kept=3), block('b', macs=10, kept_fp32=1)]
    assert [row.work for row in stage_table(kept, ('b',), 'none')] == [30 + 9 * MOVED, 30 + 3 * MOVED]
    assert balance([*kept, block('c', macs=10 + 2 * MOVED)], 2, 'none') == ('b',)
    # Seconds are of a whole micro-batch.
    timed = stage_table(costs, ('b',), micro_batch=2, seconds={'a': 1.0, 'b': 2.0, 'c': 3.0, 'd': 4.0})
    assert [row.work for row in timed] == [4.0, 27.0]
    # The last stage does not go forward again, so it takes a block more.
    assert balance(costs + costs[:3], 2, 'none') == ('d',)
    seven = [block(name, macs=10) for name in 'abcdefg']
    assert balance(seven, 2, 'none') == balance(seven, 2, 'stage') == ('d',)
    assert balance([block(name, macs=10) for name in 'abcdefghi'], 2, 'none') == ('e',)


def test_bytes_by_hand():
    """Three stages of two blocks, in fp16 with fp32 weights."""
    costs = [block(name, 1, i + 1, 10 * (i + 1), 100 * (i + 1), 1000 * (i + 1)) for i, name in enumerate('abcdef')]
    options = {'micro_batch': 3, 'storage': Storage(compute=2, master=4, state=4, buffers=2, averages=1)}

    def columns(recompute, schedule='grouped'):
        rows = stage_table(costs, ('c', 'e'), recompute, schedule=schedule, **options)
        assert [row.total for row in rows] == [row.weights + row.stash + row.activations for row in rows]
        return [[getattr(row, field) for row in rows] for field in ('weights', 'stash', 'activations', 'sent')]

    held = 4 + 2 + 2 * 4 + 4 + 4  # weight, its fp16 copy, optimizer, accumulator, average
    weights, sent = [3 * held, 7 * held, 11 * held], [3 * 2 * 30, 3 * 2 * 50, 0]
    kept = [3 * (2 * 100 + 4 * 1000) * (i + 1) for i in range(6)]
    pairs = [kept[0] + kept[1], kept[2] + kept[3], kept[4] + kept[5]]
    assert columns('stage') == [weights, [0, 2 * 3 * 2 * 30, 0], pairs, sent]
    assert columns('stage', 'sequential') == [weights, [0, 3 * 2 * 30, 0], pairs, sent]
    assert columns('none') == [weights, [4 * pairs[0], 2 * pairs[1], 0], pairs, sent]
    assert columns('none', 'sequential') == [weights, [pairs[0], pairs[1], 0], pairs, sent]
    # The larger block, and the input of the smaller one.
    blocks = [kept[1] + 3 * 2 * 10, kept[3] + 3 * 2 * 30, kept[5] + 3 * 2 * 50]
    assert columns('block') == [weights, [0, 2 * 3 * 2 * 30, 0], blocks, sent]


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('stages', range(1, 6))
def test_the_stash_is_as_deep_as_the_timetable_says(schedule, stages):
    table = timetable(schedule, stages, 20)
    kept = (table.forward != NONE).cumsum(0) - (table.backward != NONE).cumsum(0)
    costs = [block(name, kept=1) for name in 'abcde'[:stages]]
    storage = Storage(compute=1)
    rows = stage_table(costs, tuple('bcde'[: stages - 1]), 'none', schedule=schedule, storage=storage)
    assert [row.stash for row in rows] == kept.max(0).tolist()


def test_optimizers_are_those_there_are():
    assert set(BUFFERS) == set(OPTIMIZERS)


@pytest.mark.parametrize('policy', POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize('optimizer', BUFFERS)
def test_storage_is_what_is_stored(policy, optimizer):
    packing = make_packing({'stem': {'kernel': jnp.zeros(2560)}})
    made = make_optimizer(optimizer, 0.1, policy, 'nearest', jax.random.key(0), packing)
    state = jax.eval_shape(made.init, jax.ShapeDtypeStruct((10, 256), policy.master))
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.size >= 2560)
    copy = 0 if policy.compute == policy.master else policy.compute.itemsize
    storage = storage_of(policy, optimizer, averages=1)
    assert 2560 * storage.parameter == 2560 * (policy.master.itemsize + copy + 4 + 4) + state_bytes
    assert storage.compute == policy.compute.itemsize


def test_b4_in_two_stages():
    """The reference's split is nearly balanced in multiply-adds, because the first stage goes forward twice."""
    names = [cost.name for cost in B4]
    assert balance(B4, 2, 'none') == ('block3d',)
    assert balance(B4, 2, 'stage') == ('block3b',)
    first, second = stage_table(B4, ('block4a',), micro_batch=3)
    assert (first.blocks, second.blocks) == (tuple(names[:11]), tuple(names[11:]))
    assert (first.sent, second.sent) == (774144, 0)
    assert (first.parameters, second.parameters) == (557930, 18770238)
    assert 4 * first.macs / (3 * second.macs) == pytest.approx(4 * 2467 / (3 * 3717), rel=1e-3)
    moved = [sum(cost.kept + cost.kept_fp32 for cost in costs) for costs in (B4[:11], B4[11:])]
    assert first.work == 4 * 3 * (first.macs + MOVED * moved[0])
    assert second.work == 3 * 3 * (second.macs + MOVED * moved[1])
    assert first.stash == second.stash == 0


def test_a_budget_moves_the_splits():
    fullest = max(row.total for row in stage_table(B4, balance(B4, 2)))
    splits = balance(B4, 2, budget=fullest - 1)
    assert splits != balance(B4, 2)
    assert max(row.total for row in stage_table(B4, splits)) < fullest


@pytest.mark.parametrize(
    ('text', 'splits'),
    [
        ('', ()), ('  ', ()), ('()', ()), ((), ()), ([], ()), ('auto', 'auto'), (' auto ', 'auto'), (('auto',), 'auto'),
        ('block4a', ('block4a',)), ('block4a,block6a', ('block4a', 'block6a')), (['block4a'], ('block4a',)),
        (' block4a , block6a ', ('block4a', 'block6a')), ("('block4a',)", ('block4a',)),
        ('("block4a", "block6a")', ('block4a', 'block6a')), ("['block4a']", ('block4a',)), ('block4a,', ('block4a',)),
        (('block4a', 'block6a'), ('block4a', 'block6a')),
    ],
)  # fmt: skip
def test_splits_as_people_write_them(text, splits):
    assert parse_splits(text) == splits


@pytest.mark.parametrize('value', [None, 3, (3,), {'block4a'}, b'block4a'])
def test_splits_nobody_writes(value):
    with pytest.raises(ConfigError, match=r"^splits=.* must be 'auto' or names of blocks such as"):
        parse_splits(value)


@pytest.mark.parametrize(
    ('splits', 'message'),
    [
        (('block9z',), r"^splits='block9z': 'block9z' is no block .* has stem, block1a, block2a-b, .*block7a, head$"),
        (('block4a', 'auto'), r"'auto' is no block"),
        (('stem',), r"^splits='stem': 'stem' begins the first stage anyway"),
        (('stem', 'block4a'), r"'stem' begins the first stage anyway"),
        (('block4a', 'block4a'), r"^splits='block4a,block4a' must name every block once, 'block4a'$"),
        (('block6a', 'block4a'), r"^splits='block6a,block4a' must be in the network's order, 'block4a,block6a'$"),
    ],
)
def test_splits_that_cannot_be(splits, message):
    for check in (check_splits, stage_blocks):
        with pytest.raises(ConfigError, match=message):
            check(model_spec('b0'), splits)


def test_stages_are_the_network_cut_up():
    spec = model_spec('b0')
    names = block_names(spec)
    assert stage_blocks(spec, ()) == (names,)
    assert stage_blocks(spec, ('block1a', 'head')) == (('stem',), names[1:-1], ('head',))
    assert stage_blocks(spec, names[1:]) == tuple((name,) for name in names)
    costs = block_costs(spec, 32)
    for stages in (1, 2, 3, 5, len(names)):
        splits = balance(costs, stages)
        check_splits(spec, splits)
        assert len(splits) == stages - 1
        assert tuple(row.blocks for row in stage_table(costs, splits)) == stage_blocks(spec, splits)


@pytest.mark.parametrize(
    ('stages', 'options', 'message'),
    [
        (0, {}, r'^stages=0 must be at least 1 and at most 34'),
        (35, {}, r'^stages=35 must be at least 1 and at most 34, the number of blocks$'),
        (2, {'recompute': 'all'}, r"^recompute='all' is unknown; choose one of none, block, stage$"),
        (2, {'schedule': '1f1b'}, r"^pipeline='1f1b' is unknown; choose one of grouped, sequential$"),
        (2, {'micro_batch': 0}, r'^micro_batch=0 must be at least 1$'),
        (2, {'seconds': {'stem': 1.0}}, r'^seconds must have every block; block1a, .* missing$'),
        (
            2,
            {'budget': 1},
            r'^budget=1 bytes a device is too small for stages=2; no splits need less than \d+$',
        ),
    ],
)
def test_what_cannot_be_balanced(stages, options, message):
    with pytest.raises(ConfigError, match=message):
        balance(B4, stages, **options)
