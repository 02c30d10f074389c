"""Root-mean-square norms."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hax_jax.layers.precision import Precision
from hax_jax.ops import gated_rms_norm
from hax_jax.ops.numerics import wide


@jax.named_scope("norm")
def rms_norm(x: Float[Array, "*b d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """weight x / sqrt(mean(x^2) + eps) over the last axis; the result is at least float32."""
    dtype = wide(x.dtype, weight.dtype)
    x = x.astype(dtype)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight.astype(dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned weight that starts at 1."""

    def __init__(self, size: int, *, eps: float, precision: Precision):
        self.weight = nnx.Param(jnp.ones(size, precision.param))
        self.eps = eps
        self.precision = precision

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return rms_norm(x, self.weight[...], self.eps).astype(self.precision.activation)


class GatedRMSNorm(RMSNorm):
    """`ops.gated_rms_norm` with a learned weight that starts at 1."""

    def __init__(self, size: int, *, eps: float, precision: Precision, implementation: str | None = None):
        super().__init__(size, eps=eps, precision=precision)
        self.implementation = implementation

    def __call__(self, x: Float[Array, "*b d"], gate: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = gated_rms_norm(x, gate, self.weight[...], self.eps, implementation=self.implementation)
        return y.astype(self.precision.activation)
