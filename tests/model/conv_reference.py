"""A grouped convolution by definition, to compare formulations with."""

import jax
import numpy as np


def reference(x, kernel, dy, stride, groups, padding):
    """Value and both gradients by definition, one output pixel at a time, in float64; dy None takes y."""
    taps, _, inputs, outputs = kernel.shape
    pads = []
    for size in x.shape[1:3]:
        total = max((-(-size // stride) - 1) * stride + taps - size, 0)
        same = (total // 2, total - total // 2)
        pads.append(same if padding == 'same' else (taps // 2, taps // 2))
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    height = (padded.shape[1] - taps) // stride + 1
    width = (padded.shape[2] - taps) // stride + 1
    y = np.zeros((len(x), height, width, outputs))
    dpadded, dkernel = np.zeros_like(padded), np.zeros_like(kernel)
    per_group = outputs // groups
    for h in range(height):
        for w in range(width):
            for g in range(groups):
                window = np.s_[:, h * stride : h * stride + taps, w * stride : w * stride + taps]
                window += (slice(g * inputs, (g + 1) * inputs),)
                out = slice(g * per_group, (g + 1) * per_group)
                y[:, h, w, out] = np.einsum('nijc,ijco->no', padded[window], kernel[..., out])
                d = y[:, h, w, out] if dy is None else dy[:, h, w, out]
                dkernel[..., out] += np.einsum('nijc,no->ijco', padded[window], d)
                dpadded[window] += np.einsum('ijco,no->nijc', kernel[..., out], d)
    rows, columns = (slice(p[0], p[0] + size) for p, size in zip(pads, x.shape[1:3], strict=True))
    return y, dpadded[:, rows, columns], dkernel


def value_and_gradients(conv, x, kernel, dy):
    y, pull = jax.vjp(conv, x, kernel)
    return y, *pull(dy)
