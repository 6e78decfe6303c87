"""Single images as evaluation sees them: for prediction on files, and on arrays in a notebook."""

import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from input_pipeline import images
from input_pipeline.errors import DataError
from input_pipeline.folder import EXTENSIONS
from input_pipeline.quiet_tf import tf

View = Callable[[str | pathlib.Path | np.ndarray], np.ndarray]


def make_view(
    image_size: int, stored_shape: Sequence[int] | None, crop_ratio: float = 224 / 256, resize: str = 'bilinear'
) -> View:
    """Returns the function from an image, a path or uint8 [H, W, 3], to what a model is shown of it.

    Of a photograph that is `images.central_view`. A data set held in memory has images of one shape, which training
    and evaluation resize whole: any image is first brought to that shape (its largest central part of the same
    aspect ratio, antialiased), so that the model sees it as coarse as those it knows.

    Args:
        image_size: side of the view in pixels.
        stored_shape: (H, W, 3) of the data set's images in memory, None if they are read encoded.
        crop_ratio: of `images.central_view`, for photographs.
        resize: of `images.resize`, for photographs.

    Returns:
        A function that gives uint8 [image_size, image_size, 3] and may be called from several threads. It raises
        DataError, with the path, for a file that cannot be read or is no image, and for arrays of another kind.
    """

    def see(image: tf.Tensor) -> tf.Tensor:
        if stored_shape is None:
            return images.central_view(image, image_size, crop_ratio, resize)
        stored = _to_shape(image, *stored_shape[:2])
        return stored if stored.shape[:2] == (image_size, image_size) else images.resize(stored, image_size)

    # Traced here, once: several threads that meet an untraced function would each do it.
    decode = tf.function(images.decode).get_concrete_function(tf.TensorSpec((), tf.string))
    see = tf.function(see).get_concrete_function(tf.TensorSpec((None, None, 3), tf.uint8))

    def view(image: str | pathlib.Path | np.ndarray) -> np.ndarray:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise DataError(f'an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}')
            return see(tf.constant(image)).numpy()
        if not isinstance(image, str | pathlib.Path):
            raise DataError(f'an image must be a path or a numpy array, uint8 [H, W, 3], got {type(image).__name__}')
        try:
            return see(decode(tf.constant(pathlib.Path(image).read_bytes()))).numpy()
        except OSError as error:
            raise DataError(f'{image}: {error.strerror}') from error
        except ValueError as error:  # a zero byte, which no path may have
            raise DataError(f'{str(image)!r}: {error}') from error
        except tf.errors.InvalidArgumentError as error:
            raise DataError(f'{image}: no JPEG, PNG, BMP or GIF, or a damaged one') from error

    return view


def find_images(names: Sequence[str], skip: Callable[[str, DataError], None]) -> list[str]:
    """Replaces folders by the images in and below them (by their extensions), in the order of their names.

    Args:
        names: Of files and folders.
        skip: Is told of folders that hold none.
    """
    found = []
    for name in names:
        if not os.path.isdir(name):  # pathlib's raises for names that are too long
            found.append(name)
            continue
        inside = pathlib.Path(name).rglob('*')
        files = sorted(str(path) for path in inside if path.suffix.lower() in EXTENSIONS and path.is_file())
        if not files:
            skip(name, DataError(f'{name} holds no images ({", ".join(EXTENSIONS)})'))
        found += files
    return found


def _to_shape(image: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """The largest central part of uint8 [H, W, 3] with the aspect ratio height : width, at that size."""
    shape = tf.shape(image)[:2]
    scale = tf.reduce_min(tf.cast(shape, tf.float32) / (height, width))
    box = tf.minimum(shape, tf.maximum(1, tf.cast(tf.round(scale * (height, width)), tf.int32)))
    top, left = tf.unstack((shape - box) // 2)
    part = image[top : top + box[0], left : left + box[1]]
    resized = tf.image.resize(part, (height, width), antialias=True)
    return images.to_uint8(resized)
