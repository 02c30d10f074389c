"""Lifetimes from all pairs of positions."""

import jax.numpy as jnp

from hax_jax.ops import segments


def key_lifetimes(scores, num_keys, segment_ids):
    length = scores.shape[1]
    ids = segments.as_array(segment_ids, scores.shape)
    position = jnp.arange(length)
    # better[b, i, j]: key i beats key j.
    higher = scores[:, :, None] > scores[:, None, :]
    earlier = (scores[:, :, None] == scores[:, None, :]) & (position[:, None] < position[None, :])
    better = (higher | earlier) & (ids[:, :, None] == ids[:, None, :])
    # The first prefix that holds num_keys better keys no longer shows key j.
    crowded = jnp.cumsum(better, axis=1) >= num_keys
    expiry = jnp.where(crowded.any(1), jnp.argmax(crowded, axis=1), length)
    # When a key that is never visible would have gone says nothing that anybody asks for.
    return jnp.maximum(expiry, position).astype(jnp.int32)
