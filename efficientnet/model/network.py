"""EfficientNet as named blocks that can run whole or as a slice, a pipeline stage, of the same network.

The variables of a slice are exactly the sub-trees of the whole network under the same names, with the same
initial values for the same key, so that weights move between layouts without any renaming. Dropout and
stochastic depth draw from one key a sample: what a sample sees does not depend on its place in a batch.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from efficientnet.errors import ConfigError
from efficientnet.model.convolution import Padding, check_method, grouped_conv
from efficientnet.model.normalization import BatchNorm, GroupNorm, Layout, ProxyNormSwish, Shift
from efficientnet.model.pixel_sums import pixel_sum
from efficientnet.model.scaling import BlockSpec, ModelSpec, block_names
from efficientnet.numerics.random_keys import layer_keys

SHARED = (
    'norm',
    'norm_groups',
    'norm_group_size',
    'norm_layout',
    'norm_axis',
    'epsilon',
    'padding',
    'conv_method',
    'dtype',
    'frozen_norms',
)
NORMS = ('group', 'batch', 'layer_proxy')
DENSE_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'truncated_normal')
# On a GPU or TPU fp32 matrices would else be multiplied in fewer bits.
FP32_DENSE = {'dtype': jnp.float32, 'param_dtype': jnp.float32, 'precision': jax.lax.Precision.HIGHEST}
GROUPED_INIT = nn.initializers.variance_scaling(2.0, 'fan_in', 'truncated_normal')


class Conv(nn.Module):
    """Convolution without bias whose kernel [k, k, C/groups, features] is cast to the dtype of its input."""

    features: int
    size: int = 1
    stride: int = 1
    groups: int = 1
    padding: Padding = 'same'
    method: str = 'auto'
    kernel_init: nn.initializers.Initializer = DENSE_INIT

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolves x [N, H, W, C]."""
        shape = (self.size, self.size, x.shape[3] // self.groups, self.features)
        kernel = self.param('kernel', self.kernel_init, shape, jnp.float32).astype(x.dtype)
        return grouped_conv(x, kernel, stride=self.stride, groups=self.groups, padding=self.padding, method=self.method)


class Layers(nn.Module):
    """What stem, blocks and head have in common: the choice of normalisation, padding and dtype.

    Attributes:
        activation: 'swish' or 'relu6', as the spec has it.
        norm: 'group', 'batch', 'layer_proxy' (layer norm and proxy norm), or 'folded', a shift that is left of 'batch'
            once its factor is part of the kernel before it.
        norm_groups: groups of 'group'.
        norm_group_size: channels a group of 'group'; 0 = as norm_groups says.
        norm_layout: 'strided' or 'contiguous' groups of 'group'.
        norm_axis: of 'batch', mapped axis over which statistics are taken together; None = each device its own.
        epsilon: added to the variance.
        padding: 'same' (TensorFlow) or 'symmetric' (PyTorch).
        conv_method: formulation of the blocks' spatial convolution, a key of `convolution.METHODS` or 'auto'; 'onednn'
            is the stem's as well.
        dtype: compute dtype of activations. Statistics, pools, gates and the classifier are fp32.
        frozen_norms: of 'batch', names such as 'block1a/expand_norm': they work as in evaluation in training too.
    """

    activation: str = 'swish'
    norm: Literal['group', 'batch', 'layer_proxy', 'folded'] = 'group'
    norm_groups: int = 4
    norm_group_size: int = 0
    norm_layout: Layout = 'strided'
    norm_axis: str | None = None
    epsilon: float = 1e-3
    padding: Padding = 'same'
    conv_method: str = 'auto'
    dtype: Any = jnp.float32
    frozen_norms: frozenset[str] = frozenset()

    def normalize(self, name: str, x: Array, train: bool, activate: bool = False) -> Array:
        """Group or batch norm, and the activation if wanted."""
        swish = activate and self.activation == 'swish'
        if self.norm == 'group':
            groups = self._norm_groups(name, x.shape[3])
            x = GroupNorm(groups, self.norm_layout, self.epsilon, swish=swish, name=name)(x)
        elif self.norm == 'batch':
            train = train and f'{self.name}/{name}' not in self.frozen_norms
            x = BatchNorm(self.epsilon, self.norm_axis, swish, name=name)(x, train=train)
        else:
            x = Shift(swish, name=name)(x)
        return self.activate(x) if activate and not swish else x

    def _norm_groups(self, name: str, channels: int) -> int:
        size = self.norm_group_size
        if size and (size < 0 or channels % size):
            raise ConfigError(f'norm_group_size={size} must divide the {channels} channels of {self.name}/{name}')
        return channels // size if size else self.norm_groups

    def activate(self, x: Array) -> Array:
        """Swish or ReLU6."""
        return nn.swish(x) if self.activation == 'swish' else nn.relu6(x)

    def normalize_swish(self, name: str, x: Array, train: bool) -> Array:
        """Norm and activation."""
        x, factor = self.normalize_swish_deferred(name, x, train)
        return x if factor is None else gated(x, _for_each_sample(factor, x))

    def normalize_swish_deferred(self, name: str, x: Array, train: bool) -> tuple[Array, Array | None]:
        """As above without proxy norm's division; returns the factor [C] that is still due, or None."""
        if self.norm == 'layer_proxy':
            return ProxyNormSwish(self.epsilon, name=name)(x)
        return self.normalize(name, x, train, activate=True), None


class Stem(Layers, kw_only=True):
    """3x3 convolution, norm, activation."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool, sample_keys: Array | None) -> Array:
        """Maps images [N, H, W, 3] to [N, H', W', features]."""
        method = 'onednn' if self.conv_method == 'onednn' else 'auto'
        x = Conv(self.features, 3, self.stride, padding=self.padding, method=method, name='conv')(x)
        return self.normalize_swish('norm', x, train)


class MBConv(Layers, kw_only=True):
    """Inverted residual: expand, spatial convolution, squeeze-and-excite, project, stochastic depth."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x: Array, *, train: bool, sample_keys: Array | None) -> Array:
        """Maps [N, H, W, in_channels] to [N, H', W', out_channels]."""
        spec, inputs = self.spec, x
        if spec.mid_channels != spec.in_channels:
            x = Conv(spec.mid_channels, name='expand')(x)
            x = self.normalize_swish('expand_norm', x, train)
        x = Conv(
            spec.mid_channels,
            spec.kernel,
            spec.stride,
            spec.groups,
            self.padding,
            self.conv_method,
            GROUPED_INIT,
            name='spatial',
        )(x)
        x, factor = self.normalize_swish_deferred('spatial_norm', x, train)
        gate = self._gate(x) if spec.se_channels else None
        if factor is not None:
            # Proxy norm's division of every element becomes a division of the gate; the gate itself looks
            # at the undivided activation, as in the reference.
            gate = _for_each_sample(factor, x) * (1 if gate is None else gate)
        # What is gated is cheaper to multiply again than to keep.
        project = nn.remat(_project) if train and gate is not None else _project
        x = project(Conv(spec.out_channels, name='project'), x, gate)
        if self.norm == 'layer_proxy':
            # No activation follows, hence no proxy norm; without a shift the channels cannot drift apart.
            x = GroupNorm(1, epsilon=self.epsilon, use_bias=False, name='project_norm')(x)
        else:
            x = self.normalize('project_norm', x, train)
        if not spec.residual:
            return x
        if train and spec.survival < 1:
            x = stochastic_depth(x, spec.survival, layer_keys(sample_keys, spec.name))
        return x + inputs

    def _gate(self, x: Array) -> Array:
        """Squeeze-and-excite: sigmoid(W2 act(W1 mean(x) + b1) + b2), [N, C] in fp32."""
        options = FP32_DENSE | {'kernel_init': DENSE_INIT}
        pooled = pixel_sum(x) / (x.shape[1] * x.shape[2])
        hidden = self.activate(nn.Dense(self.spec.se_channels, name='se_reduce', **options)(pooled))
        gate = nn.sigmoid(nn.Dense(self.spec.mid_channels, name='se_expand', **options)(hidden))
        return jax.lax.optimization_barrier(gate)  # or it would be computed anew in every pixel


class Head(Layers, kw_only=True):
    """1x1 convolution, norm, activation, global average pool, dropout, classifier."""

    features: int
    classes: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool, sample_keys: Array | None) -> Array:
        """Maps [N, H, W, C] to logits [N, classes] in fp32."""
        x = Conv(self.features, name='conv')(x)
        # Proxy norm's division is dropped here: it would only rescale what the classifier weighs anyway.
        x, _ = self.normalize_swish_deferred('norm', x, train)
        x = pixel_sum(x) / (x.shape[1] * x.shape[2])
        if train and self.dropout > 0:
            x = sample_dropout(x, self.dropout, layer_keys(sample_keys, 'head'))
        options = FP32_DENSE | {'kernel_init': nn.initializers.glorot_uniform()}
        return nn.Dense(self.classes, name='classifier', **options)(x)


