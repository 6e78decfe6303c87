"""Sizes and test accuracy of a run's exports, each measured on the file that was written, as a table.

python -m experiments.exports RUN [--onnx]
"""

import argparse
import itertools
import pathlib
import tempfile
from collections.abc import Callable

import jax
import jax.export
import numpy as np

import input_pipeline
from efficientnet.convert import convert
from efficientnet.export import export
from efficientnet.loop.settings import flatten, read_stored
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
    return lambda images: jax.jit(make_probabilities(trained))(trained.variables, images)


def main() -> None:
    """Exports, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('run', type=pathlib.Path)
    parser.add_argument('--onnx', action='store_true', help='with jax2onnx and onnxruntime installed')
    arguments = parser.parse_args()
    config = flatten(read_stored(arguments.run))
    source = input_pipeline.open_source(
        config['dataset'],
        config['input.test_split'],
        config['input.dir'] or None,
        train_split=config['input.train_split'],
    )
    batches = list(input_pipeline.evaluation_batches(source, image_size=config['image_size'], batch=120))
    print('| format | weights | policy | bytes | test accuracy |\n| --- | --- | --- | --- | --- |')
    with tempfile.TemporaryDirectory() as folder:
        for number, (form, kind, policy) in enumerate(ROWS + ONNX * arguments.onnx):
            path = pathlib.Path(folder) / f'{number}.{form}'
            export(arguments.run, path, form, kind, policy)
            run, hits, count = reader(path, form), 0, 0
            for batch in batches:
                counted = batch['mask'] > 0
                hits += ((np.asarray(run(batch['image'])).argmax(1) == batch['label']) & counted).sum()
                count += counted.sum()
            said = policy or 'as in the run'
            print(f'| {form} | {kind} | {said} | {path.stat().st_size:,} | {hits / count:.2%} |', flush=True)


if __name__ == '__main__':
    main()
