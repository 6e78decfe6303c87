"""How fast photographs become batches on the host, beside a plain tf.data loop and a torch DataLoader.

Every pipeline takes the same JPEG files to uint8 batches of cropped, mirrored and resized photographs. They take turns,
a round each, and the medians over the rounds are compared. Without --photos the files are made here: crops of
scikit-learn's two sample photographs at the size of ImageNet's, 500 × 375 pixels, as JPEGs of quality 90.

- ours: `input_pipeline.train_batches` from class folders, every batch a function of the seed.
- tf_data: the plain loop, in no fixed order, with the same crop, resize and rounding; it is below, in twenty lines.
- torch: a DataLoader with as many workers as cores. Pillow decodes, crops as torchvision's RandomResizedCrop and
  resizes with antialiasing, which is Pillow's only way; the result is uint8, without the normalising in fp32 that most
  people also do in the worker.

The overlap: a consumer that takes as long for a batch as the pipeline does, so that without overlap the two take
twice as long together as either. It is measured with a consumer that sleeps, as one whose work is on an accelerator
does, through the copies to the device that training makes.

--resume_cost measures something else: what a run pays for going on in the middle of an epoch of ImageNet.
"""

import argparse
import importlib.util
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from efficientnet.errors import ConfigError
from experiments.benchmark import resume
from experiments.benchmark.setup import progress, start_jax, table

TARGETS = {'tf_data': 1.3, 'torch': 3.0}
OVERLAP_TARGET = 1.1
AHEAD = 8  # batches: more than any of them makes ahead
OTHERS = {'torch': 'make bench-setup'}  # what is not installed with requirements.txt, and what installs it


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    parser.add_argument('--photos', default='', help='folder of JPEGs, at any depth; made if there is none')
    parser.add_argument('--image_size', type=int, default=224, help='pixels a side (%(default)s)')
    parser.add_argument('--batch', type=int, default=64, help='photographs a batch (%(default)s)')
    parser.add_argument('--batches', type=int, default=30, help='batches a round (%(default)s)')
    parser.add_argument('--rounds', type=int, default=5, help='rounds of every pipeline (%(default)s)')
    parser.add_argument(
        '--resume_cost',
        action='store_true',
        help="measure instead what going on in the middle of an epoch costs at ImageNet's size",
    )
    parser.add_argument(
        '--records', type=int, default=resume.RECORDS, help='of the data set of --resume_cost (%(default)s)'
    )
    parser.add_argument('--json', action='store_true', help='print one JSON object instead of text')


def run(args: Mapping[str, Any]) -> dict[str, Any]:
    """Measures all pipelines in turn, and the overlap of ours.

    Raises:
        ConfigError: A flag is out of range.
    """
    for name in ('image_size', 'batch', 'batches', 'rounds', 'records'):
        if args[name] < 1:
            raise ConfigError(f'--{name}={args[name]} must be at least 1')
    if args['resume_cost']:
        return resume.run(args)
    with tempfile.TemporaryDirectory() as scratch:
        tree = lay_out(args['photos'], pathlib.Path(scratch))
        start_jax(1)
        files = sorted(map(str, tree.rglob('*.jpg')))
        pipelines = {'ours': ours(tree, args), 'tf_data': tf_data(files, args)}
        missing = {name: how for name, how in OTHERS.items() if importlib.util.find_spec(name) is None}
        if 'torch' not in missing:
            pipelines['torch'] = torch_loader(files, args)
        seconds: dict[str, list[float]] = {name: [] for name in pipelines}
        for name, batches in pipelines.items():
            check(name, next(batches), args)
            take(batches, AHEAD)  # the first batches pay for the start
        for number in range(args['rounds']):
            for name, batches in pipelines.items():
                take(batches, AHEAD)  # those that were made while another had its turn
                seconds[name].append(take(batches, args['batches']))
            speeds = ', '.join(f'{name} {args["batches"] * args["batch"] / s[-1]:.0f}' for name, s in seconds.items())
            progress(f'round {number + 1} of {args["rounds"]}, images/s: {speeds}')
        load = statistics.median(seconds['ours']) / args['batches']
        together = overlap(pipelines['ours'], load, args['batches'])
    return summary(args, seconds, together, missing)


