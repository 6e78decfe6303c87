"""Imports timm where torchvision's compiled operators do not load.

timm wants torchvision for its image transforms alone. PyPI has torchvision for CUDA builds of PyTorch only (on Linux),
whose operators a CPU build cannot load; torchvision then fails on import, when it describes the output of two
operators that nothing has declared.
"""

import functools
import importlib.util
import pathlib
from types import ModuleType

from efficientnet.errors import RunError

UNDECLARED = ('nms', 'qnms')


@functools.cache  # nothing can be declared twice
def import_timm() -> ModuleType:
    """Imports timm; declares, but does not define, what torchvision's operators would have declared.

    Raises:
        RunError: PyTorch, torchvision or timm are not installed.
    """
    for name in ('torch', 'torchvision', 'timm'):
        if importlib.util.find_spec(name) is None:
            raise RunError(f'{name} is not installed; `make bench-setup` installs it')
    import torch

    (folder,) = importlib.util.find_spec('torchvision').submodule_search_locations
    try:
        for library in pathlib.Path(folder).glob('_C.*'):
            torch.ops.load_library(library)
    except OSError:
        for name in UNDECLARED:
            signature = f'torchvision::{name}'
            torch.library.define(signature, '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    import timm

    return timm
