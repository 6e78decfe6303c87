"""Image operations against NumPy and against TensorFlow's plainer ways."""

import io

import numpy as np
import pytest
from PIL import Image

from input_pipeline import images
from input_pipeline.quiet_tf import tf

WHOLE, RULE = tf.constant([[0.0, 0.0, 1.0, 1.0]]), images.CropRule()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def random_seeds(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (n, 2), dtype=np.int64)


@pytest.mark.parametrize(('pad', 'flip'), [(0, False), (0, True), (2, False), (4, True)])
def test_random_window_restated_in_numpy(pad, flip):
    batch, seeds = noise(64, 5, 5, 3), random_seeds(64)
    result = images.random_window(tf.constant(batch), tf.constant(seeds), pad, flip).numpy()
    for image, (a, b), got in zip(batch, seeds.tolist(), result, strict=True):
        top, left = ((s >> 1) * (2 * pad + 1) >> 31 for s in (a, b))
        want = np.pad(image, [(pad, pad), (pad, pad), (0, 0)])[top : top + 5, left : left + 5]
        np.testing.assert_array_equal(got, want[:, ::-1] if flip and a & 1 else want)


def test_offsets_and_flips_are_uniform_and_independent():
    # One bright pixel in the middle of 5 × 5 shows where the window was; odd columns show nothing of the flip,
    # so a second channel marks the right half.
    image = np.zeros((4000, 5, 5, 3), np.uint8)
    image[:, 2, 2, 0] = 255
    image[:, :, 2:, 1] = 255
    result = images.random_window(tf.constant(image), tf.constant(random_seeds(4000)), 2, True).numpy()
    rows, columns = np.argwhere(result[..., 0])[:, 1:].T
    places = np.bincount(rows * 5 + columns, minlength=25)
    assert ((places - 160) ** 2 / 160).sum() < 51.2  # chi-square, 24 degrees of freedom, p = .001
    extremes = images.random_window(tf.constant(image[:1]), tf.constant([[2**32 - 1, 0]], tf.int64), 2, False)
    assert np.argwhere(extremes.numpy()[0, ..., 0]).tolist() == [[0, 4]]


def test_half_of_the_images_are_mirrored_and_both_ways_to_flip_agree():
    batch, seeds = noise(400, 4, 4, 3), random_seeds(400, seed=1)
    together = images.random_window(tf.constant(batch), tf.constant(seeds), 0, True).numpy()
    singly = np.stack([images.random_flip(*pair) for pair in zip(tf.constant(batch), tf.constant(seeds), strict=True)])
    np.testing.assert_array_equal(together, singly)
    assert 160 < (together != batch).any(axis=(1, 2, 3)).sum() < 240


@pytest.mark.parametrize('shape', [(50, 80), (80, 50), (33, 33), (300, 40), (7, 9)])
@pytest.mark.parametrize('size', [1, 8, 32])
def test_central_view_is_resize_then_crop(shape, size):
    image = noise(*shape, 3)
    short = size * 256 // 224
    height, width = (round(side * short / min(shape)) for side in shape)
    top, left = (height - size) // 2, (width - size) // 2
    plain = tf.image.resize(image, (height, width)).numpy()[top : top + size, left : left + size]
    view = images.central_view(tf.constant(image), size).numpy()
    assert view.dtype == np.uint8
    assert np.abs(view - plain).max() < 0.51  # rounding; the two sum in another order


def test_central_view_leaves_an_image_of_the_right_size_alone():
    image = noise(32, 32, 3)
    np.testing.assert_array_equal(images.central_view(tf.constant(image), 32), image)


@pytest.mark.parametrize('shape', [(1, 1), (1, 200), (3000, 1)])
def test_extreme_shapes_give_an_image(shape):
    image = np.full((*shape, 3), 77, np.uint8)
    np.testing.assert_array_equal(images.central_view(tf.constant(image), 16), np.full((16, 16, 3), 77))
    crop = images.distorted_crop(tf.constant(image), tf.constant([1, 2], tf.int64), WHOLE, 16, RULE)
    np.testing.assert_array_equal(crop, np.full((16, 16, 3), 77))


