"""Mixup and cutmix of a micro-batch on the device: what is drawn, and what that does to images and to labels.

Drawing is apart from mixing because the first pipeline stage mixes images and the last one weighs labels, on
different devices. Both draw the same from the samples' keys and masks, so nothing has to be handed over.

Mixup comes first, with the image one place before in the micro-batch as partner; then cutmix with the mixed image
two places before, so that among three or more nobody is mixed and cut with the same one. Who meets whom depends on
the size of a micro-batch and on nothing else about the layout. A blank image, one whose mask is 0, is nobody's
partner: the image that would have met it stays as it is.

Sources: Zhang et al., mixup (arXiv 1710.09412); Yun et al., CutMix (arXiv 1905.04899).
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betaincinv

from efficientnet.errors import ConfigError
from efficientnet.numerics.random_keys import layer_keys

DECAY = 4.0  # of the density of a cutmix box's area, in units of 1 / (area of the image); the reference's
CELLS = 4096  # of the table that mixup coefficients are drawn from


@dataclasses.dataclass(frozen=True)
class Mixing:
    """What is mixed, and how much.

    Attributes:
        mixup_alpha: α of the Beta(α, α) that mixup coefficients come from; 0 turns mixup off. The reference has 0.1
            for B0 to B2 and 0.2 from B3 on.
        cutmix_probability: Of a micro-batch to be cut and pasted; 0 turns cutmix off. The reference writes it as
            'cutmix_lambda' L, version 1, where it is 1.96 − 1.55 L: 0.6425 for B4's L = 0.85.

    Raises:
        ConfigError: α is negative or not finite, or the probability not in [0, 1].
    """

    mixup_alpha: float = 0.0
    cutmix_probability: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.mixup_alpha < math.inf:
            raise ConfigError(f'augment.mixup_alpha={self.mixup_alpha} must be 0 (off) or above, such as 0.2')
        if not 0 <= self.cutmix_probability <= 1:
            raise ConfigError(f'augment.cutmix_probability={self.cutmix_probability} is not in [0, 1]')


class Coefficients(NamedTuple):
    """What was drawn for one micro-batch of N images of H × W pixels."""

    mixup: jax.Array | None  # [N] fp32: λ, an image's own share, in [1/2, 1]; None when off
    box: tuple[jax.Array, jax.Array] | None  # rows [N, H] and columns [N, W] that are pasted over, bool; None when off


def draw(mixing: Mixing, keys: jax.Array, mask: jax.Array, size: tuple[int, int]) -> Coefficients:
    """Draws how one micro-batch is mixed.

    - Mixup, from each sample's own key: λ = max(b, 1 − b), b ~ Beta(α, α).
    - Cutmix, from the first sample's key: with `cutmix_probability` one box for the whole micro-batch, shaped as
      the image. Its area a, as a share of the image, has the density 4 exp(−4a) / (1 − exp(−4)) on [0, 1], the
      reference's λ = 1 − a = 1 + ln(u) / 4 with u ~ U(exp(−4), 1). Its centre is uniform over the image, then moved
      until the box lies inside; its edges are rounded to pixels.

    Args:
        mixing: What is mixed.
        keys: [N] typed keys, one a sample.
        mask: [N] fp32, 0 for images that are blank.
        size: H, W of the images in pixels.
    """
    mixup = box = None
    if mixing.mixup_alpha:
        uniform = jax.vmap(jax.random.uniform)(layer_keys(keys, 'mixup'))
        mixup = jnp.where(_mixup_partner(mask) > 0, _mixup_quantile(mixing.mixup_alpha, uniform), 1.0)
    if mixing.cutmix_probability:
        occurs, area, y, x = jax.random.uniform(layer_keys(keys[:1], 'cutmix')[0], (4,))
        side = jnp.sqrt(-jnp.log1p(-area * (1 - math.exp(-DECAY))) / DECAY)
        pasted = (occurs < mixing.cutmix_probability) & (_cutmix_partner(mask) > 0)[:, None]
        box = pasted & _covered(size[0], y, side)[None], pasted & _covered(size[1], x, side)[None]
    return Coefficients(mixup, box)


def mix_images(images: jax.Array, coefficients: Coefficients) -> jax.Array:
    """Mixes each image x of a micro-batch with its partners; with everything off, returns `images` itself.

    λ x + (1 − λ) x' in fp32, rounded once; then, inside the box, its partner's result of that.

    Args:
        images: [N, H, W, 3], normalised, in the compute dtype.
        coefficients: As drawn for this micro-batch.

    Returns:
        An array of the shape and dtype of `images`.
    """
    if coefficients.mixup is not None:
        share = 1.0 - coefficients.mixup[:, None, None, None]
        own = images.astype(jnp.float32)
        # In this form an image with λ = 1, or without another to meet, stays exactly as it was.
        images = (own + share * (_mixup_partner(own) - own)).astype(images.dtype)
    if coefficients.box is not None:
        rows, columns = coefficients.box
        inside = rows[:, :, None, None] & columns[:, None, :, None]
        images = jnp.where(inside, _cutmix_partner(images), images)
    return images


def mix_labels(labels: jax.Array, coefficients: Coefficients) -> tuple[jax.Array, jax.Array]:
    """Tells whose labels the mixed images have, and how much of each.

    With the mixup coefficients λ of an image and λ' of its cutmix partner, and the share a of pixels in the box,
    the weights are λ (1 − a), (1 − λ)(1 − a), λ' a, (1 − λ') a.

    Args:
        labels: [N] int32.
        coefficients: As drawn for this micro-batch.

    Returns:
        Labels [N, K] int32 and weights [N, K] fp32 whose rows sum to 1. The image's own label comes first. K is
        doubled by mixup and again by cutmix: 1, 2 or 4. A label can appear twice in a row.
    """
    labels, weights = labels[:, None], jnp.ones((len(labels), 1), jnp.float32)
    for share, partner in ((_mixed_in(coefficients), _mixup_partner), (_pasted(coefficients), _cutmix_partner)):
        if share is not None:
            labels = jnp.concatenate([labels, partner(labels)], 1)
            weights = jnp.concatenate([(1.0 - share) * weights, share * partner(weights)], 1)
    return labels, weights


def _mixup_partner(rows: jax.Array) -> jax.Array:
    return jnp.roll(rows, 1, 0)


def _cutmix_partner(rows: jax.Array) -> jax.Array:
    return jnp.roll(rows, 2 if len(rows) > 2 else 1, 0)


def _mixed_in(coefficients: Coefficients) -> jax.Array | None:
    """The mixup partner's share of each image, [N, 1]."""
    return None if coefficients.mixup is None else 1.0 - coefficients.mixup[:, None]


