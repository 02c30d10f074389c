"""The original's initial values, which differ from the usual ones of Flax."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def normal(key: jax.Array, shape: tuple[int, ...], scale: float, dtype: jnp.dtype) -> jax.Array:
    """N(0, scale)."""
    return scale * jax.random.normal(key, shape, dtype)


def uniform(key: jax.Array, shape: tuple[int, ...], bound: float, dtype: jnp.dtype) -> jax.Array:
    """U(-bound, bound)."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def time_step_bias(
    key: jax.Array, size: int, low: float, high: float, floor: float, dtype: jnp.dtype
) -> Float[Array, " size"]:
    """Biases whose softplus is log-uniform in [low, high], and at least `floor`."""
    exponent = jax.random.uniform(key, (size,), jnp.float32, math.log(low), math.log(high))
    step = jnp.maximum(jnp.exp(exponent), floor)
    # softplus(step + log(1 - exp(-step))) = step.
    return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)