def test_resize_rounds_to_the_nearest_level():
    image = np.array([[[[0] * 3, [3] * 3]]], np.uint8)
    assert images.resize(tf.constant(image), 4).numpy()[0, 0, :, 0].tolist() == [0, 1, 2, 3]


def drawn(shape, rule, boxes, count=300):
    boxes = tf.constant(boxes, tf.float32)
    seeds = tf.constant(random_seeds(count))
    draw = tf.function(lambda seed: images.distorted_box(tf.constant([*shape, 3]), seed, rule, boxes))
    return np.array([draw(seed) for seed in seeds])


def inside(crop, shape, box):
    """Part of an annotated box, given in parts of the sides, that lies in a crop (top, left, height, width)."""
    top, left, bottom, right = np.array(box) * [*shape, *shape]
    tall = max(0, min(bottom, crop[0] + crop[2]) - max(top, crop[0]))
    wide = max(0, min(right, crop[1] + crop[3]) - max(left, crop[1]))
    return tall * wide / ((bottom - top) * (right - left))


@pytest.mark.parametrize(
    ('shape', 'rule', 'boxes'),
    [
        ((375, 500), images.CropRule(), [[0.0, 0.0, 1.0, 1.0]]),
        ((375, 500), images.CropRule(), [[0.1, 0.6, 0.4, 0.9]]),
        ((500, 334), images.CropRule(covered=0.7), [[0.0, 0.0, 0.2, 0.2], [0.7, 0.5, 1.0, 1.0]]),
        ((400, 400), images.CropRule(0.1, (0.5, 0.6), (0.2, 0.3)), [[0.0, 0.0, 1.0, 1.0]]),
        ((200, 300), images.CropRule(1.0, (0.75, 1.33), (0.05, 1.0)), [[0.4, 0.4, 0.6, 0.6]]),
    ],
)
def test_every_box_keeps_to_the_rule(shape, rule, boxes):
    crops = drawn(shape, rule, boxes)
    assert len(np.unique(crops, axis=0)) > 250
    for top, left, height, width in crops:
        assert min(top, left) >= 0
        assert (top + height, left + width) <= shape
        if (height, width) == shape:
            continue  # what stands when no attempt succeeded
        assert rule.aspect[0] * (height - 1) <= width + 1  # up to whole pixels
        assert width - 1 <= rule.aspect[1] * (height + 1)
        area = height * width / np.prod(shape)
        slack = (height + width) / np.prod(shape)
        assert rule.area[0] - slack <= area <= rule.area[1] + slack
        assert max(inside((top, left, height, width), shape, box) for box in boxes) >= rule.covered - 0.02


def test_an_impossible_rule_gives_the_whole_image():
    rule = images.CropRule(covered=1.0, area=(0.05, 0.1))  # the annotated box is larger than any crop
    assert (drawn((60, 80), rule, [[0.0, 0.0, 1.0, 1.0]], 20) == [0, 0, 60, 80]).all()


def test_more_boxes_of_the_same_kind_change_nothing():
    box = [0.1, 0.6, 0.4, 0.9]
    np.testing.assert_array_equal(*(drawn((375, 500), RULE, [box] * count, 50) for count in (1, 4)))


def restated(image, size, kernel, support):
    """Resize by its definition: along each side, weights of the distances between pixels' centres, normalised."""

    def weights(have):
        centres = (np.arange(size) + 0.5) * have / size - 0.5
        distance = np.abs(centres[:, None] - np.arange(have)[None])
        found = np.where(distance < support, kernel(distance), 0)
        return found / found.sum(axis=1, keepdims=True)

    return np.einsum('yh,hwc,xw->yxc', weights(image.shape[0]), image.astype(float), weights(image.shape[1]))


def cubic(x):
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, far)


@pytest.mark.parametrize('shape', [(50, 70), (9, 7), (16, 40)])
@pytest.mark.parametrize(('method', 'kernel', 'support'), [('bilinear', lambda x: 1 - x, 1), ('bicubic', cubic, 2)])
def test_resize_restated_in_numpy(shape, method, kernel, support):
    image = noise(*shape, 3)
    want = np.clip(restated(image, 16, kernel, support), 0, 255)
    got = images.resize(tf.constant(image), 16, method).numpy()
    assert got.dtype == np.uint8
    inner = slice(2, -2)  # at the edges libraries differ in what stands for the pixels that are not there
    assert np.abs(got - want)[inner, inner].max() < 0.51
    if method == 'bilinear':
        edges = np.pad(image, [(1, 1), (1, 1), (0, 0)], 'edge')
        assert edges.min() <= got.min() <= got.max() <= edges.max()


