"""Image operations as TensorFlow graphs: uint8 in, uint8 out, every random draw from the example's own seeds.

A resize computes in fp32 and is rounded to the nearest level (half to even). The bilinear one has no antialiasing,
as in the reference pipeline. Casting and normalising belong to the device, which thus receives a quarter of the
bytes.

An orientation in a photograph's EXIF data is ignored, as TensorFlow and the reference ignore it: the pixels count
as they are stored.

An example's two uint32 seeds are used as follows: the lowest bit of the first is the flip, the upper 31 bits
of each are the vertical and horizontal offset of a padded crop, and the pair seeds a distorted crop.
"""

import dataclasses

from input_pipeline.quiet_tf import tf

_KERNELS = {  # by the name of a method: kernel, and whether it is widened by the factor of shrinking
    'bilinear': ('triangle', False),
    'bicubic': ('keyscubic', False),
    'area': ('box', True),
}


@dataclasses.dataclass(frozen=True)
class CropRule:
    """Which boxes a distorted crop may cut out.

    Attributes:
        covered: the least part of some annotated box that lies inside, 0 … 1; without boxes, of the image.
        aspect: least and greatest width ÷ height.
        area: least and greatest part of the image's area.
    """

    covered: float = 0.1
    aspect: tuple[float, float] = (0.75, 1.33)
    area: tuple[float, float] = (0.05, 1.0)


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
    with tf.control_dependencies([image]):  # then its header is whole
        contents = tf.identity(contents)
    is_bmp = tf.strings.substr(contents, 0, 2) == b'BM'
    image = tf.cond(is_bmp, lambda: _with_colours(contents, image), lambda: image)
    return tf.ensure_shape(image, (None, None, 3))


