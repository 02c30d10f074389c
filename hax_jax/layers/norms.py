"""Root-mean-square norms."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hax_jax.layers.precision import Precision
from hax_jax.ops import gated_rms_norm
from hax_jax.ops.numerics import wide


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@jax.named_scope("norm")
def rms_norm(x: Float[Array, "*b d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """weight x / sqrt(mean(x^2) + eps) over the last axis; the result is at least float32.

    The backward pass keeps x and the scale, which has a pass of its own: nothing waits for that one, while
    the gradient would wait for a scale that it computed.
    """
    x, scale = _scaled(x, weight, eps)
    return x * scale * weight.astype(x.dtype)


def _scaled(x, weight, eps):
    """x, at least float32, and 1 / sqrt(mean(x^2) + eps)."""
    x = x.astype(wide(x.dtype, weight.dtype))
    return x, jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _rms_norm_forward(x, weight, eps):
    # Without the barrier the compiler finds that the result needs the same scale, and lets it wait for it.
    with jax.named_scope("norm"):
        scale = _scaled(jax.lax.optimization_barrier(x), weight, eps)[1]
    return rms_norm(x, weight, eps), (x, weight, scale)


@jax.named_scope("norm")
def _rms_norm_backward(eps, saved, d_y):
    inputs, weight, scale = saved
    x = inputs.astype(scale.dtype)
    d_scaled = d_y * weight.astype(x.dtype)
    # y does not change when x grows: what points along x is taken out.
    along = jnp.mean(d_scaled * x, axis=-1, keepdims=True)
    d_x = scale * (d_scaled - x * (scale * scale * along))
    d_weight = (d_y * x * scale).sum(axis=tuple(range(x.ndim - 1)))
    return d_x.astype(inputs.dtype), d_weight.astype(weight.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


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