def _pasted(coefficients: Coefficients) -> jax.Array | None:
    """The cutmix partner's share of each image's pixels, [N, 1]."""
    if coefficients.box is None:
        return None
    rows, columns = coefficients.box
    area = rows.sum(1, keepdims=True) * columns.sum(1, keepdims=True)
    return area.astype(jnp.float32) / (rows.shape[1] * columns.shape[1])


def _mixup_quantile(alpha: float, uniform: jax.Array) -> jax.Array:
    """Maps uniform numbers to max(b, 1 − b), b ~ Beta(α, α), by linear interpolation in a table of the quantiles.

    `jax.random.beta` would put 19 loops of rejection sampling into the program, and seconds into its compilation.
    For α from 0.01 to 1 the result is within 1e-5 of the quantile, 2e-7 from 0.1 to 0.4. Above 1, the largest one in
    4096 is spread evenly up to 1 and the others are within 1e-3. The mean is within 1e-4 for any α.
    """
    table = jnp.asarray(betaincinv(alpha, alpha, 0.5 + 0.5 * np.arange(CELLS + 1) / CELLS), jnp.float32)
    place = uniform * CELLS
    cell = place.astype(jnp.int32)
    return table[cell] + (place - cell.astype(jnp.float32)) * (table[cell + 1] - table[cell])


def _covered(length: int, centre: jax.Array, side: jax.Array) -> jax.Array:
    """Which of `length` pixels lie within the box along one edge, [length] bool.

    Args:
        length: Pixels.
        centre: [] fp32, of the box before it is moved inside, as a share of `length`.
        side: [] fp32, of the box, likewise.
    """
    half = side * (length / 2)
    centre = jnp.clip(centre * length, half, length - half)
    pixel = jnp.arange(length, dtype=jnp.float32)
    return (pixel >= jnp.round(centre - half)) & (pixel < jnp.round(centre + half))
