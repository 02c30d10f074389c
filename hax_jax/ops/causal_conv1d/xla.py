"""The convolution as a sum of shifted copies, which XLA fuses into one pass."""

import jax
import jax.numpy as jnp

from hax_jax.ops.numerics import blocks, wide


def shift(x, steps):
    """Moves x (b, t, ...) `steps` positions later, zeros first."""
    if steps == 0:
        return x
    length = x.shape[1]
    padding = [(0, 0), (steps, 0)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding)[:, :length]


def causal_conv1d(x, weight, bias, segment_ids, mask, sizes):
    width, x_dtype = weight.shape[0], x.dtype
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
    x, weight = x.astype(wide(x.dtype, weight.dtype)), weight.astype(wide(x.dtype, weight.dtype))
    y = jnp.zeros_like(x)
    for tap in range(width):
        steps = width - 1 - tap
        term = shift(x, steps) * weight[tap]
        if segment_ids is not None and steps:
            # Before the row both the ids and x are zeros: an id of 0 may match there, but it adds nothing.
            term = jnp.where((shift(segment_ids, steps) == segment_ids)[..., None], term, 0)
        y = y + term
    y = y if bias is None else y + bias.astype(y.dtype)
    y = jax.nn.silu(y).astype(x_dtype)
    if mask is not None:
        y = jnp.where(mask[..., None], y, 0)
    return tuple(blocks(y, sizes))
