"""Mixup and cutmix against loops in plain numpy that know only the uniform numbers, and against their distributions."""

import functools
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import betainc, betaincinv

from efficientnet.errors import ConfigError
from efficientnet.numerics.augment import Coefficients, Mixing, draw, mix_images, mix_labels
from efficientnet.numerics.random_keys import purpose_key, sample_keys

BOTH = Mixing(mixup_alpha=0.2, cutmix_probability=0.9)
MIXINGS = [Mixing(), Mixing(mixup_alpha=0.2), Mixing(cutmix_probability=0.9), BOTH]
SHAPES = [(1, (7, 5)), (2, (1, 1)), (3, (7, 5)), (5, (4, 9)), (2, (1, 997))]  # images, (height, width)
BLANK = {1: [1], 2: [1, 0], 3: [1, 0, 1], 5: [1, 1, 0, 1, 1]}  # masks
draw_jit = jax.jit(draw, static_argnums=(0, 3))


def keys_of(rows, step=0, seed=0):
    return sample_keys(purpose_key(seed, 'samples'), jnp.int32(step), jnp.asarray(rows, jnp.int32))


def uniforms(key, name, shape=()):
    key = jax.random.fold_in(key, jnp.uint32(zlib.crc32(name.encode())))
    return np.asarray(jax.random.uniform(key, shape), np.float64)


def expected_draw(mixing, keys, mask, size):
    """λ of every image, or None, and which pixels are pasted over, or None; None also if a rounding is too close."""
    count, (height, width) = len(mask), size
    mixup, inside = None, None
    if mixing.mixup_alpha:
        mixup = []
        for n in range(count):
            b = betaincinv(mixing.mixup_alpha, mixing.mixup_alpha, 0.5 + uniforms(keys[n], 'mixup') / 2)
            mixup.append(max(b, 1 - b) if mask[n - 1] else 1.0)
    if mixing.cutmix_probability:
        inside = np.zeros((count, height, width), bool)
        occurs, area, y, x = uniforms(keys[0], 'cutmix', 4)
        if occurs < mixing.cutmix_probability:
            kept = 1 + np.log(1 - area * (1 - np.exp(-4))) / 4  # 1 − area · (1 − e⁻⁴) is uniform from e⁻⁴ to 1
            edges = []
            for length, centre in ((height, y), (width, x)):
                side = length * np.sqrt(1 - kept)
                centre = min(max(centre * length, side / 2), length - side / 2)
                edges += [centre - side / 2, centre + side / 2]
            assert all(abs(edge % 1 - 0.5) > 1e-3 or edge % 1 == 0.5 for edge in edges), 'too close; use another step'
            top, bottom, left, right = np.round(edges)
            for n, i, j in np.ndindex(inside.shape):
                inside[n, i, j] = top <= i < bottom and left <= j < right and mask[n - (2 if count > 2 else 1)]
    return mixup, inside


def expected_images(images, mixup, inside):
    """In float64, with the one rounding to the dtype of the images that mixup makes."""
    result = images.astype(np.float64)
    if mixup is not None:
        mixed = np.array([mixup[n] * result[n] + (1 - mixup[n]) * result[n - 1] for n in range(len(images))])
        result = mixed.astype(images.dtype).astype(np.float64)
    if inside is not None:
        before = result.copy()
        for n, i, j in np.argwhere(inside):
            result[n, i, j] = before[n - (2 if len(images) > 2 else 1), i, j]
    return result


def expected_target(labels, mixup, inside, classes):
    """How much of every class is in every image, [N, classes]."""
    target, count = np.zeros((len(labels), classes)), len(labels)
    for n in range(count):
        other = (n - (2 if count > 2 else 1)) % count
        area = 0.0 if inside is None else inside[n].mean()
        for image, share in ((n, 1 - area), (other, area)):
            own = 1.0 if mixup is None else mixup[image]
            target[n, labels[image]] += own * share
            target[n, labels[image - 1]] += (1 - own) * share
    return target


def as_target(labels, weights, classes):
    target = np.zeros((len(labels), classes))
    for n, k in np.ndindex(labels.shape):
        target[n, labels[n, k]] += weights[n, k]
    return target


