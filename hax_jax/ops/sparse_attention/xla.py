"""Attention a tile of queries at a time, on any device, in linear memory.

Each tile evaluates the key set's rule on (block_q, t) and is computed again in the backward pass, so the
only arrays that outlive a tile are as long as the sequence. Work grows as t^2: what XLA gets for dense
tiles it loses on gathers, at the lengths this form is for.
"""

import jax
import jax.numpy as jnp
from jax import lax

from hax_jax.ops import segments
from hax_jax.ops.numerics import einsum, pad_time

BLOCK_Q = 128


def sparse_attention(q, k, v, key_set, segment_ids, scale, uniform_empty_rows):
    batch, length, heads, _ = q.shape
    block_q = min(BLOCK_Q, length)
    ids = segments.as_array(segment_ids, (batch, length))
    columns = jnp.arange(length, dtype=jnp.int32)

    @jax.checkpoint
    def tile(inputs):
        q_tile, rows = inputs
        # The last tile may reach past the end: such rows repeat the last one and are cut off below.
        rows = jnp.minimum(rows, length - 1)
        mask = (key_set.tile(rows, columns) & (ids[:, rows][:, :, None] == ids[:, None, :]))[:, None]
        scores = scale * einsum("bthn,bshn->bhts", q_tile, k)
        seen = mask.any(-1, keepdims=True)
        if uniform_empty_rows:
            # As in the reference: equal weights, and a gradient as if nothing were hidden.
            scores = jnp.where(seen, scores, scores - lax.stop_gradient(scores))
            mask, seen = mask | ~seen, True
        scores = jnp.where(mask, scores, -jnp.inf)
        highest = lax.stop_gradient(jnp.where(seen, scores.max(-1, keepdims=True), 0))
        weights = jnp.exp(scores - highest)
        total = jnp.where(seen, weights.sum(-1, keepdims=True), 1)
        return einsum("bhts,bshe->bthe", weights.astype(v.dtype), v) / jnp.moveaxis(total, 1, 2)

    tiles = pad_time(q, block_q).reshape(batch, -1, block_q, *q.shape[2:])
    rows = jnp.arange(tiles.shape[1] * block_q, dtype=jnp.int32).reshape(-1, block_q)
    out = lax.map(tile, (jnp.moveaxis(tiles, 1, 0), rows))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, v.shape[-1])[:, :length]
