"""The original's initial values, which differ from the usual ones of Flax."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hax_jax.config import ModelConfig


def normal(key: jax.Array, shape: tuple[int, ...], scale: float, dtype: jnp.dtype) -> jax.Array:
    """N(0, scale)."""
    return scale * jax.random.normal(key, shape, dtype)


def uniform(key: jax.Array, shape: tuple[int, ...], bound: float, dtype: jnp.dtype) -> jax.Array:
    """U(-bound, bound)."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def orthogonal(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """Columns (n, r) of length sqrt(n), each n of them orthogonal to each other."""
    n, r = shape
    blocks = jax.random.orthogonal(key, n, (-(-r // n),), dtype)
    return n**0.5 * jnp.concatenate([*blocks], axis=1)[:, :r]


def time_step_bias(key: jax.Array, size: int, config: ModelConfig, dtype: jnp.dtype) -> Float[Array, " size"]:
    """Biases whose softplus is log-uniform in [time_step_min, time_step_max], and at least the floor."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    exponent = jax.random.uniform(key, (size,), jnp.float32, low, high)
    step = jnp.maximum(jnp.exp(exponent), config.time_step_floor)
    # softplus(step + log(1 - exp(-step))) = step.
    return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)
