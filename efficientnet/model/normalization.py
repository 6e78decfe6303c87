"""Normalisation layers whose statistics are always fp32 and two-pass, whatever the compute dtype.

The reference system normalises within a sample, so that neither the local batch nor the number of
micro-batches changes the training. Its group norm differs from the usual one: channel c belongs to group
c mod groups ('strided'), and epsilon is 1e-3. Mean first and squared differences second cost a pass more
than E[x²] − E[x]², which cancels catastrophically in 16-bit networks. The normalisation itself is one
multiply-add an element, with the affine parameters folded into coefficients of shape [N, C].

Parameter names are a contract with the optimizers, which exempt them from weight decay and trust ratios:
'scale' and 'bias' are the affine pair, 'proxy_scale' and 'proxy_bias' the proxy distribution's.
"""

import dataclasses
import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import ndtri

from efficientnet.errors import ConfigError
from efficientnet.model.pixel_sums import pixel_sum, pixel_sums

Layout = Literal['strided', 'contiguous']
PROXY_QUANTILES = 200
PROXY_EPSILON = 0.03


def group_norm(x: Array, scale: Array, bias: Array | None, groups: int, layout: Layout, epsilon: float) -> Array:
    """Normalises every sample over its pixels and the channels of a group.

    y = (x − mean) / sqrt(var + epsilon) · scale + bias, with the biased variance.

    Args:
        x: [N, H, W, C].
        scale: [C] in fp32.
        bias: [C] in fp32, None for 0.
        groups: number of groups, a divisor of C.
        layout: 'strided' puts channel c into group c mod groups, 'contiguous' into c // (C / groups).
        epsilon: added to the variance.

    Returns:
        [N, H, W, C] in fp32.

    Source: Wu and He, Group Normalization (arXiv 1803.08494).
    """
    x = x.astype(jnp.float32)
    mean, variance = _moments(x, GroupPool(groups, layout))
    return _normalize(x, mean, variance, scale, bias, epsilon)


@dataclasses.dataclass(frozen=True)
class GroupPool:
    """Averages [N, C] over the channels of a group, each sample by itself."""

    groups: int
    layout: Layout

    def __call__(self, values: Array) -> Array:
        """Returns [N, C], equal within a group."""
        per_group = values.shape[1] // self.groups
        strided = self.layout == 'strided'
        shape, axis = ((-1, per_group, self.groups), 1) if strided else ((-1, self.groups, per_group), 2)
        mean = values.reshape(shape).mean(axis, keepdims=True)
        return jnp.broadcast_to(mean, (mean.shape[0], *shape[1:])).reshape(values.shape)


