"""The best keys of the prefix at every chunk's beginning, by Mosaic GPU kernels.

A *list* holds the best `size` of some keys, sorted, as fields of int32: the rank (lower is better), the
position, and, where there are segments, the segment's number. A key of a later segment is better than any of
an earlier one, so a prefix's list begins with the segment that is going on. Of equal ranks the earlier is
better: in a merger the earlier keys' list comes first.

Chunks of 64 positions are sorted by counting pairs; groups of 16 chunks are scanned in one program each, and
the groups' lists 64 at a time. A merger is a binary search of each entry in the other list. So the time does
not depend on what the keys are, but on their number alone.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops import lanes_mosaic_gpu as lanes
from hax_jax.ops.lanes_mosaic_gpu import LANES

CHUNK = 64
CHUNKS_OF_GROUP = 16
GROUP = CHUNK * CHUNKS_OF_GROUP
# Lists are of one of these sizes.
SIZES = (32, 64)
# Entries that a program scans at a time.
SCANNED = 2048
# The rank of no key: worse than any, and one more is still an int32.
NO_RANK = (1 << 31) - 2
# The absent field of a list: rank, position, segment.
ABSENT = (NO_RANK, -1, -1)
# The death of a key that stays.
NEVER = (1 << 31) - 1
# A place beyond any array.
NOWHERE = 1 << 30


def size_of_lists(num_keys: int) -> int | None:
    """The size of the lists that hold so many keys, or None if that is too many."""
    return next((size for size in SIZES if size >= num_keys), None)


def prefix_lists(keys: list[jax.Array], size: int) -> tuple[jax.Array, jax.Array]:
    """The lists from which `merge_two` makes that of the prefix before a chunk.

    Args:
      keys: ranks, (g, GROUP) int32 below NO_RANK, or that for no key, the lower the better; if there are
        segments their numbers too, (g, GROUP) int32, never falling, at least 0 where there is a key.
      size: one of `SIZES`.

    Returns:
      Lists up to the end of each group, (fields, g * size), and, of each group's keys alone, up to the end of
      each chunk, (fields, g * CHUNKS_OF_GROUP * size).
    """
    local = _scan_groups(keys, size)
    return _scan(local, CHUNKS_OF_GROUP, size), local


def _scan(lists, stride, size):
    """Inclusive scan of every `stride`-th list, the last of each stretch; (fields, lists * size)."""
    count = lists.shape[1] // (stride * size)
    at_once = SCANNED // size
    if count <= at_once:
        return _scan_lists(lists, stride, count, size)[:, : count * size]
    local = _scan_lists(lists, stride, at_once, size)
    return _merge_all(_scan(local, at_once, size), local, at_once, size)


def _scan_groups(keys, size):
    num_groups = keys[0].shape[0]
    entries = CHUNKS_OF_GROUP * size
    num_fields = len(keys) + 1

    def body(*refs):
        keys_refs, (out_ref, keys_sm, lists_sm) = refs[: len(keys)], refs[len(keys) :]
        group = lax.axis_index("program")
        mine = [lanes.load(ref.at[group], GROUP) for ref in keys_refs]
        for field, x in enumerate(mine):
            keys_sm[field] = x
        lane = lanes.iota(GROUP)
        within = lane & (CHUNK - 1)
        begin = lane - within

        def count(other, better):
            theirs = [lanes.gather(keys_sm.at[field], begin + other) for field in range(len(keys))]
            limit = mine[0] + jnp.where(other < within, 1, 0)
            return better + _if_better(theirs, [limit, *mine[1:]], 1)

        better = lax.fori_loop(0, CHUNK, count, lanes.full(GROUP, 0))
        target = jnp.where(better < size, (lane >> _log2(CHUNK)) * size + better, NOWHERE)
        lanes.scatter(lists_sm, target, mine[0], group * GROUP + lane, *mine[1:])
        _scan_in_memory(lists_sm, CHUNKS_OF_GROUP, size)
        for field in range(num_fields):
            out_ref[field, group] = lanes.load(lists_sm.at[field], entries)

    out = _kernel(
        body,
        out_type=_array((num_fields, num_groups, entries)),
        scratch_types=[_smem(len(keys), GROUP), _smem(num_fields, entries)],
        grid=(num_groups,),
    )(*keys)
    return out.reshape(num_fields, -1)


def _scan_lists(lists, stride, at_once, size):
    """Inclusive scans of every `stride`-th list, so many at once; absent ones fill the last scan up."""
    num_fields = lists.shape[0]
    count = lists.shape[1] // (stride * size)
    programs = -(-count // at_once)
    entries = -(-at_once * size // LANES) * LANES

    def body(in_ref, out_ref, lists_sm):
        program = lax.axis_index("program")
        lane = lanes.iota(entries)
        index = program * at_once + (lane >> _log2(size))
        source = (jnp.minimum(index, count - 1) * stride + (stride - 1)) * size + (lane & (size - 1))
        for field in range(num_fields):
            loaded = lanes.gather(in_ref.at[field], source)
            lists_sm[field] = jnp.where(index < count, loaded, ABSENT[field])
        _scan_in_memory(lists_sm, entries // size, size)
        for field in range(num_fields):
            out_ref[field, program] = lanes.load(lists_sm.at[field], entries)

    out = _kernel(
        body,
        out_type=_array((num_fields, programs, entries)),
        scratch_types=[_smem(num_fields, entries)],
        grid=(programs,),
    )(lists)
    return out.reshape(num_fields, -1)


def _merge_all(before, local, at_once, size):
    """Merges the list up to each scan's beginning, the one before in `before`, into all lists of the scan."""
    num_fields, num_entries = local.shape
    entries = at_once * size

    def body(before_ref, local_ref, out_ref, before_sm, lists_sm):
        program = lax.axis_index("program")
        lane = lanes.iota(entries)
        some = lanes.iota(LANES)
        source = jnp.maximum(program - 1, 0) * size + (some & (size - 1))
        for field in range(num_fields):
            loaded = lanes.gather(before_ref.at[field], source)
            before_sm[field] = jnp.where(some * 0 + program > 0, loaded, ABSENT[field])
            lists_sm[field] = lanes.gather(local_ref.at[field], program * entries + lane)
        own = lane & ~(size - 1)
        _merge(before_sm, own * 0, lists_sm, own, lists_sm, own, size, None)
        for field in range(num_fields):
            out_ref[field, program] = lanes.load(lists_sm.at[field], entries)

    out = _kernel(
        body,
        out_type=_array((num_fields, num_entries // entries, entries)),
        scratch_types=[_smem(num_fields, LANES), _smem(num_fields, entries)],
        grid=(num_entries // entries,),
    )(before, local)
    return out.reshape(num_fields, -1)


def merge_two(groups_ref, local_ref, chunk, both_sm, list_sm, size):
    """In a kernel: writes the list of the prefix before a chunk to `list_sm` (fields, size).

    Args:
      groups_ref, local_ref: what `prefix_lists` returns.
      both_sm: (fields, LANES).
    """
    num_fields = both_sm.shape[0]
    group = lax.div(chunk, CHUNKS_OF_GROUP)
    lane = lanes.iota(LANES)
    slot, is_later = lane & (size - 1), jnp.where(lane >= size, 1, 0)
    # What there is before: earlier groups for the first list, earlier chunks of the group for the second.
    before = jnp.where(is_later == 1, chunk - group * CHUNKS_OF_GROUP, group)
    mine = []
    for field in range(num_fields):
        of_groups = lanes.gather(groups_ref.at[field], jnp.maximum(group - 1, 0) * size + slot)
        of_chunks = lanes.gather(local_ref.at[field], jnp.maximum(chunk - 1, 0) * size + slot)
        loaded = jnp.where(is_later == 1, of_chunks, of_groups)
        mine.append(jnp.where(before > 0, loaded, ABSENT[field]))
        both_sm[field] = mine[field]
    found = search(both_sm, (1 - is_later) * size, [mine[0] + is_later, *mine[2:]], size)
    lanes.scatter(list_sm, jnp.where(lane < 2 * size, slot + found, NOWHERE), *mine)


def search(lists_sm, begin, limit, size):
    """How many entries of the lists that begin at `begin` are better than `limit`: a rank, and a segment."""
    fields = (0, 2)[: len(limit)]

    def look(index):
        return [lanes.gather(lists_sm.at[field], index) for field in fields]

    def halve(_, state):
        found, step = state
        step = step // 2
        return found + _if_better(look(begin + found + (step - 1)), limit, 1) * step, step

    # A loop, for all of this is inlined once for each register of a vector.
    found, _ = lax.fori_loop(0, _log2(size), halve, (begin * 0, jnp.int32(size)))
    return found + _if_better(look(begin + found), limit, 1)


def _if_better(keys, limit, value):
    """`value` where a key, its rank and its segment, is better than `limit`, else 0."""
    by_rank = jnp.where(keys[0] < limit[0], value, 0)
    if len(limit) == 1:
        return by_rank
    return jnp.where(keys[1] == limit[1], by_rank, jnp.where(keys[1] > limit[1], value, 0))


def _scan_in_memory(lists_sm, count, size):
    """Inclusive scan of `count` lists where they lie."""
    lane = lanes.iota(count * size)
    own = lane & ~(size - 1)

    def add_earlier(_, distance):
        earlier = own - distance * size
        exists = jnp.where(earlier >= 0, 1, 0)
        _merge(lists_sm, jnp.maximum(earlier, 0), lists_sm, own, lists_sm, own, size, exists)
        return distance * 2

    lax.fori_loop(0, _log2(2 * count - 1), add_earlier, jnp.int32(1))


def _merge(earlier_sm, earlier, later_sm, later, out_sm, out, size, exists):
    """Merges the list at `earlier` with the one at `later` into `out`; copies the later where not `exists`.

    `out_sm` may be the memory that is read: all lanes have read it before any writes.
    """
    num_fields = out_sm.shape[0]
    i = lanes.iota(out.shape[0]) & (size - 1)
    first = [lanes.gather(earlier_sm.at[field], earlier + i) for field in range(num_fields)]
    second = [lanes.gather(later_sm.at[field], later + i) for field in range(num_fields)]
    before_first = search(later_sm, later, [first[0], *first[2:]], size)
    before_second = search(earlier_sm, earlier, [second[0] + 1, *second[2:]], size)
    if exists is not None:
        before_first = jnp.where(exists == 1, before_first, size)
        before_second = before_second * exists
    for before, fields in ((before_first, first), (before_second, second)):
        place = i + before
        lanes.scatter(out_sm, jnp.where(place < size, out + place, NOWHERE), *fields)


def _log2(x):
    return x.bit_length() - 1


def _array(shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _smem(*shape):
    return plgpu.SMEM(shape, jnp.int32)


def _kernel(body, **types):
    return plgpu.kernel(
        body,
        grid_names=("program",),
        **types,
        **({} if lanes.interpret is None else {"interpret": lanes.interpret}),
    )


def in_groups(x, fill):
    """A row of positions (n,) as (g, GROUP), the end filled up."""
    return jnp.pad(x, (0, -x.shape[0] % GROUP), constant_values=fill).reshape(-1, GROUP)


def deaths(rank: jax.Array, segment: jax.Array | None, num_keys: int) -> tuple[jax.Array, jax.Array]:
    """When each position's key is no longer among the best `num_keys` of its prefix.

    Args:
      rank, segment: as for `prefix_lists`; the earlier of equal ranks is better, and a segment is for itself.
      num_keys: at most 64.

    Returns:
      (g * GROUP,) int32: the position at which the last of `num_keys` better keys has come, the key's own if
      they came before it, `NEVER` if they do not come; and (chunks, num_keys) the keys alive at the first
      position of each chunk, `NOWHERE` where there are no more.
    """
    size = size_of_lists(num_keys)
    assert size is not None, "the caller asks `size_of_lists` first"
    keys = [rank] if segment is None else [rank, segment]
    lists = prefix_lists(keys, size)
    num_fields, num_chunks = len(keys) + 1, rank.size // CHUNK
    own = [x.reshape(num_chunks, CHUNK) for x in keys]

    def body(groups_ref, local_ref, *refs):
        own_refs, (who_ref, death_ref, both_sm, list_sm, own_sm, arrived) = refs[: len(own)], refs[len(own) :]
        chunk = lax.axis_index("program")
        for field, ref in enumerate(own_refs):
            plgpu.copy_gmem_to_smem(ref.at[chunk], own_sm.at[field], arrived)
        merge_two(groups_ref, local_ref, chunk, both_sm, list_sm, size)
        plgpu.barrier_wait(arrived)
        lane = lanes.iota(LANES)
        slot, offset = lane & (size - 1), lane & (CHUNK - 1)
        # Lanes below CHUNK hold the keys carried in, as far as there are so many; the others the chunk's own.
        is_own = jnp.where(lane >= CHUNK, 1, 0)
        mine = [
            jnp.where(is_own == 1, lanes.gather(own_sm.at[x], offset), lanes.gather(list_sm.at[field], slot))
            for x, field in zip(range(num_fields - 1), (0, 2), strict=False)
        ]
        better_before = search(list_sm, lane * 0, [mine[0] + 1, *mine[1:]], size)
        count = jnp.where(is_own == 1, better_before, slot)
        death = jnp.where(count < num_keys, NEVER, 0)

        def look(other, state):
            count, death = state
            limit = mine[0] + is_own * jnp.where(other < offset, 1, 0)
            better = jnp.where(own_sm[0, other] < limit, 1, 0)
            if segment is not None:
                better = jnp.where(mine[1] == own_sm[1, other], better, 0)
            count = count + better
            return count, jnp.where(count * better == num_keys, chunk * CHUNK + other, death)

        count, death = lax.fori_loop(0, CHUNK, look, (count, death))
        position = lanes.gather(list_sm.at[1], slot)
        carried = (lane < num_keys) & (mine[0] < NO_RANK)
        if segment is not None:
            carried = carried & (mine[1] == own_sm[1, 0])
        who_ref[chunk] = jnp.where(carried, position, NOWHERE)
        death_ref[chunk] = jnp.where(is_own == 1, jnp.maximum(death, chunk * CHUNK + offset), death)

    who, death = _kernel(
        body,
        out_type=[_array((num_chunks, LANES))] * 2,
        scratch_types=[
            _smem(num_fields, LANES),
            _smem(num_fields, size),
            _smem(num_fields - 1, CHUNK),
            plgpu.Barrier(num_arrivals=len(own)),
        ],
        grid=(num_chunks,),
    )(*lists, *own)
    # A key dies in one chunk: its own, or one that it is carried into.
    carried, carried_death = who[:, :num_keys], death[:, :num_keys]
    dying = jnp.where(carried_death < NEVER, carried, NOWHERE)
    own_death = death[:, CHUNK:].reshape(-1)
    # Not those that the chunk's first key takes the place of.
    first = CHUNK * jnp.arange(num_chunks, dtype=jnp.int32)[:, None]
    alive = jnp.where(carried_death > first, carried, NOWHERE)
    return own_death.at[dying].set(carried_death, mode="drop", unique_indices=True), alive


def alive_at_chunks(last_seen: jax.Array, num_keys: int) -> jax.Array:
    """The keys alive at the first position of each chunk, where there are never more than `num_keys`.

    Args:
      last_seen: (n,) int32, the position from which on a key is no longer seen.
      num_keys: at most 64.

    Returns:
      (chunks, num_keys) positions before the chunk, n where there are no more.
    """
    size = size_of_lists(num_keys)
    assert size is not None, "the caller asks `size_of_lists` first"
    length = last_seen.shape[0]
    lists = prefix_lists([in_groups(-last_seen, NO_RANK)], size)
    num_chunks = -(-length // CHUNK)

    def body(groups_ref, local_ref, out_ref, both_sm, list_sm):
        chunk = lax.axis_index("program")
        merge_two(groups_ref, local_ref, chunk, both_sm, list_sm, size)
        lane = lanes.iota(LANES)
        slot = lane & (size - 1)
        is_alive = lanes.gather(list_sm.at[0], slot) < -chunk * CHUNK
        out_ref[chunk] = jnp.where(is_alive, lanes.gather(list_sm.at[1], slot), length)

    out = _kernel(
        body,
        out_type=_array((num_chunks, LANES)),
        scratch_types=[_smem(2, LANES), _smem(2, size)],
        grid=(num_chunks,),
    )(*lists)
    return out[:, :num_keys]
