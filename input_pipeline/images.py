"""Image operations as TensorFlow graphs: uint8 in, uint8 out, every random draw from the example's own seeds.

A bilinear resize computes in fp32 and is rounded to the nearest level (half to even); there is no
antialiasing, as in the reference pipeline. Casting and normalising belong to the device, which thus receives
a quarter of the bytes.

An example's two uint32 seeds are used as follows: the lowest bit of the first is the flip, the upper 31 bits
of each are the vertical and horizontal offset of a padded crop, and the pair seeds a distorted crop.
"""

from input_pipeline.quiet_tf import tf


def decode(contents: tf.Tensor) -> tf.Tensor:
    """Decodes JPEG (CMYK too), PNG, BMP or the first frame of a GIF, going by content rather than by name.

    Args:
        contents: string scalar, the bytes of the file.

    Returns:
        uint8 [H, W, 3]; grey is repeated, alpha dropped.

    Raises:
        tf.errors.InvalidArgumentError: when run, if the bytes are no complete image.
    """
    image = tf.io.decode_image(contents, channels=3, expand_animations=False)
    return tf.ensure_shape(image, (None, None, 3))


def to_uint8(image: tf.Tensor) -> tf.Tensor:
    """Rounds fp32 levels within 0 … 255 to uint8."""
    return tf.cast(tf.round(image), tf.uint8)


def resize(images: tf.Tensor, size: int) -> tf.Tensor:
    """Bilinear resize of uint8 [..., H, W, 3] to uint8 [..., size, size, 3], whatever the aspect ratio."""
    return to_uint8(tf.image.resize(images, (size, size)))


def central_view(image: tf.Tensor, size: int) -> tf.Tensor:
    """What evaluation sees of a photograph: short side to ⌊size·256/224⌋, then the central square.

    Only the square is computed, so a very long picture costs no more than another. An image that is
    size × size already is left alone: a folder of small pictures keeps its borders and its pixels.

    Args:
        image: uint8 [H, W, 3].
        size: side of the result in pixels.

    Returns:
        uint8 [size, size, 3].
    """
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    resized = tf.round(shape * (size * 256 // 224) / tf.reduce_min(shape))
    view = tf.raw_ops.ScaleAndTranslate(
        images=image[None],
        size=(size, size),
        scale=resized / shape,
        translation=-tf.floor((resized - size) / 2),
        kernel_type='triangle',
        antialias=False,
    )[0]
    chosen = tf.cond(tf.reduce_all(shape == size), lambda: image, lambda: to_uint8(view))
    return tf.ensure_shape(chosen, (size, size, 3))


def distorted_box(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """The Inception crop: 5-100 % of the area, aspect ratio 3:4 to 4:3, a tenth of the image or more.

    Args:
        shape: int32 [3], height, width and channels.
        seed: int64 [2].

    Returns:
        int32 [4]: top, left, height, width; the whole image when 100 attempts found no box.
    """
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed,
        min_object_covered=0.1,
        aspect_ratio_range=(0.75, 1.33),
        area_range=(0.05, 1.0),
        max_attempts=100,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], extent[:2]], axis=0)


def distorted_crop(image: tf.Tensor, seed: tf.Tensor, size: int) -> tf.Tensor:
    """Cuts a distorted box out of uint8 [H, W, 3] and resizes it to uint8 [size, size, 3]."""
    top, left, height, width = tf.unstack(distorted_box(tf.shape(image), seed))
    return resize(image[top : top + height, left : left + width], size)


def decode_distorted_crop(contents: tf.Tensor, seed: tf.Tensor, size: int) -> tf.Tensor:
    """`distorted_crop` of an encoded image; of a JPEG only the box is decoded, which is most of the time.

    Args:
        contents: string scalar, the bytes of the file.
        seed: int64 [2].
        size: side of the result in pixels.

    Returns:
        uint8 [size, size, 3].

    Raises:
        tf.errors.InvalidArgumentError: when run, if the box cannot be decoded.
    """

    def jpeg() -> tf.Tensor:
        box = distorted_box(tf.io.extract_jpeg_shape(contents), seed)
        crop = tf.io.decode_and_crop_jpeg(contents, box, channels=3)
        return resize(crop, size)

    return tf.cond(tf.io.is_jpeg(contents), jpeg, lambda: distorted_crop(decode(contents), seed, size))


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors uint8 [H, W, 3] left to right if its first seed (int64 [2]) is odd."""
    return tf.cond(seed[0] % 2 == 1, lambda: tf.reverse(image, axis=[1]), lambda: image)


def random_window(images: tf.Tensor, seeds: tf.Tensor, pad: int, flip: bool) -> tf.Tensor:
    """Pads a batch with zeros on every side, cuts a window of the old size out of each image and mirrors some.

    An offset is ⌊s · (2·pad + 1) / 2³¹⌋ with s the upper 31 bits of the seed: uniform over 0 … 2·pad. One
    gather does it all; for small images that is several times faster than reversing and selecting.

    Args:
        images: uint8 [N, S, S, 3].
        seeds: int64 [N, 2], each below 2³²; the first gives the vertical offset and the flip.
        pad: pixels, ≥ 0.
        flip: whether to mirror those whose first seed is odd.

    Returns:
        uint8 [N, S, S, 3].
    """
    size = images.shape[1]
    wide = size + 2 * pad
    padded = tf.pad(images, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    offsets = (seeds // 2) * (2 * pad + 1) // 2**31
    along = tf.range(size, dtype=tf.int64)[None]
    mirrored = (seeds[:, :1] % 2 == 1) & flip
    rows = offsets[:, :1] + along
    columns = offsets[:, 1:] + tf.where(mirrored, size - 1 - along, along)
    pixels = rows[:, :, None] * wide + columns[:, None, :]
    return tf.gather(tf.reshape(padded, (-1, wide * wide, 3)), pixels, batch_dims=1)
