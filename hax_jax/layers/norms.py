"""Root-mean-square norms."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hax_jax.layers.precision import Precision
from hax_jax.ops.numerics import wide


@jax.named_scope("norm")
def rms_norm(x: Float[Array, "*b d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """weight x / sqrt(mean(x^2) + eps) over the last axis; the result is at least float32."""
    dtype = wide(x.dtype, weight.dtype)
    x = x.astype(dtype)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight.astype(dtype)


@jax.named_scope("norm")
def gated_rms_norm(
    x: Float[Array, "*b d"], gate: Float[Array, "*b d"], weight: Float[Array, " d"], eps: float
) -> Float[Array, "*b d"]:
    """`rms_norm` of x SiLU(gate): the gate comes first (Mamba-2, arXiv 2405.21060, section 7)."""
    dtype = wide(x.dtype, gate.dtype, weight.dtype)
    return rms_norm(x.astype(dtype) * jax.nn.silu(gate.astype(dtype)), weight, eps)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned weight that starts at 1."""

    def __init__(self, size: int, *, eps: float, precision: Precision):
        self.weight = nnx.Param(jnp.ones(size, precision.param))
        self.eps = eps
        self.precision = precision

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return rms_norm(x, self.weight[...], self.eps).astype(self.precision.activation)


class GatedRMSNorm(RMSNorm):
    """`gated_rms_norm` with a learned weight that starts at 1."""

    def __call__(self, x: Float[Array, "*b d"], gate: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return gated_rms_norm(x, gate, self.weight[...], self.eps).astype(self.precision.activation)
