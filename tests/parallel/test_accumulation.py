"""Pipelined updates against unpipelined ones, and what the compiled program holds, sends and keeps."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientnet.loop.programs import compile_update
from efficientnet.model import onednn
from efficientnet.numerics import random_keys
from efficientnet.parallel.pipeline import SCHEDULES
from efficientnet.parallel.residuals import Residuals, largest
from efficientnet.parallel.stages import PASSES
from efficientnet.parallel.train_state import pack_state, unpack_state
from tests.tiny import run_updates, tiny_parts

SPLITS = {1: 'auto', 2: 'block2a', 3: 'block1a,block2a', 4: 'block1a,block2a,head'}
UPDATES = 2


def final(stages=1, replicas=1, count=1, **changes):
    """Plain weights and statistics, and metrics, after two updates with everything random switched on."""
    parts = tiny_parts(
        splits=SPLITS[stages],
        replicas=replicas,
        micro_batch=2,
        global_batch=2 * replicas * count,
        steps=UPDATES,
        **{'model__survival': 0.5, 'augment__mixup_alpha': 0.4, 'augment__cutmix_probability': 0.5} | changes,
    )
    state, metrics = run_updates(parts, UPDATES)
    return unpack_state(state, parts.packings), metrics[-1]


_references = {}


def reference(batches, **changes):
    """The same updates on one device in one stage."""
    name = (batches, *sorted(changes.items()))
    if name not in _references:
        _references[name] = final(count=batches, **changes)
    return _references[name]


def check(stages, replicas, count, exact=False, bound=1e-5, **changes):
    layout = {name: changes.pop(name) for name in ('recompute', 'pipeline') if name in changes}
    expected, expected_metrics = reference(replicas * count, **changes)
    found, metrics = final(stages, replicas, count, **layout, **changes)
    assert found.step == expected.step == UPDATES
    for part in ('params', 'batch_stats', 'optimizer'):
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(getattr(expected, part)),
            jax.tree.leaves(getattr(found, part)),
            strict=True,
        )
        for (path, a), b in pairs:
            name = part + jax.tree_util.keystr(path)
            if exact:
                np.testing.assert_array_equal(a, b, err_msg=name)
            else:
                a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
                np.testing.assert_allclose(a, b, rtol=bound, atol=bound / 5, err_msg=name)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=max(bound, 1e-4), err_msg=name)


# Stages, replicas, micro-batches: fewer than stages, as many, more. Each layout's recomputation and schedule are there
# to be different; the global batch is not, so that one reference serves all.
FEW = [
    (2, 1, 4, 'none', 'grouped'),
    (3, 2, 2, 'block', 'sequential'),
    (4, 1, 4, 'stage', 'grouped'),
]


@pytest.mark.parametrize(('stages', 'replicas', 'count', 'recompute', 'schedule'), FEW)
def test_stages_do_not_change_the_result(stages, replicas, count, recompute, schedule):
    check(stages, replicas, count, recompute=recompute, pipeline=schedule)


@pytest.mark.slow
@pytest.mark.parametrize('recompute', PASSES)
@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize(('stages', 'replicas'), list(itertools.product((1, 2, 3, 4), (1, 2, 3, 4))))
def test_no_layout_changes_the_result(stages, replicas, schedule, recompute):
    if stages == 1 and schedule != 'grouped':
        pytest.skip('one stage has no schedule')
    if stages * replicas > len(jax.devices()):
        pytest.skip('needs more devices: set TEST_DEVICES=16')
    # A quarter of the whole product: over the replicas, each recomputation and schedule meets every count.
    counts = sorted({1, stages - 1, stages, 2 * stages + 1} - {0})
    count = counts[(replicas + [*PASSES].index(recompute)) % len(counts)]
    check(stages, replicas, count, recompute=recompute, **({'pipeline': schedule} if stages > 1 else {}))


@pytest.mark.parametrize(
    ('stages', 'replicas', 'recompute'), [(2, 2, 'stage'), pytest.param(3, 1, 'block', marks=pytest.mark.slow)]
)
def test_16_bits_are_the_same_bits(stages, replicas, recompute):
    """Recomputed from the same 16-bit boundaries, by the same operations, rounded by the same random bits."""
    check(stages, replicas, 4 // replicas, exact=True, precision__policy='16.16', recompute=recompute)


def test_16_bits_kept_between_forward_and_backward():
    """What is kept has been rounded to fp16, where one program may use it before: up to two weight steps apart."""
    check(2, 1, 4, bound=5e-3, precision__policy='16.16', recompute='none')


@pytest.mark.parametrize(
    'changes',
    [
        {'model__norm': 'batch'},
        pytest.param(
            {'model__conv_method': 'onednn'},
            marks=pytest.mark.skipif(not onednn.available(), reason='needs oneDNN in XLA'),
        ),
        pytest.param({'model__norm': 'layer_proxy'}, marks=pytest.mark.slow),
        pytest.param({'optimizer__name': 'rmsprop', 'optimizer__epsilon': 1e-3}, marks=pytest.mark.slow),
    ],
)
def test_norms_and_optimizers(changes):
    check(3, 2, 2, recompute='none' if 'model__norm' in changes else 'stage', **changes)


@pytest.mark.parametrize('recompute', ['stage', pytest.param('none', marks=pytest.mark.slow)])
def test_a_stage_that_overflows_stops_all(recompute):
    """Only the last stage's classifier is infinite; nobody's weights may move."""
    parts = tiny_parts(splits='block1a,block2a', micro_batch=4, recompute=recompute, precision__loss_scale='dynamic')
    start = jax.device_get(parts.init_state())
    plain = unpack_state(start, parts.packings)
    plain.params['head']['classifier']['bias'] = np.full((10,), np.inf, np.float32)
    start = pack_state(plain, start, parts.packings)
    state, metrics = run_updates(parts, 2, start)
    assert metrics[-1]['skipped_in_row'] == 2
    assert metrics[-1]['loss_scale'] == 64
    jax.tree.map(np.testing.assert_array_equal, state.params, start.params)
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, start.optimizer)
    assert (state.step == 0).all()


@functools.cache
def compiled(**changes):
    parts = tiny_parts(micro_batch=2, **changes)
    return parts, compile_update(parts)


def loops_of(text):
    """The text of every computation that a loop runs, with those they call."""
    bodies = {}
    for block in re.split(r'\n\n', text):
        name = re.match(r'(?:ENTRY )?(%?[\w.\-]+) \(', block)
        if name:
            bodies[name[1].lstrip('%')] = block
    inside, waiting = {}, [name.lstrip('%') for name in re.findall(r'while\(.*?body=(%?[\w.\-]+)', text)]
    while waiting:
        name = waiting.pop()
        if name in bodies and name not in inside:
            inside[name] = bodies[name]
            named = re.findall(
                r'(?:calls|to_apply|body|condition|\w+_computations?)=\{?(%?[\w.\-]+(?:, %?[\w.\-]+)*)', bodies[name]
            )
            waiting += [part.strip().lstrip('%') for group in named for part in group.split(',')]
    return '\n'.join(inside.values())


@pytest.mark.parametrize(
    ('splits', 'groups'), [('block2a', '{{0,2},{1,3}}'), ('block1a,block2a', '{{0,3},{1,4},{2,5}}')]
)
def test_what_the_program_sends(splits, groups):
    parts, program = compiled(splits=splits, replicas=2)
    text, stages = program.as_text(), splits.count(',') + 2
    loops = loops_of(text)
    reductions = re.findall(r'= (\S+) all-reduce(?:-start)?\(.*?replica_groups=(\{\{.*?\}\})', text)
    rows = math.prod(parts.packings.params.shape)
    # One carries gradients, statistics and metrics among equal stages; the other a few numbers among a replica's.
    assert sorted(size for size, _ in reductions) == sorted([f'f32[{rows + 4}]{{0}}', 'f32[7]{0}'])
    own = [[replica * stages + stage for stage in range(stages)] for replica in range(2)]
    assert {found for _, found in reductions} == {groups, str(own).replace('[', '{').replace(']', '}').replace(' ', '')}
    assert 'all-reduce' not in loops
    assert 'all-gather' not in loops
    permutes = re.findall(r'collective-permute(?:-start)?\(', text)
    assert len(permutes) == len(re.findall(r'collective-permute(?:-start)?\(', loops)) == 2
    assert 'may-alias' in text or 'must-alias' in text


def instructions_of(block):
    """By name: the kind of each instruction of a computation, what it reads, and its line."""
    found = {}
    for line in block.splitlines():
        if matched := re.match(r'\s+(?:ROOT )?(%[\w.\-]+) = .*? ([\w\-]+)\(([^)]*)\)', line):
            name, kind, operands = matched.groups()
            found[name] = kind, re.findall(r'%[\w.\-]+', operands), line
    return found


@pytest.mark.parametrize('splits', ['block2a', 'block1a,block2a'])
def test_what_is_sent_waits_for_all_work_of_a_tick(splits):
    """An exchange blocks a CPU's thread; before a stage's work it makes the stages take turns.

    What goes through a loop unchanged is there before the loop is: XLA orders by memory that is written.
    """
    _, program = compiled(splits=splits, replicas=2)
    blocks = {block.split(' (')[0]: block for block in program.as_text().split('\n\n')}
    (tick,) = [instructions_of(block) for block in blocks.values() if 'collective-permute(' in block]
    index_of = functools.partial(re.search, r'index=(\d+)')

    def unchanged(loop, index):
        body = instructions_of(blocks[re.search(r'body=(%[\w.\-]+)', tick[loop][2])[1]])
        (root,) = [operands for _, operands, line in body.values() if line.lstrip().startswith('ROOT')]
        kind, (source, *_), line = body[root[index]]
        while body[source][0] == 'opt-barrier':  # a barrier is no work
            (packed,) = body[source][1]
            given = body[packed][1]
            kind, (source, *_), line = body[given[int(index_of(line)[1])]]
        return kind == 'get-tuple-element' and int(index_of(line)[1]) == index and body[source][0] == 'parameter'

    def behind(name):
        """The loops whose work an instruction waits for."""
        loops, seen, waiting = set(), set(), [name]
        while waiting:
            kind, operands, line = tick[waiting.pop()]
            if kind == 'get-tuple-element' and tick[operands[0]][0] == 'while':
                index, (loop,) = int(index_of(line)[1]), operands
                (given,) = tick[loop][1]
                if unchanged(loop, index):
                    assert tick[given][0] == 'tuple'
                    operands = [tick[given][1][index]]
                else:
                    loops.add(loop)
                    operands = tick[given][1]
            waiting += set(operands) - seen
            seen.update(operands)
        return loops

    loops = {name for name, (kind, *_) in tick.items() if kind == 'while'}
    assert len(loops) >= 2 * splits.count(',') + 3  # there and back, of the last stage both at once
    sent = [name for name, (kind, *_) in tick.items() if kind == 'collective-permute']
    assert [behind(name) for name in sent] == [loops, loops]


def test_a_device_holds_its_stage_only():
    parts, program = compiled(splits='block1a,block2a', replicas=2)
    sizes = [part.shape[0] for part in parts.packings.params.parts]
    assert parts.packings.params.shape[0] == max(sizes) < sum(sizes)
    state = parts.grid.place(jax.device_get(parts.init_state()))
    for leaf in (state.params, *jax.tree.leaves(state.optimizer)):
        for shard in leaf.addressable_shards:
            assert shard.data.nbytes <= 4 * math.prod(parts.packings.params.shape)
    argument = program.memory_analysis().argument_size_in_bytes
    whole = sum(leaf.nbytes // 6 for leaf in jax.tree.leaves(state))
    batch = parts.grid.layout.rows // 3 * (8 * 8 * 3 + 8)
    assert abs(argument - whole - batch) < 1000


@pytest.mark.slow  # of one stage they do in test_update.py
def test_replicas_of_a_stage_stay_bit_identical():
    parts, program = compiled(splits='block1a', replicas=4, precision__policy='16.16')
    state, stop = parts.grid.place(jax.device_get(parts.init_state())), parts.grid.flag(False)
    for batch in itertools.islice(parts.grid.prefetch(parts.train_batches(0), 1), 3):
        state, _ = program(state, batch, stop)
    for leaf in jax.tree.leaves(state):
        rows = np.asarray(leaf)
        for stage in range(2):
            np.testing.assert_array_equal(rows[stage::2], np.broadcast_to(rows[stage], rows[stage::2].shape))


def test_a_backward_function_survives_in_a_stash():
    """With leaves of every kind: a parameter, fp32, fp16, masks, and an odd number of bytes."""

    def function(params, x, key):
        keep = jax.random.bernoulli(key, 0.5, (3, 5))
        y = jnp.where(keep, jnp.tanh(x @ params['w']), 0.0).astype(jnp.float16)
        return jnp.exp(y).sum(dtype=jnp.float32) + jnp.square(params['v']).sum()

    params = {'v': jnp.arange(7.0), 'w': jnp.linspace(-1.0, 1.0, 20).reshape(4, 5)}
    x, key = jnp.linspace(0.0, 1.0, 12).reshape(3, 4), random_keys.purpose_key(0, 'samples')
    _, pull = jax.vjp(lambda params, x: function(params, x, key), params, x)
    residuals = Residuals(pull, params)
    kept = sum(size * jnp.dtype(name).itemsize for name, size in residuals.sizes.items())
    assert set(residuals.sizes) == {'uint8', 'uint16', 'uint32'}
    assert kept < sum(leaf.nbytes for leaf in jax.tree.leaves(pull))  # parameters stay out
    # Other stages may need more room, and other micro-batches lie beside this one's.
    other = {name: size + 100 for name, size in residuals.sizes.items()}
    stash = {name: jnp.full((3, size), 7, name) for name, size in other.items()}
    stash = jax.jit(lambda pull, place: residuals.put(pull, stash, place))(pull, jnp.int32(1))
    for rows in stash.values():
        assert (rows[0] == 7).all()
        assert (rows[2] == 7).all()
    again = residuals.take(stash, jnp.int32(1), params)
    jax.tree.map(np.testing.assert_array_equal, again(jnp.float32(1)), pull(jnp.float32(1)))


def test_a_stash_has_room_for_the_largest_of_each():
    def residuals(*arrays):
        return Residuals(jax.tree_util.Partial(lambda *kept: kept, *arrays), {})

    one, other = residuals(jnp.zeros(3), jnp.zeros(5, jnp.float16)), residuals(jnp.zeros((2, 2)), jnp.zeros(2, bool))
    assert largest([one, other]) == {'uint32': 4, 'uint16': 5, 'uint8': 2}
