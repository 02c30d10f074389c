"""Attention with one t x t mask, in float32 at least: obvious, and quadratic in memory."""

import jax.numpy as jnp
from jax import lax

from hax_jax.ops import segments
from hax_jax.ops.numerics import einsum, wide


def sparse_attention(q, k, v, key_set, segment_ids, scale, uniform_empty_rows, out_dtype):
    dtype = wide(q.dtype, v.dtype)
    q, k, v = (array.astype(dtype) for array in (q, k, v))
    batch, length = q.shape[:2]
    position = jnp.arange(length)
    ids = segments.as_array(segment_ids, (batch, length))
    mask = key_set.tile(position, position) & (ids[:, :, None] == ids[:, None, :])
    scores = scale * einsum("bthn,bshn->bhts", q, k)
    seen = mask.any(-1)[:, None, :, None]
    if uniform_empty_rows:
        # The original adds a huge negative number to hidden scores. In a row of nothing else the scores
        # drown in it, so all weights are equal, yet the gradient is that of a softmax that hides nothing.
        scores = jnp.where(seen, scores, scores - lax.stop_gradient(scores))
        mask, seen = mask[:, None] | ~seen, jnp.ones_like(seen)
    else:
        mask = mask[:, None]
    scores = jnp.where(mask, scores, -jnp.inf)
    # A row of -inf would make NaN; its weights are zeros.
    weights = jnp.exp(scores - jnp.where(seen, scores.max(-1, keepdims=True), 0))
    weights = weights / jnp.where(seen, weights.sum(-1, keepdims=True), 1)
    return einsum("bhts,bshe->bthe", weights, v).astype(out_dtype)