def test_area_averages_what_falls_together():
    image = noise(48, 64, 3)
    want = image.reshape(16, 3, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(images.resize(tf.constant(image), 16, 'area').numpy() - want).max() < 0.51
    stripes = np.tile(np.array([0, 255], np.uint8), 32)[None, :, None] * np.ones((64, 1, 3), np.uint8)
    assert np.ptp(images.resize(tf.constant(stripes), 16, 'area').numpy()) == 0  # antialiased
    small = noise(4, 8, 3)
    enlarged = images.resize(tf.constant(small), 16, 'area').numpy()
    np.testing.assert_array_equal(enlarged, small.repeat(4, axis=0).repeat(2, axis=1))


def test_the_short_side_of_evaluation_is_that_of_the_reference():
    assert all(int(size / 0.875) == size * 256 // 224 for size in range(1, 2000))
    image = noise(40, 60, 3)
    view = images.central_view(tf.constant(image), 20, ratio=0.5).numpy()
    np.testing.assert_array_equal(view, image[10:30, 20:40])  # short side to 40: not resized at all


def test_only_the_box_of_a_jpeg_is_decoded_and_it_is_the_right_one():
    smooth = np.stack([*np.meshgrid(np.arange(64) * 4, np.arange(96) * 2), np.full((96, 64), 9)], axis=-1)
    encoded = tf.io.encode_jpeg(tf.constant(smooth.astype(np.uint8)), quality=98)
    for i in range(20):
        seed = tf.constant([i, i], tf.int64)
        fused = images.decode_distorted_crop(encoded, seed, WHOLE, 24, RULE).numpy().astype(int)
        plain = images.distorted_crop(images.decode(encoded), seed, WHOLE, 24, RULE).numpy().astype(int)
        assert np.abs(fused - plain).max() <= 8  # chroma is upsampled without what lies beyond the box


def test_decode_goes_by_content_and_always_gives_three_channels():
    grey, colour, alpha = noise(6, 5, 1), noise(6, 5, 3), noise(6, 5, 4)
    np.testing.assert_array_equal(images.decode(tf.io.encode_png(grey)), np.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(images.decode(tf.io.encode_png(colour)), colour)
    np.testing.assert_array_equal(images.decode(tf.io.encode_png(alpha)), alpha[..., :3])
    with pytest.raises(tf.errors.InvalidArgumentError):
        images.decode(tf.constant(b''))


def bmp(image):
    file = io.BytesIO()
    image.save(file, 'BMP')
    return file.getvalue()


@pytest.mark.parametrize('colours', [2**8, 7, 3])
def test_a_bmp_with_a_table_of_colours(colours):
    image = Image.fromarray(noise(9, 6, 3)).quantize(colours)
    for decode in (images.decode, tf.function(images.decode)):
        np.testing.assert_array_equal(decode(tf.constant(bmp(image))), np.asarray(image.convert('RGB')))


def test_a_bmp_without_one():
    for image in (Image.fromarray(noise(9, 6, 3)), Image.fromarray(noise(9, 6, 1)[..., 0])):
        np.testing.assert_array_equal(images.decode(tf.constant(bmp(image))), np.asarray(image.convert('RGB')))


def test_a_damaged_bmp():
    whole = bytearray(bmp(Image.fromarray(noise(9, 6, 3)).quantize(7)))
    decode = tf.function(images.decode).get_concrete_function(tf.TensorSpec((), tf.string))
    for length in range(2, len(whole) - 4 * 9, 3):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode(tf.constant(bytes(whole[:length])))
    whole[-8] = 250  # a colour that is not in the table
    with pytest.raises(tf.errors.InvalidArgumentError, match='not in the table'):
        decode(tf.constant(bytes(whole)))
