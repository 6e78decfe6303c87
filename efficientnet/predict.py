"""A trained model put to use: classes of image files on the command line, and of images in a notebook.

    from efficientnet.predict import load

    model = load('runs/digits')
    model.classify(['seven.png'])[0]  # [{'index': 7, 'name': '7', 'probability': 0.97}, …]

Images are seen as in evaluation and computed in the run's own numbers.
"""

import csv
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from efficientnet.errors import RunError
from efficientnet.parallel.accumulation import normalise
from efficientnet.parallel.grid import compiler_options
from efficientnet.weights.class_names import readable
from efficientnet.weights.trained import Trained, read_run
from input_pipeline.errors import DataError

Tree = Any
Guess = dict[str, int | str | float]  # 'index', 'name', 'probability'
Image = str | pathlib.Path | np.ndarray


def make_probabilities(trained: Trained, **options: Any) -> Callable[[Tree, jax.Array], jax.Array]:
    """Returns the function from variables and uint8 images [N, S, S, 3] to probabilities, fp32 [N, classes].

    Args:
        trained: The model; its variables are cast to the compute dtype of its policy.
        options: Attributes of the network to change, such as norm.
    """
    model, augment = trained.model().clone(**options), trained.config.augment

    def probabilities(variables: Tree, images: jax.Array) -> jax.Array:
        cast = jax.tree.map(lambda leaf: leaf.astype(model.dtype), variables['params'])
        normal = normalise(images, tuple(augment.mean), tuple(augment.std), model.dtype)
        return jax.nn.softmax(model.apply({**variables, 'params': cast}, normal, train=False))

    return probabilities


class Classifier:
    """A model with its weights on the default device.

    Attributes:
        classes: Names for people, by index.
    """

    def __init__(self, trained: Trained, batch: int) -> None:
        from input_pipeline import views  # here: TensorFlow takes seconds to import

        self.classes = readable(trained.dataset.classes)
        self._batch, self._size = batch, trained.config.image_size
        ratio, resize = trained.config.evaluation.crop_ratio, trained.config.input.resize
        self._view = views.make_view(self._size, trained.dataset.image_shape, ratio, resize)
        self._variables = jax.device_put(trained.variables)
        self._probabilities = jax.jit(
            make_probabilities(trained), compiler_options=compiler_options(jax.default_backend())
        )

    def classify(self, images: Sequence[Image] | np.ndarray, top: int = 5) -> list[list[Guess]]:
        """Names what is on images.

        Args:
            images: Paths, or uint8 arrays [H, W, 3] of any size, or one array [N, H, W, 3].
            top: How many classes to name for each.

        Returns:
            For each image its likeliest classes, likeliest first.

        Raises:
            DataError: An image cannot be read or is of another kind.
        """
        array = isinstance(images, np.ndarray) and images.ndim == 4
        if not (array or isinstance(images, list | tuple)):
            raise DataError('images must be a list of paths or arrays, or one numpy array, uint8 [N, H, W, 3]')

        def refuse(_: Image, error: DataError) -> None:
            raise error

        return [guesses for _, guesses in self.each(images, top, refuse)]

    def each(
        self, images: Sequence[Image], top: int, skip: Callable[[Image, DataError], None]
    ) -> Iterator[tuple[Image, list[Guess]]]:
        """Yields each image with its likeliest classes, a batch at a time; `skip` is told of those left out."""
        waiting: tuple[list[Image], jax.Array] = ([], jnp.zeros((0, len(self.classes))))
        with ThreadPoolExecutor() as pool:
            for first in range(0, len(images), self._batch):
                chunk = images[first : first + self._batch]
                rows = np.zeros((min(self._batch, len(images)), self._size, self._size, 3), np.uint8)
                seen = []
                for image, view in zip(chunk, pool.map(self._try_view, chunk), strict=True):
                    if isinstance(view, DataError):
                        skip(image, view)
                    else:
                        rows[len(seen)] = view
                        seen.append(image)
                # The device computes this batch while the next one is read.
                ready, waiting = waiting, (seen, self._probabilities(self._variables, rows))
                yield from self._name(*ready, top)
        yield from self._name(*waiting, top)

    def _try_view(self, image: Image) -> np.ndarray | DataError:
        try:
            return self._view(image)
        except DataError as error:
            return error

    def _name(self, images: list[Image], probabilities: jax.Array, top: int) -> Iterator[tuple[Image, list[Guess]]]:
        for image, row in zip(images, np.asarray(probabilities), strict=False):  # rows beyond the images are padding
            best = np.argsort(-row, kind='stable')[:top]
            yield (
                image,
                [{'index': int(i), 'name': self.classes[i], 'probability': round(float(row[i]), 6)} for i in best],
            )


def load(workdir: str | pathlib.Path, weights: str = 'raw', batch: int = 32) -> Classifier:
    """Loads the newest weights of a run.

    Args:
        workdir: Its folder.
        weights: 'raw', 'averaged' (over epochs) or 'update_average', of those the run has.
        batch: Images computed at a time.

    Raises:
        ConfigError: There is no such run, or it has no such weights.
    """
    return Classifier(read_run(pathlib.Path(workdir).expanduser(), weights), batch)


def predict(workdir: pathlib.Path, names: Sequence[str], form: str, weights: str, out: TextIO) -> int:
    """The command: names what is on image files.

    Args:
        workdir: Of the run.
        names: Files and folders; '-' stands for the lines of standard input.
        form: 'text', 'csv' or 'json'.
        weights: As in `load`.
        out: Gets the predictions and nothing else; files that cannot be used are named on standard error.

    Returns:
        How many files were left out.

    Raises:
        ConfigError: As `load`.
        DataError: There are no files to look at, or none that can be read.
        RunError: The predictions cannot be written.
    """
    from input_pipeline import views  # here: TensorFlow takes seconds to import

    listed = [
        line
        for name in names
        for line in (sys.stdin.read().replace('\r\n', '\n').split('\n') if name == '-' else [name])
        if line.strip()
    ]
    if not listed:
        raise DataError('no images are named; give files, folders, or - and a list on standard input')
    skipped = []

    def skip(_: Image, error: DataError) -> None:
        skipped.append(error)
        print(f'skipped {error}', file=sys.stderr, flush=True)

    files = views.find_images(listed, skip)
    if not files:
        raise DataError('there are no images to look at')
    model, before = load(workdir, weights), len(skipped)
    try:
        WRITERS[form](model.each(files, 5, skip), out)
        out.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f'the predictions cannot be written: {error.strerror}') from error
    if len(skipped) - before == len(files):
        raise DataError('none of the images can be read')
    return len(skipped)


def _write_text(found: Iterator[tuple[Image, list[Guess]]], out: TextIO) -> None:
    for file, guesses in found:
        print(file, file=out)
        for guess in guesses:
            print(f'  {guess["probability"]:8.2%}  {guess["name"]}', file=out, flush=True)


def _write_csv(found: Iterator[tuple[Image, list[Guess]]], out: TextIO) -> None:
    table = csv.writer(out, lineterminator='\n')
    table.writerow(['file', 'rank', 'index', 'name', 'probability'])
    for file, guesses in found:
        table.writerows([file, rank, *guess.values()] for rank, guess in enumerate(guesses, start=1))


def _write_json(found: Iterator[tuple[Image, list[Guess]]], out: TextIO) -> None:
    json.dump([{'file': file, 'top': guesses} for file, guesses in found], out, indent=2)  # ASCII: bytes are escaped
    out.write('\n')


WRITERS = {'text': _write_text, 'csv': _write_csv, 'json': _write_json}
