"""Reading other libraries' files of weights: names, arrays, and what the file says about itself. No code is run."""

import json
import pathlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from efficientnet.errors import ConfigError
from efficientnet.weights.naming import AVERAGE

# Where PyTorch training scripts put the weights and their average.
NESTED = {'raw': ('state_dict', 'model'), 'averaged': ('state_dict_ema', 'model_ema')}


class StateDict(NamedTuple):
    """Tensors as they are in a file.

    Attributes:
        arrays: By their names there.
        metadata: Of a safetensors file, else empty.
        kind: 'raw' or 'averaged'.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]
    kind: str


def read(source: pathlib.Path, kind: str = 'auto') -> StateDict:
    """Reads a .safetensors file, a PyTorch pickle (.pth, .pt, .bin), or a TensorFlow checkpoint (its prefix or folder).

    Args:
        source: The file.
        kind: 'raw', 'averaged', or 'auto' for the average where the file has one.

    Raises:
        ConfigError: It cannot be read, is damaged, would run code, or has no such weights.
    """
    if source.suffix == '.safetensors':
        found = _read_safetensors(source)
    elif source.suffix in ('.pth', '.pt', '.bin', '.tar'):
        found = _read_pickle(source, kind)
    elif source.is_dir() or source.with_name(source.name + '.index').is_file():
        found = _read_tensorflow(source, kind)
    elif not source.exists():
        raise ConfigError(f'{source}: there is no such file, folder or TensorFlow checkpoint')
    else:
        raise ConfigError(
            f'{source} is neither .safetensors, .pth, .pt, .bin nor the prefix of a TensorFlow checkpoint'
        )
    if kind not in ('auto', found.kind):
        raise ConfigError(f'{source} has no weights {kind!r}')
    return found


def _read_safetensors(source: pathlib.Path) -> StateDict:
    import ml_dtypes  # noqa: F401  # bfloat16 for numpy
    import safetensors

    try:
        with safetensors.safe_open(source, 'numpy') as file:
            names = file.keys()  # not a dictionary: it cannot be iterated over
            arrays = {name: _array(source, name, file.get_tensor, name) for name in names}
            return StateDict(arrays, file.metadata() or {}, 'raw')
    except OSError as error:
        raise ConfigError(f'{source} cannot be read: {error.strerror or error}') from error
    except safetensors.SafetensorError as error:
        raise ConfigError(f'{source} is damaged or incomplete: {error}') from error


def _read_pickle(source: pathlib.Path, kind: str) -> StateDict:
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f'reading {source} needs PyTorch, which is not installed: .venv/bin/pip install torch, or convert the '
            'file to .safetensors elsewhere'
        ) from error
    try:
        with warnings.catch_warnings(action='ignore'):  # of a pickle's age and make; what matters is raised
            found = torch.load(source, map_location='cpu', weights_only=True)
    except OSError as error:
        raise ConfigError(f'{source} cannot be read: {error.strerror or error}') from error
    except pickle.UnpicklingError as error:
        if 'Unsupported' not in str(error) and 'GLOBAL' not in str(error):
            raise ConfigError(f'{source} is damaged or no PyTorch file') from error
        raise ConfigError(f'{source} is refused: it holds more than tensors, and loading it could run code') from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:  # whatever half a file leads to
        raise ConfigError(f'{source} is damaged or incomplete: {str(error)[:200]}') from error
    return _nested(source, found, kind)


def _nested(source: pathlib.Path, found: Any, kind: str) -> StateDict:
    for own in ('averaged', 'raw'):
        for name in NESTED[own]:
            if kind in ('auto', own) and isinstance(found, dict) and isinstance(found.get(name), dict):
                return StateDict(_to_numpy(source, found[name]), {}, own)
    return StateDict(_to_numpy(source, found), {}, 'raw')


def _to_numpy(source: pathlib.Path, found: Any) -> dict[str, np.ndarray]:
    import ml_dtypes
    import torch

    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(leaf, torch.Tensor) for name, leaf in found.items()
    ):
        raise ConfigError(f'{source} holds no dictionary of tensors with names')

    def convert(leaf: torch.Tensor) -> np.ndarray:
        if leaf.dtype == torch.bfloat16:  # which numpy's own types lack
            return leaf.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return leaf.detach().contiguous().numpy()

    return {name: _array(source, name, convert, leaf) for name, leaf in found.items()}


def _array(source: pathlib.Path, name: str, read: Callable[[Any], np.ndarray], given: Any) -> np.ndarray:
    """Reads one tensor, which may be quantised, sparse or of another kind that numpy has no array for."""
    try:
        return read(given)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f'{source}: {name} is no plain tensor of floats: {str(error)[:100]}') from error


def _read_tensorflow(source: pathlib.Path, kind: str) -> StateDict:
    from input_pipeline.quiet_tf import tf

    try:
        reader = tf.train.load_checkpoint(str(source))
        arrays = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    except (ValueError, IndexError, RuntimeError, tf.errors.OpError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f'{source} is no whole TensorFlow checkpoint: {reason}') from error
    averaged = any(name.endswith(AVERAGE) for name in arrays) and kind != 'raw'
    return StateDict(arrays, {}, 'averaged' if averaged else 'raw')


def timm_config(source: pathlib.Path) -> dict[str, Any]:
    """Returns the config.json that a hub keeps beside a file of timm's, or {}."""
    path = source.parent / 'config.json'
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f'{path} cannot be read or is damaged ({error})') from error
    return found if isinstance(found, dict) and isinstance(found.get('architecture'), str) else {}
