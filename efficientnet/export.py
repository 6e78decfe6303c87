"""Takes a trained model out: as timm's tensors, or as a program that runs without this code.

  python -m efficientnet.export runs/digits digits.safetensors --format=safetensors
  python -m efficientnet.export runs/digits digits.stablehlo --format=stablehlo --weights=averaged
  python -m efficientnet.export runs/digits digits.onnx --format=onnx --policy=32.32

Programs take uint8 images [N, S, S, 3] and give probabilities, fp32 [N, classes]: the scaling of pixels is inside, and
batch norm is folded into the kernels. A safetensors file has the names and shapes of timm's EfficientNet and, bit for
bit, the weights of the run. Every file carries a model card: config, data set, accuracy, versions.
"""

import importlib.metadata
import json
import logging as builtin_logging
import os
import pathlib
import platform
from typing import Any

import flax
import jax
import numpy as np
from absl import app, flags, logging

from efficientnet.errors import ConfigError, leave, one_line
from efficientnet.numerics.precision import POLICIES
from efficientnet.numerics.precision import policy as policy_of
from efficientnet.predict import make_probabilities
from efficientnet.weights import naming
from efficientnet.weights.class_names import readable
from efficientnet.weights.trained import CARD, COLUMNS, Trained, read_run

Tree = Any
FORMATS = ('safetensors', 'stablehlo', 'onnx')
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
VERSIONED = ('jax', 'jaxlib', 'flax', 'numpy')


def export(
    workdir: pathlib.Path, dest: pathlib.Path, form: str, kind: str = 'raw', policy: str = ''
) -> list[pathlib.Path]:
    """Exports the newest weights of a run.

    Args:
        workdir: Of the run.
        dest: File to write; must not exist.
        form: Of `FORMATS`.
        kind: 'raw', 'averaged' or 'update_average'.
        policy: Of `precision.POLICIES`: weights are stored in its master format and programs compute in its compute
            format; '' = the weights as they are, computed in the run's policy.

    Returns:
        The files written.

    Raises:
        ConfigError: There is no such run or weights, something exists already or cannot be written.
    """
    if not dest.name:
        raise ConfigError(f'{dest} is a folder; give the name of a file')
    if form == 'safetensors' and dest.suffix != '.safetensors':
        raise ConfigError(f'{dest} must end in .safetensors, by which such a file is known')
    card_file = dest.with_name(dest.name + '.json')
    files = [dest, card_file] if form == 'stablehlo' else [dest]
    for path in files:
        if os.path.exists(path):  # pathlib's raises for names that are too long
            raise ConfigError(f'{path} exists; give a name that does not')
    trained = in_policy(read_run(workdir, kind, field='RUN'), policy)
    card = model_card(trained)
    content = {'safetensors': to_safetensors, 'stablehlo': to_stablehlo, 'onnx': to_onnx}[form](trained, card)
    contents = [content, json.dumps(card, indent=2, ensure_ascii=False).encode()]
    drafts = [path.with_name(f'.{path.name}.{os.getpid()}') for path in files]
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        for draft, data in zip(drafts, contents, strict=False):
            draft.write_bytes(data)
        for draft, path in zip(drafts, files, strict=True):
            os.replace(draft, path)
    except OSError as error:
        no_folder = isinstance(error, FileExistsError | NotADirectoryError)
        reason = f'{error.filename} is no folder' if no_folder else error.strerror
        raise ConfigError(f'{dest} cannot be written: {reason}') from error
    finally:
        for draft in drafts:
            if os.path.exists(draft):
                draft.unlink()
    return files


def in_policy(trained: Trained, name: str) -> Trained:
    """Returns the model with its weights in the master format of a policy, and a config of that policy.

    Raises:
        ConfigError: There is no such policy, or a weight is too large for it.
    """
    if not name:
        return trained
    master = policy_of(name).master
    with np.errstate(over='ignore'):  # found below
        params = jax.tree.map(lambda leaf: leaf.astype(master), trained.variables['params'])
    if not all(np.isfinite(leaf.astype(np.float32)).all() for leaf in jax.tree.leaves(params)):
        raise ConfigError(f'--policy={name}: some weights are too large for {master}; take another policy')
    config = trained.config.copy_and_resolve_references()
    config.precision.policy = name
    return trained._replace(config=config, variables=trained.variables | {'params': params})


def model_card(trained: Trained) -> dict[str, Any]:
    """Returns what every exported file says about itself, as JSON has it.

    Returns:
        'config' (all fields), 'dataset' (name, classes as in the data, their names, shape of images in memory),
        'weights' (kind), 'step', 'accuracy' (of these weights as last evaluated in training; empty if they were not),
        'parameters', 'input' and 'output' of a program, and 'versions'.
    """
    size = trained.config.image_size
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    card = {
        'config': trained.config.to_dict(),
        'dataset': {
            'name': trained.config.dataset,
            'classes': trained.dataset.classes,
            'names': readable(trained.dataset.classes),
            'image_shape': trained.dataset.image_shape,
        },
        'weights': trained.kind,
        'step': trained.step,
        'accuracy': trained.evaluation,
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(trained.variables['params'])),
        'input': f'uint8 [N, {size}, {size}, 3], RGB',
        'output': f'float32 [N, {len(trained.dataset.classes)}], probabilities',
        'versions': {'python': platform.python_version(), **versions},
    }
    return json.loads(json.dumps(card))