def inside_of(coefficients):
    rows, columns = (np.asarray(edge) for edge in coefficients.box)
    return rows[:, :, None] & columns[:, None, :]


@pytest.mark.parametrize('mixing', MIXINGS)
@pytest.mark.parametrize(('count', 'size'), SHAPES)
@pytest.mark.parametrize('blank', [False, True])
def test_draws_and_labels_against_loops(mixing, count, size, blank):
    mask = BLANK[count] if blank else [1] * count
    labels = np.array([3, 1, 4, 1, 5], np.int32)[:count]
    for step in range(4):
        keys = keys_of(range(10, 10 + count), step)
        found = draw_jit(mixing, keys, jnp.asarray(mask, jnp.float32), size)
        mixup, inside = expected_draw(mixing, keys, mask, size)
        if mixup is None:
            assert found.mixup is None
        else:
            np.testing.assert_allclose(found.mixup, mixup, rtol=0, atol=2e-7)
        if inside is None:
            assert found.box is None
        else:
            np.testing.assert_array_equal(inside_of(found), inside)

        mixed, weights = mix_labels(jnp.asarray(labels), found)
        assert mixed.dtype == jnp.int32
        assert weights.dtype == jnp.float32
        assert mixed.shape == weights.shape == (count, 2 ** (bool(mixing.mixup_alpha) + (inside is not None)))
        np.testing.assert_array_equal(mixed[:, 0], labels)
        target = as_target(np.asarray(mixed), np.asarray(weights, np.float64), 6)
        np.testing.assert_allclose(target, expected_target(labels, mixup, inside, 6), rtol=0, atol=1e-6)
        np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-6)
        assert (np.asarray(weights) >= 0).all()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize('mixing', MIXINGS[1:])
@pytest.mark.parametrize(('count', 'size'), SHAPES)
def test_images_against_loops(dtype, mixing, count, size):
    mask = BLANK[count]
    pixels = np.random.default_rng(count).uniform(-124, 151, (count, *size, 3)) * np.reshape(mask, (count, 1, 1, 1))
    images = jnp.asarray(pixels, dtype)
    for step in range(3):
        coefficients = draw_jit(mixing, keys_of(range(count), step), jnp.asarray(mask, jnp.float32), size)
        found = jax.jit(mix_images)(images, coefficients)
        assert found.shape == images.shape
        assert found.dtype == dtype
        inside = None if coefficients.box is None else inside_of(coefficients)
        mixup = None if coefficients.mixup is None else np.asarray(coefficients.mixup, np.float64)
        # One unit in the last place of the largest pixels: the fp32 sum can round to the other neighbour.
        expected = expected_images(np.asarray(images), mixup, inside)
        found = np.asarray(found, np.float64)
        np.testing.assert_allclose(found, expected, rtol=float(jnp.finfo(dtype).eps), atol=1e-4)
        if count == 1:
            np.testing.assert_array_equal(found, np.asarray(images, np.float64))


def test_the_four_labels_in_order():
    inside = jnp.array([True, True, True, False]), jnp.array([True, False])  # 3/8 of the pixels
    box = tuple(jnp.tile(edge, (3, 1)) for edge in inside)
    labels, weights = mix_labels(jnp.array([7, 8, 9]), Coefficients(jnp.array([0.5, 0.75, 1.0]), box))
    np.testing.assert_array_equal(labels, [[7, 9, 8, 7], [8, 7, 9, 8], [9, 8, 7, 9]])
    np.testing.assert_allclose(
        np.asarray(weights) * 8, [[2.5, 2.5, 2.25, 0.75], [3.75, 1.25, 3, 0], [5, 0, 1.5, 1.5]], rtol=1e-6
    )


def test_off_does_nothing():
    images, labels, mask = jnp.ones((3, 4, 4, 3)), jnp.arange(3), jnp.ones(3)
    coefficients = draw(Mixing(), keys_of(range(3)), mask, (4, 4))
    assert coefficients == Coefficients(None, None)
    assert mix_images(images, coefficients) is images
    mixed, weights = mix_labels(labels, coefficients)
    np.testing.assert_array_equal(mixed, labels[:, None])
    np.testing.assert_array_equal(weights, np.ones((3, 1)))


