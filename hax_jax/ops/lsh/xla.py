"""Orders and counts by one sort of keys and queries together.

Sorted by (segment, code, position, key before query), everything that shares a bucket is one run in order
of time. The number of keys before an entry in its run is the key's order, and the query's count.
"""

import jax.numpy as jnp
from jax import lax

from hax_jax.ops import segments
from hax_jax.ops.sorting import stable_order


def merge_buckets(query_code, key_code, segment_ids):
    """Sorts keys and queries together by (segment, code, time).

    Returns (b, 2 t) arrays: times in that order, where 2 i is the key and 2 i + 1 the query of position i,
    and whether an entry is the first of its bucket.
    """
    code = _interleave(key_code, query_code)
    if segment_ids is None:
        time = stable_order(code)
        begins = _changes(jnp.take_along_axis(code, time, axis=1))
    else:
        # Numbers in order of time: where rows are one list, ids of different rows must not meet.
        segment = _interleave(*2 * (segments.numbers(segment_ids),))
        time = stable_order(segment, code)
        begins = _changes(*(jnp.take_along_axis(x, time, axis=1) for x in (code, segment)))
    return time, begins


def bucket_orders(query_code, key_code, segment_ids):
    batch, length = query_code.shape
    time, begins = merge_buckets(query_code, key_code, segment_ids)
    is_key = (time % 2 == 0).astype(jnp.int32)
    keys_before = jnp.cumsum(is_key, axis=1) - is_key
    # keys_before never falls, so its running maximum over run starts is its value at the last start.
    in_run = keys_before - lax.cummax(jnp.where(begins, keys_before, 0), axis=1)
    row = jnp.arange(batch)[:, None]
    by_time = jnp.zeros_like(time).at[row, time].set(in_run, unique_indices=True, mode="promise_in_bounds")
    by_position = by_time.reshape(batch, length, 2)
    return by_position[..., 1], by_position[..., 0]


def _interleave(keys, queries):
    """(b, 2 t): the key, then the query of each position."""
    return jnp.stack([keys, queries], axis=2).reshape(keys.shape[0], -1)


def _changes(*sorted_arrays):
    """Whether an entry of any array differs from the one before it."""
    changed = sum((x[:, 1:] != x[:, :-1]).astype(jnp.int32) for x in sorted_arrays) > 0
    return jnp.pad(changed, ((0, 0), (1, 0)), constant_values=True)
