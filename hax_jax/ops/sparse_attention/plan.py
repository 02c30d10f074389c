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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from hax_jax.ops import segments
from hax_jax.ops.lsh.xla import merge_buckets
from hax_jax.ops.sparse_attention.key_set import HashBuckets, Lifetimes, Sink, SlidingWindow

CHUNK = 64
# Carried keys are added up in blocks of so many pairs.
PAIRS_OF_BLOCK = 64
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
      end_carried: (N,) the place after the last one; anything where it does not appear.
      last_runs: (blocks, 2) of the key that is the last of each `PAIRS_OF_BLOCK` in `carried_key`, its first
        place there and the place after its last one.
      natural: whether queries and own keys stand in order of their positions.
    """

    queries: Int[Array, "c q"]
    keys: Int[Array, "c k"]
    query_slot: Int[Array, " N"]
    key_slot: Int[Array, " N"]
    carried_key: Int[Array, " p"]
    carried_slot: Int[Array, " p"]
    first_carried: Int[Array, " N"]
    end_carried: Int[Array, " N"]
    last_runs: Int[Array, "blocks 2"]
    natural: bool = dataclasses.field(default=False, metadata={"static": True})


def make_plan(
    source: Any,
    segment_ids: Int[Array, "b t"] | None,
    shape: tuple[int, int],
    multiple: int = 1,
    alive_at_chunks: Callable | None = None,
) -> Plan:
    """Lays out the positions for one source of `PLANNED`.

    Args:
      source: one of `PLANNED`.
      segment_ids: (b, t), or None for one segment a row.
      shape: (b, t).
      multiple: of how many keys the chunks are.
      alive_at_chunks: lists the keys alive at each chunk's first position,
        (last_seen (N,), size) -> (c, size);
        None works them out by sorting.
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
    if column is None and alive_at_chunks is not None:
        alive = source.alive
        if alive is None or alive.shape != (own.shape[0], size):
            # Not of these positions where a mesh divides the batch.
            alive = alive_at_chunks(last_seen, size)
        alive = jnp.minimum(alive, num_positions)
        end = jnp.cumsum(count)
        carried = _Carried(alive, alive, None, first_chunk, end - count, end)
        return _finish_listed(own, own, (position, position), carried, multiple, natural=True)
    return _finish(own, own, position, first_chunk, count, size, column, multiple)


