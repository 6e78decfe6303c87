"""What EfficientNet's tensors are called in other libraries, as tables, and how their axes lie.

A scheme says for every layer of ours, named as in `network.py`, the path of theirs. {stage} and {index} are those of a
block, from 0, {number} counts all blocks from 0. Blocks without an expansion (the first stage) have other positions
in most schemes. TensorFlow's batch norms and convolutions are numbered in the order of their making.
"""

import dataclasses
import string
from collections.abc import Iterable, Mapping
from typing import Any

import flax
import numpy as np

from efficientnet.errors import ConfigError

Tree = Any

SCHEMES = ('timm', 'torchvision', 'efficientnet_pytorch', 'tensorflow')  # in the order of the columns below

ENDS = {
    'stem.conv': ('conv_stem', 'features.0.0', '_conv_stem', 'stem/conv2d'),
    'stem.norm': ('bn1', 'features.0.1', '_bn0', 'stem/tpu_batch_normalization'),
    'head.conv': ('conv_head', 'features.8.0', '_conv_head', 'head/conv2d'),
    'head.norm': ('bn2', 'features.8.1', '_bn1', 'head/tpu_batch_normalization'),
    'head.classifier': ('classifier', 'classifier.1', '_fc', 'head/dense'),
}
BLOCK = ('blocks.{stage}.{index}.', 'features.{stage1}.{index}.block.', '_blocks.{number}.', 'blocks_{number}/')
EXPANDED = {
    'expand': ('conv_pw', '0.0', '_expand_conv', 'conv2d'),
    'expand_norm': ('bn1', '0.1', '_bn0', 'tpu_batch_normalization'),
    'spatial': ('conv_dw', '1.0', '_depthwise_conv', 'depthwise_conv2d'),
    'spatial_norm': ('bn2', '1.1', '_bn1', 'tpu_batch_normalization_1'),
    'se_reduce': ('se.conv_reduce', '2.fc1', '_se_reduce', 'se/conv2d'),
    'se_expand': ('se.conv_expand', '2.fc2', '_se_expand', 'se/conv2d_1'),
    'project': ('conv_pwl', '3.0', '_project_conv', 'conv2d_1'),
    'project_norm': ('bn3', '3.1', '_bn2', 'tpu_batch_normalization_2'),
}
UNEXPANDED = {
    'spatial': ('conv_dw', '0.0', '_depthwise_conv', 'depthwise_conv2d'),
    'spatial_norm': ('bn1', '0.1', '_bn1', 'tpu_batch_normalization'),
    'se_reduce': ('se.conv_reduce', '1.fc1', '_se_reduce', 'se/conv2d'),
    'se_expand': ('se.conv_expand', '1.fc2', '_se_expand', 'se/conv2d_1'),
    'project': ('conv_pw', '2.0', '_project_conv', 'conv2d'),
    'project_norm': ('bn2', '2.1', '_bn2', 'tpu_batch_normalization_1'),
}

# The arrays of a layer: ours -> PyTorch's and TensorFlow's.
OF_NORM = {
    'scale': ('weight', 'gamma'),
    'bias': ('bias', 'beta'),
    'mean': ('running_mean', 'moving_mean'),
    'var': ('running_var', 'moving_variance'),
}
OF_OTHERS = {'kernel': ('weight', 'kernel'), 'bias': ('bias', 'bias')}
AVERAGE = '/ExponentialMovingAverage'  # TensorFlow's average of an array has the array's name and this

