"""Batches for the training loop: checked requests in, NumPy dicts out, damaged images counted on the way.

Everything that can be wrong with a request is said before work starts, in the words of the run's config.
"""

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from input_pipeline import order
from input_pipeline.errors import DataError
from input_pipeline.sources import Source, check_labels

log = logging.getLogger(__name__)

CROPS = ('none', 'pad', 'distorted')
METHODS = ('bilinear', 'bicubic', 'area')

Batch = dict[str, np.ndarray]


def train_batches(
    source: Source,
    *,
    image_size: int,
    global_batch: int,
    num_batches: int,
    seed: int,
    start_batch: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    crop: str = 'distorted',
    crop_covered: float = 0.1,
    crop_aspect: tuple[float, float] = (0.75, 1.33),
    crop_area: tuple[float, float] = (0.05, 1.0),
    pad: int = 0,
    flip: bool = True,
    resize: str = 'bilinear',
    crop_ratio: float = 224 / 256,
    prefetch: int = 3,
    damaged_limit: int = 0,
    damaged: dict[int, str] | None = None,
) -> Iterator[Batch]:
    """This process's rows of the training batches start_batch … num_batches − 1.

    The stream is endless and passes over the whole split again and again, each time in another order;
    batches straddle epochs. What stands in row r of global batch b, crop and flip included, depends on the
    seed, b and r only. Process k of P gets rows k·G/P … (k + 1)·G/P − 1 of a global batch of G.

    Args:
        source: what `open_source` returned.
        image_size: side of the images in pixels.
        global_batch: examples a batch, over all processes.
        num_batches: length of the stream in batches, those before start_batch included.
        seed: of the order and of all random draws, 0 ≤ seed < 2⁶⁴.
        start_batch: first batch to produce; those before it are not read.
        process_index: this process, from 0.
        process_count: number of processes.
        crop: 'distorted': a random box, for photographs; 'pad': the evaluation view, padded by `pad` zero pixels
            and cut at random; 'none': the evaluation view.
        crop_covered: least part of some annotated box, or else of the image, inside a distorted box.
        crop_aspect: least and greatest width ÷ height of a distorted box.
        crop_area: least and greatest part of the image's area that a distorted box is.
        pad: pixels on every side; means nothing to the other crops.
        flip: mirror half of the images left to right.
        resize: 'bilinear', 'bicubic' or 'area' (antialiased).
        crop_ratio: of the evaluation view, see `evaluation_batches`.
        prefetch: batches made ahead of the consumer.
        damaged_limit: distinct images that this process may fail to decode before it gives up.
        damaged: the images known to be damaged, which are not named again: index → place. Found ones are added.

    Returns:
        An iterator of read-only arrays: 'image' uint8 [local, S, S, 3], 'label' int32 [local] and 'mask'
        float32 [local] with local = global_batch / process_count. A damaged image is blank, label 0, mask 0.

    Raises:
        DataError: at once if the request makes no sense; while iterating, for damage or a wrong label.
    """
    _check(source, image_size, global_batch, process_index, process_count, resize, crop_ratio, damaged_limit)
    if source.label_sets:
        raise DataError(f'{source.name} has sets of right classes, not one label an image: it can only be tested on')
    _require(crop in CROPS, 'augment.crop', crop, f'one of {", ".join(CROPS)}')
    _require(pad >= 0, 'augment.pad', pad, 'at least 0 pixels')
    _require(0 <= seed < 2**64, 'seed', seed, 'from 0 to 2**64 - 1')
    _require(0 <= start_batch <= num_batches, 'start_batch', start_batch, f'from 0 to num_batches = {num_batches}')
    _require(0 <= crop_covered <= 1, 'augment.crop_covered', crop_covered, 'from 0 to 1')
    _require(_is_range(crop_aspect), 'augment.crop_aspect', crop_aspect, 'two numbers above 0, the lesser first')
    _require(
        _is_range(crop_area) and crop_area[1] <= 1,
        'augment.crop_area',
        crop_area,
        'two numbers above 0 and at most 1, the lesser first',
    )
    _require(prefetch >= 0, 'prefetch', prefetch, 'at least 0 batches')

    def start() -> Iterator[Batch]:
        from input_pipeline import images, pipeline  # here, not at the top: TensorFlow takes seconds to import

        plan = pipeline.Plan(
            examples=lambda rows: order.stream_rows(
                seed, order.process_positions(rows, global_batch, process_index, process_count), source.num_examples
            ),
            batches=range(start_batch, num_batches),
            local_batch=global_batch // process_count,
            image_size=image_size,
            resize=resize,
            ratio=crop_ratio,
            crop=crop,
            rule=images.CropRule(float(crop_covered), tuple(map(float, crop_aspect)), tuple(map(float, crop_area))),
            pad=pad,
            flip=flip,
            prefetch=prefetch,
        )
        return pipeline.host_batches(source, plan)

    return _checked(source, start, damaged_limit, damaged)


