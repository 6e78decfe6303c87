"""Scikit-learn's 1,797 scans of handwritten digits: real data in a package, for runs without any download."""

import numpy as np

from input_pipeline.errors import DataError
from input_pipeline.sources import ArraySource

_TEST_EXAMPLES = 360
_SPLITS = ('train', 'test')


def open_digits(split: str, field: str) -> ArraySource:
    """The digits, 8 × 8 pixels, with a held-out fifth that is the same in every run.

    Args:
        split: 'train' (1,437 scans) or 'test' (360, every class in its proportion).
        field: the config field that named the split.

    Returns:
        The source; 17 levels of grey spread over 0 … 255, in three equal channels.

    Raises:
        DataError: if there is no such split.
    """
    if split not in _SPLITS:
        raise DataError(f'{field} = {split!r} must be one of {", ".join(_SPLITS)} for dataset digits')
    from sklearn import datasets  # here: a second to import, for one of the sources

    digits = datasets.load_digits()
    held_out = _held_out(digits.target)
    chosen = held_out if split == 'test' else ~held_out
    grey = np.round(digits.images[chosen] * 255 / 16).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    return ArraySource(f'digits {split}', tuple('0123456789'), images, digits.target[chosen].astype(np.int32))


def _held_out(labels: np.ndarray) -> np.ndarray:
    """Bool [N]: a stratified choice of 360, by largest remainders, drawn with Philox under a fixed key."""
    counts = np.bincount(labels)
    shares = counts * _TEST_EXAMPLES / len(labels)
    quota = shares.astype(int)
    quota[np.argsort(quota - shares, kind='stable')[: _TEST_EXAMPLES - quota.sum()]] += 1
    draw = np.argsort(np.random.Philox(key=0).random_raw(len(labels)), kind='stable')
    held_out = np.zeros(len(labels), bool)
    for digit, number in enumerate(quota):
        held_out[draw[labels[draw] == digit][:number]] = True
    return held_out