# Theirs that hold no weights: counters, and an optimizer's state.
PASSED_OVER = (
    '.num_batches_tracked', 'global_step', '/RMSProp', '/RMSProp_1', '/Momentum', '_CHECKPOINTABLE_OBJECT_GRAPH',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where an array of ours is in a scheme.

    Attributes:
        name: theirs.
        axes: order in which our axes are taken to get theirs.
        pad: axes of size 1 that theirs has at the end (PyTorch) or at the start (TensorFlow) and ours lacks.
    """

    name: str
    axes: tuple[int, ...]
    pad: str = ''  # 'end' or 'start'

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """Turns an array of ours into theirs."""
        shape = {'': (), 'end': (*array.shape[::-1], 1, 1), 'start': (1, 1, *array.shape)}[self.pad]
        turned = array.transpose(self.axes)
        return np.ascontiguousarray(turned.reshape(shape) if self.pad else turned)

    def ours(self, array: np.ndarray) -> np.ndarray:
        """Turns an array of theirs into ours."""
        if self.pad:
            array = array.reshape(array.shape[:2] if self.pad == 'end' else array.shape[2:])
        return np.ascontiguousarray(array.transpose(np.argsort(self.axes)))

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Turns a shape of ours into theirs."""
        return self.theirs(np.broadcast_to(np.zeros(()), shape)).shape if shape else ()


def detect(names: Iterable[str]) -> tuple[str, str]:
    """Returns the scheme of a set of tensors and the prefix that all of them have ('module.', 'efficientnet-b0/').

    Raises:
        ConfigError: They are not an EfficientNet's in any known scheme.
    """
    names = list(names)
    for column, scheme in enumerate(SCHEMES):
        stem = f'{ENDS["stem.conv"][column]}{"/kernel" if scheme == "tensorflow" else ".weight"}'
        for name in names:
            if name == stem or name.endswith(f'/{stem}') or name == f'module.{stem}':
                return scheme, name.removesuffix(stem)
    some = ', '.join(sorted(names)[:3]) or 'nothing'
    raise ConfigError(f'these are not the tensors of an EfficientNet as {", ".join(SCHEMES)} name them: {some}, …')


def entries(names: Iterable[str], scheme: str, prefix: str = '') -> dict[str, Entry]:
    """Looks up where arrays are in a scheme.

    Args:
        names: ours, dotted, all of a network: 'params.block1a.spatial.kernel', 'batch_stats.stem.norm.mean', …
        scheme: of `SCHEMES`.
        prefix: of their names.
    """
    names = list(names)
    column, tensorflow = SCHEMES.index(scheme), scheme == 'tensorflow'
    expanded = {name.split('.')[1] for name in names if '.expand.' in name}
    blocks = dict.fromkeys(name.split('.')[1] for name in names)
    order = {block: number for number, block in enumerate(sorted(set(blocks) - {'stem', 'head'}))}
    found = {}
    for name in names:
        _, block, layer, leaf = name.split('.')
        if block in order:
            stage, index = int(block[5]) - 1, string.ascii_lowercase.index(block[6])
            place = {'stage': stage, 'stage1': stage + 1, 'index': index, 'number': order[block]}
            path = BLOCK[column].format(**place) + (EXPANDED if block in expanded else UNEXPANDED)[layer][column]
        else:
            path = ENDS[f'{block}.{layer}'][column]
        theirs = (OF_NORM if layer.endswith('norm') else OF_OTHERS)[leaf][tensorflow]
        if tensorflow and layer == 'spatial':
            theirs = 'depthwise_kernel'
        path = f'{prefix}{path}{"/" if tensorflow else "."}{theirs}'
        found[name] = Entry(path, *_axes(layer, leaf, tensorflow))
    return found


def _axes(layer: str, leaf: str, tensorflow: bool) -> tuple[tuple[int, ...], str]:
    if leaf != 'kernel':
        return (0,), ''
    if layer in ('se_reduce', 'se_expand'):  # a matrix here, a 1x1 convolution there
        return ((0, 1), 'start') if tensorflow else ((1, 0), 'end')
    if layer == 'classifier':
        return ((0, 1) if tensorflow else (1, 0)), ''
    if tensorflow:
        return ((0, 1, 3, 2) if layer == 'spatial' else (0, 1, 2, 3)), ''
    return (3, 2, 0, 1), ''


def to_ours(
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    scheme: str,
    prefix: str = '',
    suffix: str = '',
) -> Tree:
    """Brings tensors of another library into our names and axes, each accounted for.

    Args:
        arrays: theirs by name.
        shapes: what the network needs, {'params.stem.conv.kernel': (3, 3, 3, 32), …}.
        scheme: of `SCHEMES`.
        prefix: of their names.
        suffix: of their names, such as `AVERAGE`.

    Returns:
        {'params': …, 'batch_stats': … under batch norm}.

    Raises:
        ConfigError: some are missing, unexpected or of another shape; names them.
    """
    places = entries(shapes, scheme, prefix)
    wanted = {place.name + suffix: place.their_shape(shapes[name]) for name, place in places.items()}
    given = {name: tuple(array.shape) for name, array in arrays.items() if not name.endswith(PASSED_OVER)}
    if scheme == 'tensorflow':  # it has the weights and their averages side by side
        given = {name: shape for name, shape in given.items() if name.endswith(AVERAGE) == bool(suffix)}
    wrong = {
        'missing': [f'{name} {shape}' for name, shape in wanted.items() if name not in given],
        'unexpected': [f'{name} {shape}' for name, shape in given.items() if name not in wanted],
        'of another shape': [
            f'{name} {given[name]}, not {shape}' for name, shape in wanted.items() if given.get(name, shape) != shape
        ],
    }
    complaints = [
        f'{len(items)} {kind}: {", ".join(items[:4])}{", …" if len(items) > 4 else ""}'
        for kind, items in wrong.items()
        if items
    ]
    if complaints:
        raise ConfigError('the tensors do not fit this architecture; ' + '; '.join(complaints))
    flat = {name: place.ours(arrays[place.name + suffix]) for name, place in places.items()}
    return flax.traverse_util.unflatten_dict(flat, sep='.')


def to_theirs(variables: Tree, scheme: str) -> dict[str, np.ndarray]:
    """Brings our variables into the names and axes of another library."""
    flat = flax.traverse_util.flatten_dict(variables, sep='.')
    return {place.name: place.theirs(np.asarray(flat[name])) for name, place in entries(flat, scheme).items()}
