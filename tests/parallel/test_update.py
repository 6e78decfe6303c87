"""The weight update: equal whatever the layout, equal to plain autodiff, untouched by what is not finite."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from efficientnet.loop.programs import compile_update
from efficientnet.numerics import augment, random_keys
from efficientnet.numerics.augment import Mixing
from efficientnet.numerics.losses import cross_entropy
from efficientnet.parallel.accumulation import normalise
from efficientnet.parallel.train_state import pack_state, unpack_state
from efficientnet.parallel.update import make_epoch_average, read_metrics
from tests.tiny import run_updates, tiny_parts

# Replicas, micro-batch; the global batch stays 16.
LAYOUTS = [(1, 4), (4, 2), *(pytest.param(layout, marks=pytest.mark.slow) for layout in ((2, 8), (8, 1)))]


def assert_trees_equal(one, other):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@functools.cache
def three_updates(replicas, micro_batch):
    """In fp32 with dropout and stochastic depth."""
    return run_updates(tiny_parts(replicas=replicas, micro_batch=micro_batch, model__survival=0.5), 3)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layout_does_not_change_the_result(layout):
    one, metrics = three_updates(1, 16)
    other, other_metrics = three_updates(*layout)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one.params), jax.tree.leaves(other.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    for a, b in zip(metrics, other_metrics, strict=True):
        np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)
        assert a['count'] == b['count'] == 16
    assert one.step == other.step == 3


def test_an_update_is_plain_gradient_descent():
    """One SGD update of 2 replicas × 2 micro-batches against jax.grad of the whole batch's mean loss."""
    parts = tiny_parts(
        replicas=2,
        micro_batch=4,
        optimizer__name='sgd',
        optimizer__momentum=0.0,
        optimizer__weight_decay=0.0,
        optimizer__rate_per_example=0.01,
        schedule__kind='constant',
        model__survival=1.0,
        model__dropout=0.0,
    )
    start = unpack_state(parts.init_state(), parts.packings)
    batch = next(iter(parts.train_batches(0)))

    @jax.jit
    @jax.value_and_grad
    def value_and_gradient(params):
        images = normalise(jnp.asarray(batch['image']), parts.rule.mean, parts.rule.std, jnp.float32)
        logits = parts.model.apply({'params': params}, images, train=False)
        return cross_entropy(logits, jnp.asarray(batch['label']), 0.1).mean()

    loss, gradient = value_and_gradient(start.params)
    found, metrics = run_updates(parts, 1)
    found = unpack_state(found, parts.packings)
    expected = jax.tree.map(lambda w, g: w - 0.16 * g, start.params, gradient)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics[0]['loss'] / 16, loss, rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics[0]['gradient_norm'], norm, rtol=1e-4)


def test_replicas_stay_bit_identical_in_16_bits():
    parts = tiny_parts(replicas=4, micro_batch=2, precision__policy='16.16')
    program, stop = compile_update(parts), parts.grid.flag(False)
    state = parts.grid.place(jax.device_get(parts.init_state()))
    for batch in parts.grid.prefetch(parts.train_batches(0), 1):
        state, _ = program(state, batch, stop)
    for leaf in jax.tree.leaves(state.params):
        assert leaf.dtype == jnp.float16
        rows = np.asarray(leaf).view(np.uint16)
        assert (rows == rows[:1]).all()


def test_weights_and_momentum_are_rounded_once():
    """Also their norm and the check whether all is finite read rounded numbers, and would round for themselves."""
    text = compile_update(tiny_parts(blocks=1, precision__policy='16.16')).as_text()
    assert len(re.findall(r'= f16\S* bitcast-convert\(', text)) == 2


@pytest.mark.parametrize('policy', ['bf16.32', '16.32', '16.16', 'bf16.16'])
def test_policies_train_and_store_what_they_say(policy):
    parts = tiny_parts(blocks=1, precision__policy=policy, averaging__update_decay=0.9)
    state, metrics = run_updates(parts, 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {parts.rule.policy.master}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.update_average)} == {np.dtype(np.float32)}
    assert all(np.isfinite(found['loss']) for found in metrics)
    assert state.step == 4
    assert state.skipped == 0