@dataclasses.dataclass(frozen=True)
class BatchPool:
    """Averages [N, C] over the samples, and over those of all devices of a mapped axis if there is one."""

    axis: str | None

    def __call__(self, values: Array) -> Array:
        """Returns [1, C]."""
        mean = values.mean(0, keepdims=True)
        return mean if self.axis is None else jax.lax.pmean(mean, self.axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def norm_swish(
    x: Array, scale: Array, bias: Array, pool: GroupPool | BatchPool, epsilon: float, swish: bool
) -> tuple[Array, Array, Array]:
    """Group or batch norm, and swish after it or not, as one function with a gradient of its own.

    Between forward and backward it keeps x as it came and vectors of one number a channel, where autodiff would keep
    several fp32 arrays of the size of x.

    Args:
        x: [N, H, W, C].
        scale: [C] in fp32.
        bias: [C] in fp32.
        pool: what shares its statistics: it averages [N, C], each sample's mean over its pixels.
        epsilon: added to the variance.
        swish: whether to apply it.

    Returns:
        [N, H, W, C] in the dtype of x, rounded once; and the mean and biased variance, [N or 1, C] in fp32, to be
        looked at: no gradient flows through these two.
    """
    return _norm_swish_forward(x, scale, bias, pool, epsilon, swish)[0]


def _norm_swish_forward(
    x: Array, scale: Array, bias: Array, pool: GroupPool | BatchPool, epsilon: float, swish: bool
) -> tuple[tuple[Array, Array, Array], tuple]:
    x32 = x.astype(jnp.float32)
    mean, variance = _moments(x32, pool)
    r = jax.lax.rsqrt(variance + epsilon)
    factor, shift = _vectors(r * scale[None], bias[None] - mean * r * scale[None])
    z = x32 * factor[:, None, None, :] + shift[:, None, None, :]
    y = (nn.swish(z) if swish else z).astype(x.dtype)
    return (y, mean, variance), (x, mean, r, factor, shift, scale)


def _norm_swish_backward(
    pool: GroupPool | BatchPool, epsilon: float, swish: bool, kept: tuple, cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Pulls dy back to x, scale and bias.

    With u = (x − mean) · r, z = scale · u + bias, dz = dy · swish'(z), and means ⟨·⟩ over what shares statistics:

    dx = r · (scale · dz − ⟨scale · dz⟩ − u · ⟨scale · dz · u⟩), dscale = Σ dz · u, dbias = Σ dz.
    """
    x, mean, r, factor, shift, scale = kept
    pixels = x.shape[1] * x.shape[2]
    # Where dy is not yet there, x is not to be had either: what is computed from it, such as the sigmoid, would
    # otherwise be taken from the forward, and kept in between, as large as x.
    x, _ = jax.lax.optimization_barrier((x, cotangents[0][:1, :1, :1, :1]))
    x32, dy = x.astype(jnp.float32), cotangents[0].astype(jnp.float32)
    dz = _pull_swish(x32, dy, factor, shift) if swish else dy
    backend = jax.default_backend()
    if backend == 'cpu':
        dz = jax.lax.optimization_barrier(dz)  # or each of the three loops that read it would compute it anew
    sum_dz, sum_dz_u = pixel_sums(dz, dz * (x32 - mean[:, None, None, :]))
    sum_dz_u = sum_dz_u * r
    common = pool(scale[None] * sum_dz / pixels)
    slope = pool(scale[None] * sum_dz_u / pixels)
    # The same as above, ordered as one multiply-add for dz and one for x. As factor and shift are new ones, XLA does
    # not take what is computed from them for what it has computed before.
    of_x, rest, factor, shift = _vectors(-r * r * slope, r * (r * slope * mean - common), factor, shift)
    if swish and backend == 'gpu':
        dz = _pull_swish(x32, dy, factor, shift)  # again: it costs less than writing and reading it in fp32
    dx = dz * factor[:, None, None, :] + x32 * of_x[:, None, None, :] + rest[:, None, None, :]
    return dx.astype(x.dtype), sum_dz_u.sum(0), sum_dz.sum(0)


def _pull_swish(x: Array, dy: Array, factor: Array, shift: Array) -> Array:
    """dy · swish'(z) of z = factor · x + shift; x and dy [N, H, W, C], the others [N or 1, C], all fp32."""
    z = x * factor[:, None, None, :] + shift[:, None, None, :]
    gate = nn.sigmoid(z)
    return dy * gate * (1 + z * (1 - gate))


norm_swish.defvjp(_norm_swish_forward, _norm_swish_backward)


def _moments(x: Array, pool: GroupPool | BatchPool) -> tuple[Array, Array]:
    """Mean and biased variance of x [N, H, W, C] in fp32; [N or 1, C], equal where statistics are shared."""
    pixels = x.shape[1] * x.shape[2]
    (mean,) = _vectors(pool(pixel_sum(x) / pixels))
    return mean, pool(pixel_sum(jnp.square(x - mean[:, None, None, :])) / pixels)


def _vectors(*values: Array) -> tuple[Array, ...]:
    """Has values of one number a channel computed before the loop over pixels that uses them.

    XLA would fuse them into it: on a CPU the broadcast over a group's channels then kept the loop from being
    vectorised, and group norm with swish, there and back, took 16.7 ms instead of 3.3 (fp32, 8x64x64x64, one core).
    """
    return jax.lax.optimization_barrier(values)


def proxy_moments(scale: Array, bias: Array, proxy_scale: Array, proxy_bias: Array) -> tuple[Array, Array]:
    """Mean and variance of a channel's activation if its pre-activation were the proxy variable.

    mean, var of swish(scale · Y + bias) over Y ~ N(proxy_bias, (1 + proxy_scale)²), taken over 200 fixed
    quantiles of the Gaussian, so that nothing is random and gradients flow to all four parameters.

    Args:
        scale: [C] in fp32, as the other three.
        bias: [C].
        proxy_scale: [C].
        proxy_bias: [C].

    Returns:
        mean [C] and variance [C] in fp32.

    Source: Labatie et al., Proxy-Normalizing Activations to Match Batch Normalization (arXiv 2106.03743).
    """
    quantiles = ndtri((jnp.arange(PROXY_QUANTILES, dtype=jnp.float32) + 0.5) / PROXY_QUANTILES)[:, None]
    proxy = (1 + proxy_scale)[None] * quantiles + proxy_bias[None]
    activated = nn.swish(scale[None] * proxy + bias[None])
    return activated.mean(0), activated.var(0)


class GroupNorm(nn.Module):
    """Group normalisation with fp32 statistics, and swish if wanted; input and output share a dtype.

    Attributes:
        groups: number of groups; must divide the channels.
        layout: 'strided' (reference) or 'contiguous'.
        epsilon: added to the variance.
        use_bias: False leaves out the shift.
        swish: True applies swish after it.
    """

    groups: int = 4
    layout: Layout = 'strided'
    epsilon: float = 1e-3
    use_bias: bool = True
    swish: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises x [N, H, W, C]."""
        channels = x.shape[3]
        _check_groups(channels, self.groups, self.layout, '/'.join(self.path))
        scale = self.param('scale', nn.initializers.ones, (channels,), jnp.float32).astype(jnp.float32)
        bias = jnp.zeros(channels, jnp.float32)
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, (channels,), jnp.float32).astype(jnp.float32)
        return norm_swish(x, scale, bias, GroupPool(self.groups, self.layout), self.epsilon, self.swish)[0]


class BatchNorm(nn.Module):
    """Batch normalisation, and swish if wanted, that leaves the moving average to the training code.

    In training it normalises with the statistics of this micro-batch and, where the collection
    'batch_stats' is mutable, WRITES THEM RAW: 'mean' and biased 'var', in fp32. They are not averaged with
    what was there: one weight update sees many micro-batches, possibly recomputed, so the moving average is
    formed once an update from the mean of their statistics. In evaluation it uses what is stored.

    Attributes:
        epsilon: added to the variance.
        axis: mapped axis whose devices take one statistic over all their micro-batches; None = each its own.
        swish: True applies swish after it.
    """

    epsilon: float = 1e-3
    axis: str | None = None
    swish: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Normalises x [N, H, W, C] per channel; input and output share a dtype."""
        channels = x.shape[3]
        scale = self.param('scale', nn.initializers.ones, (channels,), jnp.float32).astype(jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, (channels,), jnp.float32).astype(jnp.float32)
        stored_mean = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), jnp.float32)
        stored_variance = self.variable('batch_stats', 'var', jnp.ones, (channels,), jnp.float32)

        if not train:
            mean, variance = (stored.value.astype(jnp.float32)[None] for stored in (stored_mean, stored_variance))
            y = _normalize(x.astype(jnp.float32), mean, variance, scale, bias, self.epsilon)
            return (nn.swish(y) if self.swish else y).astype(x.dtype)
        y, mean, variance = norm_swish(x, scale, bias, BatchPool(self.axis), self.epsilon, self.swish)
        if self.is_mutable_collection('batch_stats') and not self.is_initializing():
            stored_mean.value, stored_variance.value = mean[0], variance[0]
        return y


