"""The formula."""

import jax.numpy as jnp

from hax_jax.ops.numerics import wide


def gated_rms_norm(x, gate, weight, eps):
    dtype = wide(x.dtype, gate.dtype, weight.dtype)
    x, gate, weight = (array.astype(dtype) for array in (x, gate, weight))
    u = x * gate / (1 + jnp.exp(-gate))
    return weight * u / jnp.sqrt((u * u).mean(axis=-1, keepdims=True) + eps)