@pytest.mark.parametrize(('kind', 'scales'), [('static', [2.0**24] * 3), ('dynamic', [2.0**24, 2.0**23, 2.0**22])])
def test_a_non_finite_update_changes_nothing(kind, scales):
    """A loss scale that overflows fp16 makes every gradient infinite."""
    parts = tiny_parts(
        blocks=1,
        precision__policy='16.16',
        precision__loss_scale=kind,
        precision__initial_loss_scale=2.0**24,
        averaging__update_decay=0.9,
        model__norm='batch',
    )
    start = jax.device_get(parts.init_state())
    state, metrics = run_updates(parts, 3)
    assert [found['loss_scale'] for found in metrics] == scales
    for name in ('step', 'params', 'batch_stats', 'optimizer', 'update_average', 'epoch_average'):
        assert_trees_equal(getattr(start, name), getattr(state, name))
    assert state.skipped == state.skipped_in_row == 3
    assert metrics[-1]['skipped_in_row'] == 3


@pytest.mark.parametrize(
    ('where', 'bad', 'skipped'),
    [
        *itertools.product(('gradients', 'updates', 'state'), (np.nan, -np.inf), (1,)),
        ('updates', 1e20, 1),  # whose square is not finite
        ('state', 1e20, 0),
    ],
)
def test_one_place_that_is_not_finite_is_enough(where, bad, skipped):
    parts = tiny_parts(blocks=1)

    def spoilt(x):
        return x.at[0, 0].set(bad) if x.ndim == 2 else x

    def make_optimizer(seed):
        inner = parts.make_optimizer(seed)

        def update(grads, state, params):
            if where == 'gradients':
                return jnp.zeros_like(grads), state
            updates, state = inner.update(grads, state, params)
            return (spoilt(updates), state) if where == 'updates' else (updates, jax.tree.map(spoilt, state))

        return optax.GradientTransformation(inner.init, update)

    start = parts.init_state()
    if where == 'gradients':  # these are divided by the scale that the loss was multiplied by
        start = start._replace(loss_scale=start.loss_scale._replace(scale=jnp.full_like(start.loss_scale.scale, bad)))
    state, _ = run_updates(dataclasses.replace(parts, make_optimizer=make_optimizer), 1, start)
    assert state.skipped == skipped
    if skipped:
        for name in ('step', 'params', 'optimizer'):
            assert_trees_equal(getattr(jax.device_get(start), name), getattr(state, name))


def test_a_dynamic_scale_recovers():
    changes = {'precision__policy': '16.16', 'precision__loss_scale': 'dynamic'}
    parts = tiny_parts(blocks=1, steps=20, precision__initial_loss_scale=2.0**24, **changes)
    state, metrics = run_updates(parts, 20)
    assert metrics[-1]['skipped_in_row'] == 0
    assert 0 < state.skipped < 20
    assert state.step == 20 - state.skipped


@pytest.mark.parametrize('norm', ['group', 'batch'])
def test_masked_examples_count_for_nothing(norm):
    """A batch whose second half is masked has the gradient of its first half, halved by the fixed divisor."""
    parts = tiny_parts(blocks=1, model__dropout=0.0, model__survival=1.0, micro_batch=16, model__norm=norm)
    program, stop = compile_update(parts), parts.grid.flag(False)
    start = jax.device_get(parts.init_state())
    batch = next(iter(parts.train_batches(0)))
    mask = np.repeat(np.float32([0, 1, 0]), [1, 8, 7])
    outcomes = []
    for filler in (0, 255):
        image = np.where(mask[:, None, None, None] > 0, batch['image'], np.uint8(filler))
        rows = parts.grid.shard({**batch, 'image': image, 'mask': mask})
        outcomes.append(program(parts.grid.place(start), rows, stop))
    for name in ('params', 'batch_stats'):
        assert_trees_equal(*(parts.grid.fetch(getattr(state, name)) for state, _ in outcomes))
    metrics = read_metrics(outcomes[0][1])
    assert metrics['count'] == 8
    assert metrics['correct'] <= 8