def _plan_by_bucket(source, segment_ids, shape, multiple):
    """Keys and queries in one order by bucket and time; the keys a query sees are the last before it."""
    batch, length = shape
    num_positions = batch * length
    row_begin = length * jnp.arange(batch, dtype=jnp.int32)[:, None]
    query_code, key_code = (jnp.broadcast_to(x, shape) for x in (source.query_code, source.key_code))
    # What `bucket_orders` makes of the same arguments: inside one jit, XLA does it once.
    merged = merge_buckets(query_code, key_code, segment_ids, source.num_codes)
    keys_before = (merged.keys_before + row_begin).reshape(-1)
    time = (merged.time + 2 * row_begin).reshape(-1)
    is_key, position = time % 2 == 0, time // 2
    # (b, t) where the key, and the query, of each position stands in that order.
    key_place, query_place = ((merged.place[:, first::2] + 2 * row_begin).reshape(-1) for first in (0, 1))
    # Keys by bucket and time: what is a key's number from here on.
    number = keys_before[key_place]
    place_of = (
        jnp.zeros(num_positions, jnp.int32)
        .at[number]
        .set(key_place, unique_indices=True, mode="promise_in_bounds")
    )
    by_bucket = time[place_of] // 2
    num_chunks, size = -(-2 * num_positions // CHUNK), source.size
    # Key x is carried into the chunks that begin behind it, up to the last that begins before key x + size
    # ends.
    chunks_before = jnp.pad(place_of // CHUNK + 1, (0, size), constant_values=num_chunks)
    first_chunk = chunks_before[:num_positions]
    # The number of pairs of the keys before x: a sum of differences, in which most cancels.
    windows = lax.reduce_window(chunks_before, 0, lax.add, (size,), (1,), "VALID")
    begin, end = windows[:-1] - windows[0], windows[1:] - windows[0]
    before_chunk = keys_before[::CHUNK]
    carried_keys = before_chunk[:, None] + jnp.arange(-size, 0, dtype=jnp.int32)
    carried_keys = jnp.where(carried_keys < 0, num_positions, carried_keys)
    carried = by_bucket.at[carried_keys].get(mode="fill", fill_value=num_positions)
    return _finish_listed(
        _cut(jnp.where(is_key, num_positions, position), num_positions),
        _cut(jnp.where(is_key, position, num_positions), num_positions),
        (query_place, key_place),
        _Carried(carried_keys, carried, number, first_chunk, begin, end),
        multiple,
    )


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

    return Plan(
        queries=own_queries,
        keys=keys,
        query_slot=_where(own_queries, CHUNK, num_positions),
        key_slot=_where(own_keys, num_slots, num_positions),
        carried_key=jnp.where(exists, key, num_positions),
        carried_slot=slot,
        first_carried=first_carried,
        end_carried=jnp.zeros(num_positions, jnp.int32).at[position_of].set(end, mode="drop"),
        last_runs=_last_runs(jnp.where(exists, key, num_positions), begin, end),
        natural=own_queries is own_keys,
    )


class _Carried(NamedTuple):
    """Which keys are carried where.

    Attributes:
      keys, positions: (c, size) the keys that are carried into each chunk, by number and by position; N where
        there is none.
      number: (N,) the number of each position's key, or None where that is the position.
      first_chunk: (N,) the first chunk that each key is carried into, by number, as are the following.
      begin, end: (N,) where its pairs begin and end among those of all keys in order of their numbers.
    """

    keys: jax.Array
    positions: jax.Array
    number: jax.Array | None
    first_chunk: jax.Array
    begin: jax.Array
    end: jax.Array


def _finish_listed(own_queries, own_keys, places, carried, multiple, natural=False):
    """As `_finish`, where the keys carried into each chunk are listed already.

    Args:
      places: (N,) where each position's query, and its key, stand among all own ones.
    """
    num_positions, (num_chunks, size) = carried.begin.shape[0], carried.keys.shape
    num_pairs = num_chunks * size
    num_slots = size + CHUNK + -(size + CHUNK) % multiple
    query_place, key_place = places
    filler = jnp.full((num_chunks, num_slots - size - CHUNK), num_positions, jnp.int32)
    chunk = jnp.arange(num_chunks, dtype=jnp.int32)[:, None]
    exists = carried.keys < num_positions
    offset = (carried.begin - carried.first_chunk)[jnp.where(exists, carried.keys, 0)]
    pair = jnp.where(exists, offset + chunk, num_pairs).reshape(-1)
    slot = (chunk * num_slots + jnp.arange(size, dtype=jnp.int32)).reshape(-1)
    carried_slot = jnp.zeros(num_pairs, jnp.int32).at[pair].set(slot, mode="drop", unique_indices=True)
    exists = jnp.arange(num_pairs, dtype=jnp.int32) < carried.end[-1]
    place = carried_slot // num_slots * size + carried_slot % num_slots
    carried_key = jnp.where(exists, carried.keys.reshape(-1)[place], num_positions)
    first_carried = jnp.where(carried.end > carried.begin, carried.begin, num_pairs)
    end_carried = carried.end
    if carried.number is not None:
        first_carried, end_carried = first_carried[carried.number], end_carried[carried.number]
    return Plan(
        queries=own_queries,
        keys=jnp.concatenate([carried.positions, filler, own_keys], axis=1),
        query_slot=query_place,
        key_slot=key_place // CHUNK * num_slots + key_place % CHUNK + (num_slots - CHUNK),
        carried_key=carried_key,
        carried_slot=carried_slot,
        first_carried=first_carried,
        end_carried=end_carried,
        last_runs=_last_runs(carried_key, carried.begin, carried.end),
        natural=natural,
    )


def _where(table, slots, num_positions):
    """(N,) the slot of each position of the last CHUNK columns of a table with so many slots a row."""
    slots = jnp.arange(table.shape[0], dtype=jnp.int32)[:, None] * slots + jnp.arange(-CHUNK, 0) + slots
    return jnp.zeros(num_positions, jnp.int32).at[table].set(slots, mode="drop")


def _last_runs(carried_key, begin, end):
    last = jnp.pad(carried_key, (0, -carried_key.shape[0] % PAIRS_OF_BLOCK), constant_values=begin.shape[0])
    last = last[PAIRS_OF_BLOCK - 1 :: PAIRS_OF_BLOCK]
    exists = last < begin.shape[0]
    key = jnp.where(exists, last, 0)
    # A run that has ended before it begins: nothing to add.
    return jnp.where(exists[:, None], jnp.stack([begin[key], end[key]], axis=1), 0)


def _number_within(chunk, num_chunks):
    """(p,) numbers the pairs of each chunk from 0, in their order."""
    pair = jnp.arange(chunk.shape[0], dtype=jnp.int32)
    chunk_sorted, order = lax.sort((chunk, pair), num_keys=1)
    size_of = jnp.zeros(num_chunks + 1, jnp.int32).at[chunk].add(1)
    begin = jnp.cumsum(size_of) - size_of
    return jnp.zeros_like(chunk).at[order].set(pair - begin[chunk_sorted], unique_indices=True)