def lay_out(photos: str, scratch: pathlib.Path) -> pathlib.Path:
    """Makes a tree <scratch>/train/all/*.jpg of links to the photographs, or of new ones.

    Raises:
        ConfigError: There are no JPEGs in the folder given.
    """
    folder = scratch / 'train' / 'all'
    folder.mkdir(parents=True)
    if not photos:
        make_photos(folder)
        return scratch
    found = sorted(path for path in pathlib.Path(photos).rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg'))
    if not found:
        raise ConfigError(f'--photos={photos!r} holds no *.jpg; leave it out to have some made')
    for number, path in enumerate(found):
        (folder / f'{number:06d}.jpg').symlink_to(path.resolve())
    return scratch


def make_photos(folder: pathlib.Path, count: int = 200) -> None:
    """Writes random views of two real photographs, 640 × 427, as JPEGs of 500 × 375 or 375 × 500 pixels."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    sources = [Image.fromarray(image) for image in load_sample_images().images]
    draw = np.random.default_rng(0)
    for number in range(count):
        source = sources[number % 2]
        size = (500, 375) if number % 4 else (375, 500)
        zoom = draw.uniform(max(size[0] / source.width, size[1] / source.height), 1.0) if number % 4 else 1.0
        width, height = (min(round(side / zoom), limit) for side, limit in zip(size, source.size, strict=True))
        left, top = draw.integers(0, source.width - width + 1), draw.integers(0, source.height - height + 1)
        view = source.resize(size, Image.LANCZOS, (left, top, left + width, top + height))
        view.save(folder / f'{number:06d}.jpg', quality=90)


def ours(tree: pathlib.Path, args: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Yields the images of our batches."""
    import input_pipeline

    source = input_pipeline.open_source('folder', 'train', str(tree))
    batches = input_pipeline.train_batches(
        source, image_size=args['image_size'], global_batch=args['batch'], num_batches=10**9, seed=0
    )
    return (batch['image'] for batch in batches)


def tf_data(files: list[str], args: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Yields the images of the plain loop, which says nothing of order, damage, resumption or other formats."""
    from input_pipeline.quiet_tf import tf

    size, whole = (args['image_size'],) * 2, tf.constant([[[0.0, 0.0, 1.0, 1.0]]])

    def view(path: tf.Tensor) -> tf.Tensor:
        data = tf.io.read_file(path)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            whole,
            min_object_covered=0.1,
            aspect_ratio_range=(0.75, 1.33),
            area_range=(0.05, 1.0),
        )
        image = tf.io.decode_and_crop_jpeg(data, tf.concat([begin[:2], extent[:2]], axis=0), channels=3)
        image = tf.image.random_flip_left_right(tf.image.resize(image, size))
        return tf.cast(tf.round(image), tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    dataset = dataset.map(view, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
    # As many batches ahead as ours: a buffer left to AUTOTUNE fills while the others have their turns.
    return dataset.batch(args['batch']).prefetch(3).as_numpy_iterator()


class Photographs:
    """The data set of the DataLoader: a file's number -> uint8 [3, S, S]."""

    def __init__(self, files: list[str], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Any:
        import torch
        from PIL import Image

        with Image.open(self.files[number]) as image:
            image = image.convert('RGB')
        left, top, width, height = resized_crop_box(
            *image.size, lambda low, high: float(torch.empty(1).uniform_(low, high))
        )
        image = image.crop((left, top, left + width, top + height)).resize((self.size, self.size), Image.BILINEAR)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resized_crop_box(width: int, height: int, uniform: Callable[[float, float], float]) -> tuple[int, int, int, int]:
    """Draws left, top, width and height as RandomResizedCrop does, with the part of the area that ours has."""
    for _ in range(10):
        area = width * height * uniform(0.05, 1.0)
        aspect = np.exp(uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(uniform(0, width - w + 1)), int(uniform(0, height - h + 1)), w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def torch_loader(files: list[str], args: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Yields the images of a DataLoader, pass after pass."""
    import torch

    sampler = torch.utils.data.RandomSampler(files, replacement=True, num_samples=10**9)
    loader = torch.utils.data.DataLoader(
        Photographs(files, args['image_size']),
        args['batch'],
        sampler=sampler,
        num_workers=os.cpu_count(),
        multiprocessing_context='spawn',  # TensorFlow and JAX have threads, which a fork would lose
    )
    return (batch.permute(0, 2, 3, 1).numpy() for batch in loader)


def check(name: str, images: np.ndarray, args: Mapping[str, Any]) -> None:
    """Raises ConfigError unless a pipeline gives what it is compared for."""
    size = args['image_size']
    if images.shape != (args['batch'], size, size, 3) or images.dtype != np.uint8:
        raise ConfigError(f'{name} gave {images.dtype} {images.shape}')


def take(batches: Iterator[Any], count: int) -> float:
    """Takes some batches and returns the seconds it took."""
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - began


def overlap(images: Iterator[np.ndarray], seconds: float, count: int) -> float:
    """Returns how long a batch takes a consumer that sleeps for `seconds`, ÷ `seconds`, with copies to the device."""
    from efficientnet.parallel.grid import Grid
    from efficientnet.parallel.layout import make_layout

    layout = make_layout(
        global_batch=1,
        micro_batch=1,
        replicas=1,
        splits=(),
        devices=1,
        processes=1,
        schedule='grouped',
        recompute='none',
    )
    batches = Grid(layout).prefetch(({'image': image} for image in images), 3)
    take(batches, AHEAD)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
        time.sleep(seconds)
    return (time.perf_counter() - began) / count / seconds


def summary(
    args: Mapping[str, Any], seconds: Mapping[str, list[float]], together: float, missing: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the medians and what they come to."""
    images, cores = args['batches'] * args['batch'], os.cpu_count() or 1
    speed = {name: images / statistics.median(times) for name, times in seconds.items()}
    return {
        'benchmark': 'input',
        'flags': dict(args),
        'cores': cores,
        'images_per_second': speed,
        'images_per_second_per_core': {name: value / cores for name, value in speed.items()},
        'range': {name: [images / max(times), images / min(times)] for name, times in seconds.items()},
        'ratio': {name: speed['ours'] / value for name, value in speed.items() if name != 'ours'},
        'overlap': together,
        'bytes_per_image': args['image_size'] ** 2 * 3,
        'missing': dict(missing),
    }


def show(result: Mapping[str, Any]) -> str:
    """Returns the table and what became of the targets."""
    if result['flags']['resume_cost']:
        return resume.show(result)
    flags = result['flags']
    rows = [('images/s', 'median', 'slowest', 'fastest', 'a core', 'ours ÷ it', 'target')]
    for name, speed in result['images_per_second'].items():
        low, high = result['range'][name]
        ratio, target = result['ratio'].get(name), TARGETS.get(name)
        verdict = f'{target} {"met" if ratio >= target else "missed"}' if ratio and target else ''
        numbers = (f'{number:,.0f}' for number in (speed, low, high, speed / result['cores']))
        rows.append((name, *numbers, f'{ratio:.2f}' if ratio else '', verdict))
    photos = flags['photos'] or 'made from two photographs, 500 × 375'
    lines = [f'JPEGs {photos} -> {flags["image_size"]} pixels, batches of {flags["batch"]}, {result["cores"]} cores']
    lines += ['', table(rows), '']
    lines += [f'{name}: not installed ({how})' for name, how in result['missing'].items()]
    met = 'met' if result['overlap'] <= OVERLAP_TARGET else 'missed'
    lines += [
        f'loading for T beside a step of T (asleep): {result["overlap"]:.2f} T (target {OVERLAP_TARGET}, {met})',
        f'bytes sent to the device: {result["bytes_per_image"]:,} an image',
    ]
    return '\n'.join(lines)