@pytest.mark.parametrize('splits', ['auto', 'block1a'])
def test_only_kernels_of_convolutions_are_cast(splits):
    """Under bf16.32 norms, squeeze-and-excite and classifier have fp32 weights, and gradients that are not rounded."""
    optimizer = {'optimizer__name': 'sgd', 'optimizer__weight_decay': 0.0}
    parts = tiny_parts(blocks=1, micro_batch=16, splits=splits, precision__policy='bf16.32', **optimizer)
    state = unpack_state(run_updates(parts, 1)[0], parts.packings)
    grads = flatten_dict(state.optimizer[0].momentum, sep='/')  # the first momentum is the gradient
    for name, grad in grads.items():
        has_more = (np.asarray(grad).view(np.uint32) & 0xFFFF).any()
        is_kernel = name.endswith('/kernel') and 'se_' not in name and 'classifier' not in name
        assert has_more == (not is_kernel), name


def test_batch_norm_statistics_move_once_an_update():
    """running = 0.97 · running + 0.03 · mean over micro-batches, of what the whole update's images give."""
    changes = {'model__norm': 'batch', 'model__batch_norm_decay': 0.9, 'model__dropout': 0.0, 'model__survival': 1.0}
    parts = tiny_parts(blocks=1, micro_batch=4, replicas=2, **changes)
    start = unpack_state(parts.init_state(), parts.packings)
    batch = next(iter(parts.train_batches(0)))
    images = normalise(jnp.asarray(batch['image']), parts.rule.mean, parts.rule.std, jnp.float32)
    apply = jax.jit(functools.partial(parts.model.apply, train=True, mutable=['batch_stats']))
    raw = [
        apply({'params': start.params, 'batch_stats': start.batch_stats}, images[rows : rows + 4])[1]['batch_stats']
        for rows in range(0, 16, 4)
    ]
    found = unpack_state(run_updates(parts, 1)[0], parts.packings)
    expected = jax.tree.map(lambda old, *new: 0.9 * old + 0.1 * sum(new) / 4, start.batch_stats, *raw)
    for a, b in zip(jax.tree.leaves(found.batch_stats), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_program_reduces_once_and_not_in_the_loop():
    parts = tiny_parts(blocks=1, replicas=4, micro_batch=2)
    text = compile_update(parts).as_text()
    reductions = re.findall(r'^.*= (\S+) all-reduce(?:-start)?\(.*$', text, re.MULTILINE)
    assert len(reductions) == 1, reductions
    # Gradients, three metrics, and whether to stop.
    assert reductions[0].startswith(f'f32[{math.prod(parts.packings.params.shape) + 4}]')
    loops = re.findall(r'while\(.*?body=(%?[\w.]+)', text)
    for body in loops:
        start = text.index(f'{body} (') if f'{body} (' in text else text.index(f'{body.lstrip("%")} (')
        assert 'all-reduce' not in text[start : text.index('\n}', start)]
    assert 'may-alias' in text or 'must-alias' in text  # the state is donated


@pytest.mark.parametrize('optimizer', ['sgd', 'lars', 'rmsprop'])
def test_the_new_state_takes_the_memory_of_the_old(optimizer):
    epsilon = {'optimizer__epsilon': 1e-3} if optimizer == 'rmsprop' else {}
    parts = tiny_parts(optimizer__name=optimizer, replicas=1, **epsilon)
    text = compile_update(parts).as_text()
    rows = parts.packings.params.shape[0]
    assert re.search(rf'f32\[1,{rows},256\]\S* parameter\(', text)
    assert not re.findall(rf'f32\[1,{rows},256\]\S* copy\(.*', text)


def test_epoch_average():
    parts = tiny_parts(blocks=1, averaging__epoch_decay=0.97)
    state, _ = run_updates(parts, 1)
    average = jax.jit(make_epoch_average(parts.rule))
    once = average(state)
    assert_trees_equal(once.epoch_average['params'], state.params)
    moved = once._replace(params=jax.tree.map(lambda w: w + 1, state.params))
    twice = average(moved)
    for a, b in zip(jax.tree.leaves(twice.epoch_average['params']), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b + 0.03, rtol=1e-5, atol=1e-6)
    assert twice.epochs_averaged == 2


@pytest.mark.parametrize('norm', ['group', 'batch'])
def test_packing_a_state_and_back(norm):
    parts = tiny_parts(blocks=1, model__norm=norm, precision__policy='16.16', averaging__update_decay=0.9)
    state, _ = run_updates(parts, 2)
    plain = unpack_state(state, parts.packings)
    assert plain.params['stem']['conv']['kernel'].shape == (3, 3, 3, 8)
    assert_trees_equal(pack_state(plain, state, parts.packings), state)


def test_normalise():
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    found = normalise(jnp.asarray(images), (1.0, 2.0, 3.0), (2.0, 4.0, 8.0), jnp.dtype(jnp.float16))
    assert found.dtype == jnp.float16
    np.testing.assert_array_equal(found, ((images - np.float32([1, 2, 3])) / np.float32([2, 4, 8])).astype(np.float16))


def test_synchronised_batch_norm_is_that_of_the_whole_micro_batch():
    """Two replicas of 4 images with common statistics are one of 8."""
    changes = {'model__norm': 'batch', 'global_batch': 8, 'optimizer__name': 'sgd'}
    whole = tiny_parts(micro_batch=8, **changes)
    parts = tiny_parts(micro_batch=4, replicas=2, model__batch_norm_sync=True, **changes)
    apart = tiny_parts(micro_batch=4, replicas=2, **changes)
    expected, found, other = (run_updates(parts, 2)[0] for parts in (whole, parts, apart))
    np.testing.assert_allclose(found.params, expected.params, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.batch_stats, expected.batch_stats, rtol=1e-4, atol=1e-6)
    assert not np.allclose(other.batch_stats, expected.batch_stats, rtol=1e-4, atol=1e-6)


def test_mixing_and_smoothing_reach_the_loss():
    """The first update's loss against the augment and loss functions applied by hand to one micro-batch."""
    changes = {'augment__mixup_alpha': 0.4, 'augment__cutmix_probability': 1.0, 'augment__smoothing_over': 'all'}
    parts = tiny_parts(global_batch=8, micro_batch=8, model__dropout=0.0, model__survival=1.0, **changes)
    _, (metrics,) = run_updates(parts, 1)
    batch = next(iter(parts.train_batches(0)))
    keys = random_keys.sample_keys(random_keys.purpose_key(0, 'samples'), jnp.int32(0), jnp.arange(8, dtype=jnp.int32))
    drawn = augment.draw(Mixing(0.4, 1.0), keys, jnp.ones(8), (8, 8))
    images = augment.mix_images(normalise(batch['image'], parts.rule.mean, parts.rule.std, jnp.float32), drawn)
    logits = np.float64(jax.jit(parts.model.apply)(parts.init_variables(), images))
    labels, weights = augment.mix_labels(jnp.asarray(batch['label']), drawn)
    assert labels.shape == (8, 4)
    log_p = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    targets = np.full((8, 10), 0.1 / 10)
    for row in range(8):
        for label, weight in zip(labels[row], weights[row], strict=True):
            targets[row, label] += 0.9 * float(weight)
    np.testing.assert_allclose(metrics['loss'], -(targets * log_p).sum(), rtol=1e-5)


def test_any_device_can_ask_all_to_stop():
    parts = tiny_parts(blocks=1, replicas=2, splits='head', micro_batch=2)
    program, grid = compile_update(parts), parts.grid
    state = grid.place(jax.device_get(parts.init_state()))
    asked = [(grid.flag(False), 0), (grid.flag(True), 4)]
    for batch, (flag, count) in zip(grid.prefetch(parts.train_batches(0), 1), asked, strict=False):
        state, metrics = program(state, batch, flag)
        assert read_metrics(metrics)['stop'] == count // parts.grid.layout.stages
