"""Image operations against NumPy and against TensorFlow's plainer ways."""

import numpy as np
import pytest

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


def test_distorted_boxes_keep_to_area_and_aspect():
    boxes = np.array(
        [
            images.distorted_box(tf.constant([100, 160, 3]), tf.constant([i, 5], tf.int64), RULE, WHOLE)
            for i in range(300)
        ]
    )
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 100).all()
    assert (left + width <= 160).all()
    area, aspect = height * width / 16000, width / height
    assert area.min() > 0.09  # a tenth of the image must be covered, up to whole pixels
    assert area.max() > 0.5
    assert ((aspect > 0.72) & (aspect < 1.36)).all()  # 3:4 to 4:3, up to whole pixels


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
