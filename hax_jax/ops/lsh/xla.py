"""Orders and counts by one sort of keys and queries together.

Sorted by (segment, code, position, key before query), everything that shares a bucket is one run in order
of time. The number of keys before an entry in its run is the key's order, and the query's count.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hax_jax.ops import segments
from hax_jax.ops.sorting import stable_order


class Merged(NamedTuple):
    """Keys and queries sorted together by (segment, code, time).

    The time of position i's key is 2 i, of its query 2 i + 1. An entry's place is where it stands in that
    order.

    Attributes:
      time: (b, 2 t) by place.
      place: (b, 2 t) by time.
      begins: (b, 2 t) bool by place, whether an entry is the first of its bucket.
      keys_before: (b, 2 t) by place, the number of keys before.
    """

    time: jax.Array
    place: jax.Array
    begins: jax.Array
    keys_before: jax.Array


def merge_buckets(query_code, key_code, segment_ids, num_codes=None) -> Merged:
    code = _interleave(key_code, query_code)
    if num_codes is not None:
        # A radix sort takes a pass for each byte.
        code = code.astype(
            next(x for x in (jnp.uint8, jnp.uint16, jnp.uint32) if num_codes - 1 <= jnp.iinfo(x).max)
        )
    if segment_ids is None:
        time = stable_order(code)
        begins = _changes(jnp.take_along_axis(code, time, axis=1))
    else:
        # Numbers in order of time: where rows are one list, ids of different rows must not meet.
        segment = _interleave(*2 * (segments.numbers(segment_ids),))
        time = stable_order(segment, code)
        begins = _changes(*(jnp.take_along_axis(x, time, axis=1) for x in (code, segment)))
    row = jnp.arange(time.shape[0])[:, None]
    index = jnp.broadcast_to(jnp.arange(time.shape[1], dtype=jnp.int32), time.shape)
    place = jnp.zeros_like(time).at[row, time].set(index, unique_indices=True, mode="promise_in_bounds")
    is_key = (time % 2 == 0).astype(jnp.int32)
    return Merged(time, place, begins, jnp.cumsum(is_key, axis=1) - is_key)


def bucket_orders(query_code, key_code, segment_ids, num_codes=None):
    merged = merge_buckets(query_code, key_code, segment_ids, num_codes)
    index = jnp.arange(merged.time.shape[1], dtype=jnp.int32)
    first = lax.cummax(jnp.where(merged.begins, index, 0), axis=1)

    def of_keys_before(places):
        return jnp.take_along_axis(merged.keys_before, places, axis=1)

    by_time = of_keys_before(merged.place) - of_keys_before(jnp.take_along_axis(first, merged.place, axis=1))
    by_position = by_time.reshape(*query_code.shape, 2)
    return by_position[..., 1], by_position[..., 0]


def _interleave(keys, queries):
    """(b, 2 t): the key, then the query of each position."""
    return jnp.stack([keys, queries], axis=2).reshape(keys.shape[0], -1)


def _changes(*sorted_arrays):
    """Whether an entry of any array differs from the one before it."""
    changed = sum((x[:, 1:] != x[:, :-1]).astype(jnp.int32) for x in sorted_arrays) > 0
    return jnp.pad(changed, ((0, 0), (1, 0)), constant_values=True)