def test_who_is_not_mixed_stays_exactly_as_it_was():
    images = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 6, 3)), jnp.float32)
    mask = jnp.array([1.0, 0.0, 1.0, 1.0])
    mixing = Mixing(mixup_alpha=1.0, cutmix_probability=1.0)
    coefficients = draw_jit(mixing, keys_of(range(4)), mask, (6, 6))
    found, (labels, weights) = mix_images(images, coefficients), mix_labels(jnp.arange(4), coefficients)
    # Image 2 would be mixed with the blank 1 and image 3 cut with it.
    np.testing.assert_array_equal(
        np.asarray(found[2])[~inside_of(coefficients)[2]], images[2][~inside_of(coefficients)[2]]
    )
    assert coefficients.mixup[2] == 1
    assert not inside_of(coefficients)[3].any()
    # Nobody that counts has the blank image's label.
    counted = np.asarray(mask) > 0
    assert (np.asarray(weights)[counted] * (np.asarray(labels)[counted] == 1)).sum() == 0


def test_mixup_belongs_to_the_sample_wherever_it_stands():
    rows, mask = np.array([5, 2, 9, 4, 7]), jnp.ones(5)
    together = draw_jit(BOTH, keys_of(rows), mask, (8, 8)).mixup
    for order in ([4, 3, 2, 1, 0], [2, 0, 1, 4, 3]):
        np.testing.assert_array_equal(
            draw_jit(BOTH, keys_of(rows[order]), mask, (8, 8)).mixup, together[np.array(order)]
        )
    for n, row in enumerate(rows):
        np.testing.assert_allclose(
            draw_jit(BOTH, keys_of([row]), mask[:1], (8, 8)).mixup, together[n : n + 1], rtol=1e-7
        )


def test_cutmix_belongs_to_the_first_sample():
    first = inside_of(draw_jit(BOTH, keys_of([5, 2, 9]), jnp.ones(3), (16, 16)))
    second = inside_of(draw_jit(BOTH, keys_of([5, 7]), jnp.ones(2), (16, 16)))
    assert first.any()
    np.testing.assert_array_equal(first[:2], second)