def _with_colours(bmp: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    """Looks colours up where a BMP has 8 bits a pixel: they number those in a table, and TensorFlow calls them grey."""

    def number(start: int, dtype: tf.DType) -> tf.Tensor:
        return tf.cast(tf.io.decode_raw(tf.strings.substr(bmp, start, dtype.size), dtype)[0], tf.int32)

    def look_up() -> tf.Tensor:
        pixels, table = number(10, tf.int32), 14 + number(14, tf.int32)  # where they start
        rows = tf.reshape(tf.io.decode_raw(tf.strings.substr(bmp, table, (pixels - table) // 4 * 4), tf.uint8), (-1, 4))
        numbers = tf.cast(image[..., 0], tf.int32)
        known = tf.debugging.assert_less(tf.reduce_max(numbers), tf.shape(rows)[0], 'a colour that is not in the table')
        with tf.control_dependencies([known]):
            return tf.gather(rows[:, 2::-1], numbers)  # blue, green, red, nothing

    return tf.cond(number(28, tf.uint16) == 8, look_up, lambda: image)


def to_uint8(image: tf.Tensor) -> tf.Tensor:
    """Rounds fp32 levels to the nearest of 0 … 255; a cubic kernel overshoots at edges."""
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def resize(images: tf.Tensor, size: int, method: str = 'bilinear') -> tf.Tensor:
    """Resizes uint8 [..., H, W, 3] to uint8 [..., size, size, 3], whatever the aspect ratio.

    'bilinear' and 'bicubic' interpolate between the nearest 2 × 2 and 4 × 4 pixels; 'area' averages over all pixels
    that fall together, which is antialiased, and repeats them where it enlarges. Pixels have their centres at half
    integers.
    """
    if method == 'bilinear':  # three times as fast as `scale`, with the same result
        return tf.cast(tf.round(tf.image.resize(images, (size, size))), tf.uint8)
    shape = tf.shape(images)
    view = scale(tf.reshape(images, tf.concat([[-1], shape[-3:]], 0)), size, size / shape[-3:-1], (0.0, 0.0), method)
    return to_uint8(tf.reshape(view, tf.concat([shape[:-3], tf.shape(view)[1:]], 0)))


def scale(images: tf.Tensor, size: int, factors: tf.Tensor, shift: tf.Tensor, method: str) -> tf.Tensor:
    """Resizes [N, H, W, 3] by two factors, shifts by pixels of the result, and cuts fp32 [N, size, size, 3] out."""
    kernel, antialias = _KERNELS[method]
    return tf.raw_ops.ScaleAndTranslate(
        images=images,
        size=(size, size),
        scale=tf.cast(factors, tf.float32),
        translation=shift,
        kernel_type=kernel,
        antialias=antialias,
    )


def central_view(image: tf.Tensor, size: int, ratio: float = 224 / 256, method: str = 'bilinear') -> tf.Tensor:
    """What evaluation sees of a photograph: short side to ⌊size ÷ ratio⌋, then the central square.

    Only the square is computed, so a very long picture costs no more than another. An image that is
    size × size already is left alone: a folder of small pictures keeps its borders and its pixels.

    Args:
        image: uint8 [H, W, 3].
        size: side of the result in pixels.
        ratio: side of the square ÷ short side, at most 1.
        method: of `resize`.

    Returns:
        uint8 [size, size, 3].
    """
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    resized = tf.round(shape * int(size / ratio) / tf.reduce_min(shape))
    view = scale(image[None], size, resized / shape, -tf.floor((resized - size) / 2), method)[0]
    chosen = tf.cond(tf.reduce_all(shape == size), lambda: image, lambda: to_uint8(view))
    return tf.ensure_shape(chosen, (size, size, 3))


def distorted_box(shape: tf.Tensor, seed: tf.Tensor, rule: CropRule, boxes: tf.Tensor) -> tf.Tensor:
    """Draws the box of an Inception crop.

    Args:
        shape: int32 [3], height, width and channels.
        seed: int64 [2].
        rule: which boxes will do.
        boxes: float32 [m, 4], annotated ones as top, left, bottom, right in parts of the sides; m ≥ 1.

    Returns:
        int32 [4]: top, left, height, width; the whole image when 100 attempts found no box.
    """
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        boxes[None],
        seed,
        min_object_covered=rule.covered,
        aspect_ratio_range=rule.aspect,
        area_range=rule.area,
        max_attempts=100,
    )
    return tf.concat([begin[:2], extent[:2]], axis=0)


def distorted_crop(
    image: tf.Tensor, seed: tf.Tensor, boxes: tf.Tensor, size: int, rule: CropRule, method: str = 'bilinear'
) -> tf.Tensor:
    """Cuts a distorted box out of uint8 [H, W, 3] and resizes it to uint8 [size, size, 3]."""
    top, left, height, width = tf.unstack(distorted_box(tf.shape(image), seed, rule, boxes))
    return resize(image[top : top + height, left : left + width], size, method)


def decode_distorted_crop(
    contents: tf.Tensor, seed: tf.Tensor, boxes: tf.Tensor, size: int, rule: CropRule, method: str = 'bilinear'
) -> tf.Tensor:
    """`distorted_crop` of an encoded image; of a JPEG only the box is decoded, which is most of the time.

    Args:
        contents: string scalar, the bytes of the file.
        seed: int64 [2].
        boxes: float32 [m, 4], as in `distorted_box`.
        size: side of the result in pixels.
        rule: which boxes will do.
        method: of `resize`.

    Returns:
        uint8 [size, size, 3].

    Raises:
        tf.errors.InvalidArgumentError: when run, if the box cannot be decoded.
    """

    def jpeg() -> tf.Tensor:
        box = distorted_box(tf.io.extract_jpeg_shape(contents), seed, rule, boxes)
        crop = tf.io.decode_and_crop_jpeg(contents, box, channels=3)
        return resize(crop, size, method)

    def other() -> tf.Tensor:
        return distorted_crop(decode(contents), seed, boxes, size, rule, method)

    return tf.cond(tf.io.is_jpeg(contents), jpeg, other)


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors uint8 [H, W, 3] left to right if its first seed (int64 [2]) is odd."""

    def mirrored() -> tf.Tensor:
        # Told to reverse nothing, this operation takes more than twice as long as for mirroring.
        return tf.raw_ops.Reverse(tensor=image, dims=[False, True, False])

    return tf.cond(seed[0] % 2 == 1, mirrored, lambda: image)


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
