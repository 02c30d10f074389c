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
      keys: (c, carried + CHUNK) positions whose keys stand in a chunk: the carried ones, then its own.
      query_slot, key_slot: (N,) where each position stands among `queries`, and among the own `keys`, both
        flattened.
      carried_key: (c * carried,) the carried positions in ascending order, N last.
      carried_slot: (c * carried,) where each of them stands among the carried keys, flattened.
      first_carried: (N,) where each position first appears in `carried_key`; c * carried if it does not.
    """

    queries: Int[Array, "c q"]
    keys: Int[Array, "c k"]
    query_slot: Int[Array, " N"]
    key_slot: Int[Array, " N"]
    carried_key: Int[Array, " p"]
    carried_slot: Int[Array, " p"]
    first_carried: Int[Array, " N"]


def make_plan(source: Any, segment_ids: Int[Array, "b t"]) -> Plan:
    """Lays out the positions for one source of `PLANNED`."""
    shape = segment_ids.shape
    if isinstance(source, HashBuckets):
        return _bucket_plan(source, segment_ids)
    num_positions = shape[0] * shape[1]
    first = segments.starts(segment_ids).at[:, 0].set(True).reshape(-1)
    begin = lax.cummax(jnp.where(first, jnp.arange(num_positions, dtype=jnp.int32), 0))
    chunk_begin = jnp.arange(0, num_positions, CHUNK, dtype=jnp.int32)
    if isinstance(source, SlidingWindow):
        carried = chunk_begin[:, None] + jnp.arange(1 - source.size, 0, dtype=jnp.int32)
        carried = jnp.where(carried >= begin[chunk_begin][:, None], carried, num_positions)
    elif isinstance(source, Sink):
        carried = begin[chunk_begin][:, None] + jnp.arange(source.size, dtype=jnp.int32)
        carried = jnp.where(carried < chunk_begin[:, None], carried, num_positions)
    elif isinstance(source, Lifetimes):
        row_begin = shape[1] * jnp.arange(shape[0], dtype=jnp.int32)[:, None]
        expiry = (jnp.broadcast_to(source.expiry, shape) + row_begin).reshape(-1)
        end = _segment_ends(first)
        carried = _survivors(jnp.minimum(expiry, end), source.size)
    else:
        raise TypeError(f"no plan for {type(source).__name__}")
    own = _cut(jnp.arange(num_positions, dtype=jnp.int32), num_positions)
    return _finish(own, carried, own, num_positions)


def _segment_ends(first):
    """(N,) the position after the last one of each position's segment."""
    num_positions = first.shape[0]
    index = jnp.arange(num_positions, dtype=jnp.int32)
    next_begin = jnp.where(first, index, num_positions)
    following = jnp.pad(next_begin[1:], (0, 1), constant_values=num_positions)
    return lax.cummin(following, reverse=True)


def _survivors(expiry, size):
    """(c, size) the keys born before a chunk that live on into it, from their expiries (N,)."""
    num_positions = expiry.shape[0]
    num_chunks = -(-num_positions // CHUNK)
    position = jnp.arange(num_positions, dtype=jnp.int32)
    # A key enters the chunks whose first position p has position < p < expiry.
    first_chunk = position // CHUNK + 1
    count = jnp.maximum((expiry - 1) // CHUNK - position // CHUNK, 0)
    end = jnp.cumsum(count)
    pair = jnp.arange(num_chunks * size, dtype=jnp.int32)
    # The owner of each pair: every key marks where its pairs begin.
    mark = jnp.where(count > 0, end - count, pair.shape[0])
    owner = lax.cummax(jnp.zeros_like(pair).at[mark].max(position, mode="drop"))
    chunk = jnp.where(pair < end[-1], first_chunk[owner] + pair - (end - count)[owner], num_chunks)
    # Stable, so that the survivors of a chunk stand in order of time.
    chunk, owner = lax.sort((chunk, owner), num_keys=1)
    begin = jnp.searchsorted(chunk, jnp.arange(num_chunks + 1, dtype=jnp.int32)).astype(jnp.int32)
    slot = chunk * size + pair - begin[jnp.minimum(chunk, num_chunks)]
    slot = jnp.where(chunk < num_chunks, slot, pair.shape[0])
    table = jnp.full(pair.shape, num_positions, jnp.int32).at[slot].set(owner, mode="drop")
    return table.reshape(num_chunks, size)


def _bucket_plan(source, segment_ids):
    """Keys and queries in one order by bucket and time; the keys a query sees are the last before it."""
    batch, length = segment_ids.shape
    num_positions = batch * length
    row_begin = length * jnp.arange(batch, dtype=jnp.int32)[:, None]
    code = (jnp.broadcast_to(x, segment_ids.shape) for x in (source.query_code, source.key_code))
    # The same sort as in `bucket_orders`: inside one jit, XLA does it once.
    time, *_ = merge_buckets(*code, segment_ids)
    is_key = (time % 2 == 0).reshape(-1)
    position = (time // 2 + row_begin).reshape(-1)
    keys_before = jnp.cumsum(is_key.astype(jnp.int32)) - is_key
    target = jnp.where(is_key, keys_before, num_positions)
    by_bucket = jnp.zeros(num_positions, jnp.int32).at[target].set(position, mode="drop")
    chunk_begin = keys_before[::CHUNK]
    index = chunk_begin[:, None] + jnp.arange(-source.size, 0, dtype=jnp.int32)
    carried = jnp.where(index >= 0, by_bucket[jnp.maximum(index, 0)], num_positions)
    own_queries = _cut(jnp.where(is_key, num_positions, position), num_positions)
    own_keys = _cut(jnp.where(is_key, position, num_positions), num_positions)
    return _finish(own_queries, carried, own_keys, num_positions)


def _cut(positions, filler):
    """(m,) to (c, CHUNK)."""
    return jnp.pad(positions, (0, -positions.shape[0] % CHUNK), constant_values=filler).reshape(-1, CHUNK)


def _finish(queries, carried, own, num_positions):
    """Adds to the tables what leads back from them to the positions."""
    place = lambda table: (  # noqa: E731
        jnp.zeros(num_positions, jnp.int32)
        .at[table.reshape(-1)]
        .set(jnp.arange(table.size, dtype=jnp.int32), mode="drop")
    )
    slot = jnp.arange(carried.size, dtype=jnp.int32)
    carried_key, carried_slot = lax.sort((carried.reshape(-1), slot), num_keys=1)
    leads = jnp.pad(carried_key[1:] != carried_key[:-1], (1, 0), constant_values=True)
    first_carried = (
        jnp.full(num_positions, carried.size, jnp.int32)
        .at[jnp.where(leads, carried_key, num_positions)]
        .set(slot, mode="drop")
    )
    return Plan(
        queries=queries,
        keys=jnp.concatenate([carried, own], axis=1),
        query_slot=place(queries),
        key_slot=place(own),
        carried_key=carried_key,
        carried_slot=carried_slot,
        first_carried=first_carried,
    )
