"""Sizes and test accuracy of a run's exports, each measured on the file that was written, as a table.

python -m experiments.exports RUN [--onnx]
"""

import argparse
import itertools
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.export
import numpy as np

from efficientnet.convert import convert
from efficientnet.errors import one_line
from efficientnet.export import export
from efficientnet.loop.assemble import assemble
from efficientnet.loop.settings import for_evaluation
from efficientnet.predict import make_probabilities
from efficientnet.weights.trained import read_run

ROWS = (
    *itertools.product(('safetensors',), ('raw', 'averaged'), ('', '16.16', '32.32')),
    *itertools.product(('stablehlo',), ('raw', 'averaged'), ('16.16', 'bf16.16', '32.32')),
)
ONNX = tuple(itertools.product(('onnx',), ('raw', 'averaged'), ('32.32',)))


def reader(path: pathlib.Path, form: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function from uint8 images to probabilities that a file holds."""
    if form == 'stablehlo':
        return jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)
    if form == 'onnx':
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        (given,) = session.get_inputs()
        return lambda images: session.run(None, {given.name: images})[0]
    convert(path, path.with_suffix('.run'))
    trained = read_run(path.with_suffix('.run'))
    probabilities = jax.jit(make_probabilities(trained))
    return lambda images: probabilities(trained.variables, images)


def accuracy(run: Callable[[np.ndarray], np.ndarray], batches: Iterable[Mapping[str, np.ndarray]]) -> float:
    """Returns the share of the examples whose likeliest class is theirs, or is in their set of right ones.

    Args:
        run: As `reader` returns it.
        batches: Of `input_pipeline.evaluation_batches`.
    """
    hits, count = 0, 0
    for batch in batches:
        likeliest, label, counted = np.asarray(run(batch['image'])).argmax(1), batch['label'], batch['mask'] > 0
        right = label[np.arange(len(label)), likeliest] > 0 if label.ndim == 2 else likeliest == label
        hits += (right & counted).sum()
        count += counted.sum()
    return hits / count


def measure(arguments: argparse.Namespace) -> None:
    """Exports, measures and prints.

    Raises:
        ConfigError: There is no such run, or it lacks one of the weights.
        DataError: Its data set is missing or unusable.
    """
    parts = assemble(for_evaluation(read_run(arguments.run, field='RUN').config, 1), stored=True)
    print('| format | weights | policy | bytes | test accuracy |\n| --- | --- | --- | --- | --- |')
    with tempfile.TemporaryDirectory() as folder:
        for number, (form, kind, policy) in enumerate(ROWS + ONNX * arguments.onnx):
            path = pathlib.Path(folder) / f'{number}.{form}'
            export(arguments.run, path, form, kind, policy)
            share = accuracy(reader(path, form), parts.evaluation_batches())
            said = policy or 'as in the run'
            print(f'| {form} | {kind} | {said} | {path.stat().st_size:,} | {share:.2%} |', flush=True)


def main(argv: list[str]) -> None:
    """Measures; whatever is wrong is one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('run', type=pathlib.Path)
    parser.add_argument('--onnx', action='store_true', help='with jax2onnx and onnxruntime installed')
    arguments = parser.parse_args(argv)
    with one_line():
        measure(arguments)


if __name__ == '__main__':
    main(sys.argv[1:])