def test_seeds_steps_and_samples_draw_differently_and_the_same_keys_the_same():
    coefficients = [
        draw_jit(Mixing(mixup_alpha=1.0, cutmix_probability=1.0), keys_of(rows, step, seed), jnp.ones(4), (64, 64))
        for seed, step, rows in itertools.product((0, 1), (0, 1), (range(4), range(4, 8)))
    ]
    assert len({float(value) for found in coefficients for value in found.mixup}) == 8 * 4
    assert len({inside_of(found)[0].tobytes() for found in coefficients}) == 8
    again = draw_jit(Mixing(mixup_alpha=1.0, cutmix_probability=1.0), keys_of(range(4)), jnp.ones(4), (64, 64))
    for one, other in zip(jax.tree.leaves(coefficients[0]), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_micro_batches_can_be_drawn_all_at_once():
    keys, mask = keys_of(range(12)), jnp.asarray(np.arange(12) % 5 > 0, jnp.float32)
    together = jax.vmap(functools.partial(draw, BOTH, size=(9, 9)))(keys.reshape(4, 3), mask.reshape(4, 3))
    for index in range(4):
        part = slice(3 * index, 3 * index + 3)
        alone = draw_jit(BOTH, keys[part], mask[part], (9, 9))
        for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(one[index], other, rtol=1e-7)


@pytest.mark.parametrize('alpha', [0.1, 0.2, 0.4, 1.0, 4.0])
def test_mixup_has_the_folded_beta_distribution(alpha):
    count = 40_000
    found = np.asarray(draw_jit(Mixing(mixup_alpha=alpha), keys_of(range(count)), jnp.ones(count), (1, 1)).mixup)
    assert found.min() >= 0.5
    assert found.max() <= 1
    sample = np.random.default_rng(0).beta(alpha, alpha, 4 * count)
    sample = np.maximum(sample, 1 - sample)
    for power in (1, 2, 3):
        error = (sample**power).std() * np.sqrt(1 / count + 1 / len(sample))
        assert abs((found.astype(np.float64) ** power).mean() - (sample**power).mean()) < 4 * error
    for edge in (0.501, 0.55, 0.6, 0.75, 0.9, 0.99, 0.999):
        share = 2 * betainc(alpha, alpha, edge) - 1
        assert abs((found < edge).mean() - share) < 4 * np.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize('size', [(96, 96), (96, 40)])
def test_cutmix_has_the_distribution_of_the_reference(size):
    """The reference's cutmix_lambda 0.85, version 1."""
    count, probability = 20_000, 1.96 - 1.55 * 0.85
    draw_all = jax.jit(jax.vmap(functools.partial(draw, Mixing(cutmix_probability=probability), size=size)))
    box = draw_all(keys_of(range(count)).reshape(count, 1), jnp.ones((count, 1))).box
    rows, columns = (np.asarray(edge)[:, 0] for edge in box)

    cut = rows.any(1) & columns.any(1)
    assert abs(probability - 0.6425) < 1e-12
    assert abs(cut.mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / count) + 5e-4  # 0 pixels
    rows, columns = rows[cut], columns[cut]

    # One unbroken box of the image's shape, to the pixel its edges are rounded to, at the borders too.
    for edge in (rows, columns):
        assert (np.diff(edge.astype(np.int8), axis=1, prepend=0) == 1).sum(1).max() == 1
    height, width = rows.sum(1), columns.sum(1)
    assert np.abs(height / size[0] - width / size[1]).max() <= 1 / size[0] + 1 / size[1]

    area = height / size[0] * width / size[1]
    mean = (1 - 5 * np.exp(-4)) / (1 - np.exp(-4)) / 4
    assert abs(area.mean() - mean) < 4 * area.std() / np.sqrt(len(area)) + 1e-3
    for edge in (0.05, 0.2, 0.5, 0.8):
        share = (1 - np.exp(-4 * edge)) / (1 - np.exp(-4))
        # Rounding shifts edges by half a pixel at most, and the area with them.
        blur = 4 * np.exp(-4 * edge) * np.sqrt(edge) * (1 / size[0] + 1 / size[1]) / 2
        assert abs((area < edge).mean() - share) < 4 * np.sqrt(share * (1 - share) / len(area)) + blur

    # Every place is as likely as its mirror image; the middle is covered more often than the corners.
    covered = (rows.mean(0), columns.mean(0))
    for edge in covered:
        np.testing.assert_allclose(edge, edge[::-1], atol=5 / np.sqrt(len(area)))
        assert edge[len(edge) // 2] > edge[0] > 0


def test_the_weight_is_the_share_of_pixels():
    for step in range(10):
        coefficients = draw_jit(Mixing(cutmix_probability=1.0), keys_of(range(3), step), jnp.ones(3), (11, 7))
        _, weights = mix_labels(jnp.arange(3), coefficients)
        images = mix_images(jnp.broadcast_to(jnp.arange(3.0)[:, None, None, None], (3, 11, 7, 3)), coefficients)
        own = (np.asarray(images) == np.arange(3.0)[:, None, None, None]).mean((1, 2, 3))
        np.testing.assert_allclose(weights[:, 0], own, rtol=1e-6)
        np.testing.assert_allclose(weights[:, 1], 1 - own, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ('fields', 'name'),
    [
        ({'mixup_alpha': -0.1}, 'augment.mixup_alpha'),
        ({'mixup_alpha': float('inf')}, 'augment.mixup_alpha'),
        ({'mixup_alpha': float('nan')}, 'augment.mixup_alpha'),
        ({'cutmix_probability': -0.1}, 'augment.cutmix_probability'),
        ({'cutmix_probability': 1.1}, 'augment.cutmix_probability'),
        ({'cutmix_probability': float('nan')}, 'augment.cutmix_probability'),
    ],
)
def test_impossible_settings(fields, name):
    with pytest.raises(ConfigError, match=name):
        Mixing(**fields)