def to_safetensors(trained: Trained, card: dict[str, Any]) -> bytes:
    """Returns a safetensors file with timm's names; arrays keep their formats."""
    from safetensors.numpy import save

    arrays = naming.to_theirs(trained.variables, 'timm')
    for name in [name for name in arrays if name.endswith('running_mean')]:
        arrays[name.replace('running_mean', 'num_batches_tracked')] = np.array(trained.step, np.int64)
    return save(arrays, {'format': 'pt', CARD: json.dumps(card)})


def fold_batch_norm(trained: Trained) -> tuple[Trained, dict[str, Any]]:
    """Multiplies the factors of batch norms into the kernels before them and leaves their shifts.

    kernel ← kernel · scale / sqrt(var + epsilon), bias ← bias − mean · scale / sqrt(var + epsilon), in fp32, stored
    in the format of the kernel.

    Returns:
        The model and the attributes that its network needs, {'norm': 'folded'}; both as they were without batch norm.
    """
    if trained.config.model.norm != 'batch':
        return trained, {}
    params = flax.traverse_util.flatten_dict(trained.variables['params'])
    stats = flax.traverse_util.flatten_dict(trained.variables['batch_stats'])
    folded = dict(params)
    for block, norm, _ in [path for path in stats if path[2] == 'mean']:
        layer = {'norm': 'conv'}.get(norm, norm.removesuffix('_norm'))
        scale, bias = (params[block, norm, name].astype(np.float32) for name in ('scale', 'bias'))
        factor = scale / np.sqrt(stats[block, norm, 'var'] + trained.config.model.norm_epsilon)
        kernel = params[block, layer, 'kernel']
        folded[block, layer, 'kernel'] = (kernel.astype(np.float32) * factor).astype(kernel.dtype)
        folded[block, norm, 'bias'] = bias - stats[block, norm, 'mean'] * factor
        del folded[block, norm, 'scale']
    return trained._replace(variables={'params': flax.traverse_util.unflatten_dict(folded)}), {'norm': 'folded'}


def program(trained: Trained, **options: Any) -> Any:
    """Returns the function from uint8 images to probabilities with the weights inside, batch norm folded."""
    folded, attributes = fold_batch_norm(trained)
    probabilities = make_probabilities(trained, **attributes, **options)

    def run(images: jax.Array) -> jax.Array:
        return probabilities(folded.variables, images)

    return run


def to_stablehlo(trained: Trained, card: dict[str, Any]) -> bytes:
    """Returns a serialised `jax.export` of the program for any number of images on any of `PLATFORMS`."""
    del card  # lies beside it
    size = trained.config.image_size
    shape = jax.export.symbolic_shape(f'batch, {size}, {size}, 3')
    # The one formulation of grouped convolutions that every platform has an own kernel for.
    exported = jax.export.export(jax.jit(program(trained, conv_method='native')), platforms=PLATFORMS)(
        jax.ShapeDtypeStruct(shape, np.uint8)
    )
    return exported.serialize()


def to_onnx(trained: Trained, card: dict[str, Any]) -> bytes:
    """Returns an ONNX model of the program for any number of images, the card in its metadata."""
    # The first tells with a traceback of every example it has whose packages are missing, the second of constants.
    for chatter in ('jax2onnx', 'onnx_ir'):
        builtin_logging.getLogger(chatter).setLevel(builtin_logging.ERROR)
    try:
        import jax2onnx
    except ImportError as error:
        raise ConfigError(
            f'--format=onnx needs jax2onnx ({error}); install it: '
            '.venv/bin/pip install --no-deps -r requirements-onnx.txt'
        ) from error
    size = trained.config.image_size
    model = jax2onnx.to_onnx(
        program(trained, conv_method='native'), [jax.ShapeDtypeStruct(('batch', size, size, 3), np.uint8)]
    )
    entry = model.metadata_props.add()
    entry.key, entry.value = CARD, json.dumps(card)
    return model.SerializeToString()


def main() -> None:
    """Exports; whatever is wrong is one line."""
    form = flags.DEFINE_enum('format', 'safetensors', FORMATS, "timm's tensors, or a program.")
    kind = flags.DEFINE_enum('weights', 'raw', tuple(COLUMNS), 'Which of the run.')
    names = ('', *POLICIES)
    policy = flags.DEFINE_enum('policy', '', names, "Formats of weights and of computing; '' = as the run has them.")

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as error:
            leave(error)
        if len(rest) != 3:
            leave('give RUN and DEST, such as: python -m efficientnet.export runs/digits digits.safetensors')
        return rest

    def run(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        workdir, dest = (pathlib.Path(argument).expanduser() for argument in argv[1:])
        with one_line():
            for path in export(workdir, dest, form.value, kind.value, policy.value):
                print(f'{path}: {path.stat().st_size:,} bytes')

    app.run(run, flags_parser=parse)


if __name__ == '__main__':
    main()
