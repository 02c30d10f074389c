"""Plans: the positions laid out in chunks, so that every key a query sees lies in the query's own chunk.

All rows of a batch are one list of N = b t positions here. A plan orders them, cuts the order into chunks of
`CHUNK` entries, and adds to each chunk the few older keys ('carried' keys) that its queries may still see:

| source | order | carried into a chunk |
| --- | --- | --- |
| sliding window | time | the size - 1 positions before it |
| sink | time | the first `size` positions of the segment that is going on |
| lifetimes | time | the keys alive at its first position, at most `size` |
| hash buckets | keys and queries merged by (segment, code, time) | the `size` keys before it in that order |

So the work of a chunk is one dense tile of CHUNK x (carried + CHUNK) whatever the inputs, and the number of
chunks depends on N alone: nothing that an input holds can make it slow. The tile still evaluates the source's
rule: a plan only promises that no visible key is missing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from hax_jax.ops import segments
from hax_jax.ops.lsh.xla import merge_buckets
from hax_jax.ops.sparse_attention.key_set import HashBuckets, Lifetimes, Sink, SlidingWindow

CHUNK = 64
PLANNED = (HashBuckets, Lifetimes, SlidingWindow, Sink)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each position stands. A slot without a position holds N, the number of positions.

    Attributes:
      queries: (c, CHUNK) positions whose queries stand in a chunk.
      keys: (c, k) positions whose keys stand in a chunk: the carried ones, empty slots, then its own.
      query_slot, key_slot: (N,) where each position stands in the flattened `queries`, and as an own key in
        the flattened `keys`.
      carried_key: (c * carried,) the carried keys, equal ones next to each other; N where there are no more.
      carried_slot: (c * carried,) where each of them stands in the flattened `keys`; any slot where there are
        no more.
      first_carried: (N,) where each position first appears in `carried_key`; c * carried if it does not.
    """

    queries: Int[Array, "c q"]
    keys: Int[Array, "c k"]
    query_slot: Int[Array, " N"]
    key_slot: Int[Array, " N"]
    carried_key: Int[Array, " p"]
    carried_slot: Int[Array, " p"]
    first_carried: Int[Array, " N"]