class EfficientNet(Layers, kw_only=True):
    """The network, or the consecutive blocks of it named in `blocks`; see `Layers` for the other attributes.

    Attributes:
        spec: the network as data.
        blocks: names of the consecutive blocks this module runs; None runs all.
        recompute: whether the backward keeps the blocks' inputs only and computes what is inside them again.

    Source: Tan and Le, EfficientNet (arXiv 1905.11946); Chen et al., Training Deep Nets with Sublinear Memory
    Cost (arXiv 1604.06174).
    """

    spec: ModelSpec
    blocks: tuple[str, ...] | None = None
    recompute: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, sample_keys: Array | None = None) -> Array:
        """Runs the blocks in order.

        Args:
            x: normalised images [N, H, W, 3] if the first block is 'stem', otherwise the activation that
                enters the first block, [N, *boundary_shape].
            train: whether batch norm uses this batch and dropout and stochastic depth are active.
            sample_keys: typed keys [N]; needed in training where something random happens. Layer l of
                sample n draws from fold_in(sample_keys[n], crc32(l)).

        Returns:
            Logits [N, classes] in fp32 if the last block is 'head', otherwise an activation in `dtype`.

        Raises:
            ConfigError: an unknown norm, conv_method or block name.
            ValueError: sample_keys are missing or not one a sample.
        """
        names = self._names()
        random = self._random_blocks(names)
        if train and random and (sample_keys is None or sample_keys.shape != x.shape[:1]):
            raise ValueError(f'training {random} needs sample_keys of shape {x.shape[:1]}, one typed key a sample')
        x = x.astype(self.dtype)
        run = functools.partial(_run_block, train=train)
        for name in names:
            x = (nn.remat(run) if self.recompute and train else run)(self._block(name), x, sample_keys)
        return x

    def _names(self) -> tuple[str, ...]:
        known = block_names(self.spec)
        names = known if self.blocks is None else tuple(self.blocks)
        start = known.index(names[0]) if names and names[0] in known else 0
        if not names or known[start : start + len(names)] != names:
            raise ConfigError(f'blocks={names} must be consecutive names of {known}')
        if self.norm not in (*NORMS, 'folded'):
            raise ConfigError(f'norm={self.norm!r} must be one of {", ".join(NORMS)}')
        if self.norm == 'layer_proxy' and self.spec.activation != 'swish':
            raise ConfigError(
                f'norm=layer_proxy needs activation=swish, its proxy is of that, got {self.spec.activation}'
            )
        check_method(self.conv_method)
        return names

    def _random_blocks(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the blocks that draw random numbers in training."""
        random = [block.name for block in self.spec.blocks if block.residual and block.survival < 1]
        if self.spec.dropout > 0:
            random.append('head')
        return tuple(name for name in random if name in names)

    def _block(self, name: str) -> nn.Module:
        spec = self.spec
        common = {field: getattr(self, field) for field in SHARED} | {'activation': spec.activation}
        if name == 'stem':
            return Stem(features=spec.stem_channels, stride=spec.stem_stride, name=name, **common)
        if name == 'head':
            options = {'features': spec.head_channels, 'classes': spec.classes, 'dropout': spec.dropout}
            return Head(name=name, **options, **common)
        (block,) = (block for block in spec.blocks if block.name == name)
        return MBConv(spec=block, name=name, **common)


def _project(conv: nn.Module, x: Array, gate: Array | None) -> Array:
    return conv(x if gate is None else gated(x, gate))


@jax.custom_vjp
def gated(x: Array, gate: Array) -> Array:
    """Multiplies x [N, H, W, C] by a gate [N, C] in fp32, and rounds to the dtype of x.

    The gate's gradient is a sum over pixels, which autodiff would form in the dtype of x.
    """
    return (x.astype(jnp.float32) * gate[:, None, None, :]).astype(x.dtype)


def _gated_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, gate = kept
    return gated(dy, gate), pixel_sum(dy.astype(jnp.float32) * x.astype(jnp.float32))


gated.defvjp(lambda x, gate: (gated(x, gate), (x, gate)), _gated_backward)


def _for_each_sample(factor: Array, x: Array) -> Array:
    """Repeats a factor [C] for every sample of x [N, H, W, C]: a gate [N, C]."""
    return jnp.broadcast_to(factor, (x.shape[0], x.shape[3]))


def _run_block(block: nn.Module, x: Array, sample_keys: Array | None, train: bool) -> Array:
    return block(x, train=train, sample_keys=sample_keys)


def stochastic_depth(x: Array, survival: float, keys: Array) -> Array:
    """Keeps each sample of x [N, H, W, C] with probability `survival`, scaled by its inverse, else zeroes it.

    Source: Huang et al., Deep Networks with Stochastic Depth (arXiv 1603.09382).
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, survival))(keys)
    factor = jnp.where(keep, jnp.float32(1 / survival), 0.0)  # in bf16 up to 0.3 % more or less on average
    return (x.astype(jnp.float32) * factor[:, None, None, None]).astype(x.dtype)


def sample_dropout(x: Array, rate: float, keys: Array) -> Array:
    """Zeroes each element of x [N, C] with probability `rate`, scales the others by 1 / (1 - rate)."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return x * jnp.where(keep, 1 / (1 - rate), 0.0).astype(x.dtype)