def evaluation_batches(
    source: Source,
    *,
    image_size: int,
    batch: int,
    process_index: int = 0,
    process_count: int = 1,
    resize: str = 'bilinear',
    crop_ratio: float = 224 / 256,
    damaged_limit: int = 0,
    damaged: dict[int, str] | None = None,
) -> Iterator[Batch]:
    """This process's rows of one pass over the split in index order; every process gets as many batches.

    Photographs: short side to ⌊S ÷ crop_ratio⌋, then the central square. Images in memory: resized if need be.

    Args:
        source: what `open_source` returned.
        image_size: side S of the images in pixels.
        batch: examples a batch, over all processes.
        process_index: this process, from 0.
        process_count: number of processes.
        resize: as in `train_batches`.
        crop_ratio: side of the central square ÷ short side; at most 1.
        damaged_limit: distinct images that this process may fail to decode before it gives up.
        damaged: as in `train_batches`.

    Returns:
        As `train_batches`, but 'label' uint8 [local, classes] where the source has label sets. The mask is 0 for the
        padding at the end as well, and for images whose set is empty; it is 1 exactly once for every other example.

    Raises:
        DataError: at once if the request makes no sense; while iterating, for damage or a wrong label.
    """
    _check(source, image_size, batch, process_index, process_count, resize, crop_ratio, damaged_limit)

    def start() -> Iterator[Batch]:
        from input_pipeline import pipeline  # as above

        plan = pipeline.Plan(
            examples=lambda rows: order.sequential_rows(
                order.process_positions(rows, batch, process_index, process_count), source.num_examples
            ),
            batches=range(-(-source.num_examples // batch)),
            local_batch=batch // process_count,
            image_size=image_size,
            resize=resize,
            ratio=crop_ratio,
            label_set=len(source.classes) if source.label_sets else 0,
        )
        return pipeline.host_batches(source, plan)

    return _checked(source, start, damaged_limit, damaged)


def _require(condition: bool, field: str, value: object, right: str) -> None:
    if not condition:
        raise DataError(f'{field} = {value!r} must be {right}')


def _is_range(values: Sequence[float]) -> bool:
    return len(values) == 2 and 0 < values[0] <= values[1]


def _check(
    source: Source,
    image_size: int,
    batch: int,
    process_index: int,
    process_count: int,
    resize: str,
    crop_ratio: float,
    damaged_limit: int,
) -> None:
    _require(image_size > 0, 'image_size', image_size, 'at least 1 pixel')
    _require(process_count > 0, 'process_count', process_count, 'at least 1')
    _require(0 <= process_index < process_count, 'process_index', process_index, f'from 0 to {process_count - 1}')
    _require(
        batch > 0 and batch % process_count == 0,
        'global_batch',
        batch,
        f'a multiple of the {process_count} processes, at least one example each',
    )
    _require(resize in METHODS, 'input.resize', resize, f'one of {", ".join(METHODS)}')
    _require(0 < crop_ratio <= 1, 'evaluation.crop_ratio', crop_ratio, 'above 0 and at most 1')
    _require(damaged_limit >= 0, 'input.damaged_limit', damaged_limit, 'at least 0 images')


def _checked(
    source: Source, start: Callable[[], Iterator[Batch]], damaged_limit: int, damaged: dict[int, str] | None
) -> Iterator[Batch]:
    """Drops 'index' once damage has been counted and the labels compared with the classes."""
    damaged = {} if damaged is None else damaged
    for batch in start():
        indices, mask, labels = batch['index'], batch['mask'], batch['label']
        for index in indices[(mask == 0) & (indices >= 0)].tolist():
            if index not in damaged:
                damaged[index] = source.locate(index)
                log.warning('skipping a damaged image: %s', damaged[index])
        if len(damaged) > damaged_limit:
            raise DataError(
                f'{source.name}: {len(damaged)} damaged images, more than input.damaged_limit ='
                f' {damaged_limit}: {", ".join(list(damaged.values())[:5])}'
            )
        if source.label_sets:
            mask = mask * labels.any(axis=1)
        else:
            check_labels(source, indices[mask > 0], labels[mask > 0])
        yield {'image': batch['image'], 'label': labels, 'mask': mask}