def make_plan(
    source: Any, segment_ids: Int[Array, "b t"] | None, shape: tuple[int, int], multiple: int = 1
) -> Plan:
    """Lays out the `shape` (b, t) of positions for one source of `PLANNED`.

    Chunks hold a multiple of `multiple` keys. Without segment ids every row is one segment.
    """
    if isinstance(source, HashBuckets):
        return _plan_by_bucket(source, segment_ids, shape, multiple)
    num_positions = shape[0] * shape[1]
    position = jnp.arange(num_positions, dtype=jnp.int32)
    row_begin = shape[1] * jnp.arange(shape[0], dtype=jnp.int32)[:, None]
    begin, end = (
        (0, shape[1]) if segment_ids is None else (segments.begins(segment_ids), segments.ends(segment_ids))
    )
    begin, end = (jnp.broadcast_to(row_begin + x, shape).reshape(-1) for x in (begin, end))
    if isinstance(source, SlidingWindow):
        size, last_seen = source.size - 1, jnp.minimum(position + source.size, end)
        column = lambda key, chunk: key - chunk * CHUNK + size  # noqa: E731
    elif isinstance(source, Sink):
        size, last_seen = source.size, jnp.where(position < begin + source.size, end, 0)
        column = lambda key, chunk: key - begin[key]  # noqa: E731
    elif isinstance(source, Lifetimes):
        expiry = (jnp.broadcast_to(source.expiry, shape) + row_begin).reshape(-1)
        size, last_seen = source.size, jnp.minimum(expiry, end)
        column = None
    else:
        raise TypeError(f"no plan for {type(source).__name__}")
    # A key is carried into the chunks whose first position p has position < p < last_seen.
    first_chunk = position // CHUNK + 1
    count = jnp.maximum((last_seen - 1) // CHUNK - position // CHUNK, 0)
    own = _cut(position, num_positions)
    return _finish(own, own, position, first_chunk, count, size, column, multiple)


def _plan_by_bucket(source, segment_ids, shape, multiple):
    """Keys and queries in one order by bucket and time; the keys a query sees are the last before it."""
    batch, length = shape
    num_positions = batch * length
    row_begin = length * jnp.arange(batch, dtype=jnp.int32)[:, None]
    query_code, key_code = (jnp.broadcast_to(x, shape) for x in (source.query_code, source.key_code))
    # The sort that `bucket_orders` makes of the same arguments: inside one jit, XLA does it once.
    time, _ = merge_buckets(query_code, key_code, segment_ids)
    is_key = (time % 2 == 0).reshape(-1)
    position = (time // 2 + row_begin).reshape(-1)
    keys_before = jnp.cumsum(is_key.astype(jnp.int32)) - is_key
    target = jnp.where(is_key, keys_before, num_positions)
    # Keys by bucket and time: what is a key's number from here on.
    by_bucket = jnp.zeros(num_positions, jnp.int32).at[target].set(position, mode="drop")
    # Key x is carried into the chunks that have more than x and at most x + size keys before them.
    before_chunk = keys_before[::CHUNK]
    histogram = jnp.zeros(num_positions + source.size + 1, jnp.int32).at[before_chunk].add(1)
    num_chunks_up_to = jnp.cumsum(histogram)
    first_chunk = num_chunks_up_to[:num_positions]
    count = num_chunks_up_to[source.size : num_positions + source.size] - first_chunk
    own_queries = _cut(jnp.where(is_key, num_positions, position), num_positions)
    own_keys = _cut(jnp.where(is_key, position, num_positions), num_positions)
    column = lambda key, chunk: key - before_chunk[chunk] + source.size  # noqa: E731
    size = source.size
    return _finish(own_queries, own_keys, by_bucket, first_chunk, count, size, column, multiple)


def _cut(positions, filler):
    """(m,) to (c, CHUNK)."""
    return jnp.pad(positions, (0, -positions.shape[0] % CHUNK), constant_values=filler).reshape(-1, CHUNK)


def _finish(own_queries, own_keys, position_of, first_chunk, count, size, column, multiple):
    """Builds the plan in which key x, at `position_of[x]`, is carried into `count[x]` chunks from its first.

    `column(x, chunk)` is its place among the `size` carried ones there; with None, any free one.
    """
    num_positions, num_chunks = position_of.shape[0], own_keys.shape[0]
    num_pairs = num_chunks * size
    num_slots = size + CHUNK + -(size + CHUNK) % multiple
    end = jnp.cumsum(count)
    begin = end - count
    # Pairs (key, chunk) in order of the keys: every key marks where its pairs begin.
    pair = jnp.arange(num_pairs, dtype=jnp.int32)
    mark = jnp.where(count > 0, begin, num_pairs)
    key = (
        jnp.zeros(num_pairs, jnp.int32).at[mark].set(jnp.arange(num_positions, dtype=jnp.int32), mode="drop")
    )
    key = lax.cummax(key)
    exists = pair < end[-1]
    chunk = jnp.where(exists, (first_chunk - begin)[key] + pair, num_chunks)
    place = column(key, jnp.minimum(chunk, num_chunks - 1)) if column else _number_within(chunk, num_chunks)
    slot = jnp.where(exists, chunk * num_slots + place, num_chunks * num_slots)
    position = jnp.where(exists, position_of[key], num_positions)
    keys = jnp.full((num_chunks, num_slots), num_positions, jnp.int32).at[:, -CHUNK:].set(own_keys)
    keys = keys.reshape(-1).at[slot].set(position, mode="drop").reshape(keys.shape)
    first_carried = jnp.zeros(num_positions, jnp.int32).at[position_of].set(mark, mode="drop")

    def where(table, slots):
        slots = jnp.arange(table.shape[0], dtype=jnp.int32)[:, None] * slots + jnp.arange(-CHUNK, 0) + slots
        return jnp.zeros(num_positions, jnp.int32).at[table].set(slots, mode="drop")

    return Plan(
        queries=own_queries,
        keys=keys,
        query_slot=where(own_queries, CHUNK),
        key_slot=where(own_keys, num_slots),
        carried_key=jnp.where(exists, key, num_positions),
        carried_slot=slot,
        first_carried=first_carried,
    )


def _number_within(chunk, num_chunks):
    """(p,) numbers the pairs of each chunk from 0, in their order."""
    pair = jnp.arange(chunk.shape[0], dtype=jnp.int32)
    chunk_sorted, order = lax.sort((chunk, pair), num_keys=1)
    size_of = jnp.zeros(num_chunks + 1, jnp.int32).at[chunk].add(1)
    begin = jnp.cumsum(size_of) - size_of
    return jnp.zeros_like(chunk).at[order].set(pair - begin[chunk_sorted], unique_indices=True)
