"""What is stored and computed as what: the one table of number formats, for all files to go by.

A policy's name is the reference system's "compute.master":

| name    | activations, their gradients | master weights | optimizer state | averages |
| ------- | ---------------------------- | -------------- | --------------- | -------- |
| 32.32   | fp32                         | fp32           | fp32            | fp32     |
| bf16.32 | bf16                         | fp32           | fp32            | fp32     |
| 16.32   | fp16                         | fp32           | fp32            | fp32     |
| 16.16   | fp16                         | fp16           | fp16            | fp32     |
| bf16.16 | bf16                         | bf16           | bf16            | fp32     |

Under every policy these are fp32, because sixteen bits lose them without a sound: normalisation statistics, scales
and shifts, squeeze-and-excite, the classifier, softmax and loss, gradient accumulators and their reduction over
replicas, the norms of the LARS trust ratio, the optimizer's arithmetic (its state is 16-bit only where it is stored)
and the learning rate. Of weights only the convolutions' kernels are cast to the compute format.

A GPU multiplies fp32 matrices in TF32, with 10 bits behind the point, a TPU in bfloat16, unless JAX is told otherwise
(JAX_DEFAULT_MATMUL_PRECISION=highest, which is slower): the convolutions of 32.32 are as exact as that. The small
matrix products of squeeze-and-excite and the classifier are told otherwise.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from efficientnet.errors import ConfigError

FP32, FP16, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Policy:
    """The formats of one run.

    Attributes:
        name: "compute.master", a key of `POLICIES`.
        compute: Format of activations, of the kernels cast for them, and of the gradients flowing back.
        master: Format in which the weights live between updates.
        state: Format in which optimizer state (momentum, mean square) lives between updates.
        average: Format of weight averages; a 16-bit average would forget what it adds.
    """

    name: str
    compute: np.dtype
    master: np.dtype
    state: np.dtype
    average: np.dtype = FP32

    @property
    def rounds(self) -> bool:
        """Whether what an update computes is rounded to be stored."""
        return FP32 not in (self.master, self.state)


POLICIES = {
    chosen.name: chosen
    for chosen in (
        Policy('32.32', compute=FP32, master=FP32, state=FP32),
        Policy('bf16.32', compute=BF16, master=FP32, state=FP32),
        Policy('16.32', compute=FP16, master=FP32, state=FP32),
        Policy('16.16', compute=FP16, master=FP16, state=FP16),
        Policy('bf16.16', compute=BF16, master=BF16, state=BF16),
    )
}


def policy(name: str) -> Policy:
    """Returns the policy called `name`.

    Raises:
        ConfigError: There is none; the message lists those there are.
    """
    if name not in POLICIES:
        raise ConfigError(f'precision.policy={name!r} is not a policy; choose one of {", ".join(POLICIES)}')
    return POLICIES[name]
