"""Orders and counts by one sort of keys and queries together.

Sorted by (segment, code, position, key before query), everything that shares a bucket is one run in order
of time. The number of keys before an entry in its run is the key's order, and the query's count.
"""

import jax.numpy as jnp
from jax import lax

from hax_jax.ops import segments


def bucket_orders(query_code, key_code, segment_ids):
    batch, length = query_code.shape
    ids = segments.as_array(segment_ids, query_code.shape)
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    # Even times are keys, odd ones queries: a query comes right after the key of its own position.
    time = jnp.concatenate([2 * position, 2 * position + 1], axis=1)
    code = jnp.concatenate([key_code, query_code], axis=1)
    segment = jnp.concatenate([ids, ids], axis=1)
    segment, code, time = lax.sort((segment, code, time), dimension=1, num_keys=3)

    is_key = (time % 2 == 0).astype(jnp.int32)
    keys_before = jnp.cumsum(is_key, axis=1) - is_key
    new_run = (segment[:, 1:] != segment[:, :-1]) | (code[:, 1:] != code[:, :-1])
    new_run = jnp.pad(new_run, ((0, 0), (1, 0)), constant_values=True)
    # keys_before never falls, so its running maximum over run starts is its value at the last start.
    in_run = keys_before - lax.cummax(jnp.where(new_run, keys_before, 0), axis=1)

    # Sorting back by time leaves key, query, key, query, ...
    _, in_run = lax.sort((time, in_run), dimension=1, num_keys=1)
    by_position = in_run.reshape(batch, length, 2)
    return by_position[..., 1], by_position[..., 0]