class Shift(nn.Module):
    """What is left of a batch norm whose factor has been multiplied into the kernel before it: x + bias.

    Attributes:
        swish: True applies swish after it.
    """

    swish: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Shifts x [N, H, W, C] by a parameter [C]; input and output share a dtype."""
        bias = self.param('bias', nn.initializers.zeros, (x.shape[3],), jnp.float32).astype(jnp.float32)
        y = x.astype(jnp.float32) + bias[None, None, None, :]
        return (nn.swish(y) if self.swish else y).astype(x.dtype)


class ProxyNormSwish(nn.Module):
    """Layer norm, affine, swish, and the normalisation of the activation by its proxy's moments.

    y = (swish(scale · LN(x) + bias) − m) / sqrt(v + 0.03), with m, v from `proxy_moments`. It restores the
    channel-wise normalisation that layer norm lacks, without any dependence between samples. The division
    is left to the caller, who may fold it into a later factor or leave it out.

    Attributes:
        epsilon: added to the variance of layer norm.
    """

    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Activates x.

        Args:
            x: [N, H, W, C].

        Returns:
            The numerator of y [N, H, W, C] in the dtype of x, the factor 1 / sqrt(v + 0.03) [C] in fp32.
        """
        channels = (x.shape[3],)
        scale = self.param('scale', nn.initializers.ones, channels, jnp.float32).astype(jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, channels, jnp.float32).astype(jnp.float32)
        proxy_scale = self.param('proxy_scale', nn.initializers.zeros, channels, jnp.float32).astype(jnp.float32)
        proxy_bias = self.param('proxy_bias', nn.initializers.zeros, channels, jnp.float32).astype(jnp.float32)
        mean, variance = proxy_moments(scale, bias, proxy_scale, proxy_bias)
        activated = nn.swish(group_norm(x, scale, bias, 1, 'strided', self.epsilon))
        numerator = (activated - mean[None, None, None, :]).astype(x.dtype)
        return numerator, jax.lax.rsqrt(variance + PROXY_EPSILON)


def _normalize(x: Array, mean: Array, variance: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
    """The affine normalisation as one multiply-add; mean and variance [N or 1, C], everything fp32."""
    factor = jax.lax.rsqrt(variance + epsilon) * scale[None]
    shift = -mean * factor
    if bias is not None:
        shift = shift + bias[None]
    factor, shift = _vectors(factor, shift)
    return x * factor[:, None, None, :] + shift[:, None, None, :]


def _check_groups(channels: int, groups: int, layout: str, where: str) -> None:
    if groups < 1 or channels % groups:
        raise ConfigError(f'norm_groups={groups} must divide the {channels} channels of {where}')
    if layout not in ('strided', 'contiguous'):
        raise ConfigError(f'norm_layout={layout!r} must be strided or contiguous')
