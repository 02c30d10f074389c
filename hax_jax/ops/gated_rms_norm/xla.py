"""The formula as XLA fuses it best."""

import jax
import jax.numpy as jnp

from hax_jax.ops.numerics import wide


def gated_rms_norm(x, gate, weight, eps):
    dtype = wide(x.dtype, gate.dtype, weight.dtype)
    u = x.astype(dtype) * jax.nn.silu(gate.astype(dtype))
    return u * jax.lax.rsqrt(jnp.mean(u * u, axis=-1, keepdims=True) + eps) * weight.astype(dtype)
