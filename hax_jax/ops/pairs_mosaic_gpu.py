"""A Mosaic GPU kernel for integers that compare each position with all others of its segment.

Counting in pairs is quadratic, yet for rows of a few thousand one launch of it costs a tenth of the sorts and
scans that are linear: a position is a lane, what it compares itself with is broadcast from shared memory, and
segments bound the loop. Loops over long segments are what takes the time; where results are sums they are cut
into parts for programs of their own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops import dispatch, segments
from hax_jax.ops.numerics import pad_time

# How tests on a CPU run the kernel: Pallas' interpreter's settings, or None to compile it.
interpret: Any = None

# Rows up to this length; beyond, sorts cost less.
MAX_LENGTH = 4096
LANES = 128
# Comparisons whose operands are read together, so that they wait for shared memory once.
UNROLL = 16
MAX_PARTS = 8


def why_not(shape) -> str | None:
    """Why the kernel should not be used for rows (b, t), or None if it should."""
    return f"rows must be at most {MAX_LENGTH} long, got {shape[1]}" if shape[1] > MAX_LENGTH else None


def check(op: str) -> None:
    """Raises ValueError where the kernel cannot run."""
    dispatch.check_mosaic_gpu(op, None, interpreted=interpret is not None)


def compare(step, own, others, initial, segment_ids, *, past_only=False, in_parts=False):
    """Runs a loop over the positions of each position's segment, in order.

    Args:
      step: step(other, position, values, mine, state, together) -> state, elementwise over int32 vectors of
        positions. `other` is the position that is looked at and `values` its integers, scalars; `position`
        and `mine` are those of the looking positions, `together` says which share the other's segment.
      own: integers of the looking positions, (b, t) int32 each.
      others: integers of the positions looked at, (b, t) int32 each.
      initial: the state at the start, one int for each result.
      segment_ids: (b, t), or None for one segment a row.
      past_only: `step` takes nothing of positions after the looking one, so that they may be left out, and
        need not be told apart by `together`.
      in_parts: cut the loops into parts that all begin with `initial`, for results that are sums over them.

    Returns:
      The state after each part, (parts, b, t) int32 each; one part unless `in_parts`.
    """
    shape = others[0].shape
    ids = segments.as_array(segment_ids, shape)
    begin, end = segments.begins(ids), segments.ends(ids)
    bounds = _bounds(begin, end, past_only, MAX_PARTS if in_parts else 1)
    # Beyond the end of a row no segment holds anything.
    own = [_by_lane(begin, shape[1]), _by_lane(end, 0), *map(_by_lane, own)]
    others = [*map(_by_lane, others)]
    num_parts, batch, blocks, _ = bounds.shape
    # The most blocks of a part.
    most = -(-blocks // num_parts)

    def body(*refs):
        own_refs, others_refs = refs[: len(own)], refs[len(own) : len(own) + len(others)]
        bounds_ref, out_ref, *others_sm, arrived = refs[len(own) + len(others) :]
        row, block, part = (lax.axis_index(name) for name in ("row", "block", "part"))
        first, last = bounds_ref[part, row, block, 0], bounds_ref[part, row, block, 1]
        # So that what is copied ends with the row at the latest.
        base = jnp.clip(first, 0, blocks - most)

        @pl.when(first <= last)
        def _():
            for source, target in zip(others_refs, others_sm, strict=True):
                plgpu.copy_gmem_to_smem(source.at[row, pl.ds(base, most)], target, arrived)

        begins, ends, *mine = [_lanes(ref, (row, block)) for ref in own_refs]
        lane = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=_LAYOUT)
        here = block * LANES + lane
        state = tuple(plgpu.layout_cast(jnp.full((LANES,), x, jnp.int32), _LAYOUT) for x in initial)

        @pl.when(first <= last)
        def _():
            plgpu.barrier_wait(arrived)

        def look_at_block(other_block, state):
            def look(number, state):
                for offset in range(UNROLL):
                    at = number * UNROLL + offset
                    other = other_block * LANES + at
                    values = [ref[other_block - base, at] for ref in others_sm]
                    together = other >= begins
                    if not past_only:
                        together &= other < ends
                    state = step(other, here, values, mine, state, together)
                return state

            return lax.fori_loop(0, LANES // UNROLL, look, state)

        state = lax.fori_loop(first, last + 1, look_at_block, state)
        for x, result in enumerate(state):
            out_ref[part, x, row, block] = result

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_parts, len(initial), batch, blocks, LANES), jnp.int32),
        scratch_types=[
            *[plgpu.SMEM((most, LANES), jnp.int32)] * len(others),
            plgpu.Barrier(num_arrivals=len(others)),
        ],
        grid=(batch, blocks, num_parts),
        grid_names=("row", "block", "part"),
        **({} if interpret is None else {"interpret": interpret}),
    )
    out = kernel(*own, *others, bounds)
    return tuple(out[:, x].reshape(num_parts, batch, -1)[..., : shape[1]] for x in range(len(initial)))


_LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)


def _bounds(begin, end, past_only, most_parts):
    """The blocks that a block's positions look at, cut into parts of nearly as many.

    Returns:
      (parts, b, blocks, 2) int32, the first and the last block of each part; parts follow one another in
      time, and of an empty one the last is before the first.
    """
    length = begin.shape[1]
    blocks = -(-length // LANES)
    last = jnp.minimum(jnp.arange(1, blocks + 1) * LANES, length) - 1
    first_block = begin[:, ::LANES] // LANES
    last_block = jnp.broadcast_to(jnp.arange(blocks), first_block.shape)
    if not past_only:
        last_block = (end[:, last] - 1) // LANES
    parts = min(blocks, most_parts)
    share = (last_block - first_block + parts) // parts
    first = first_block + jnp.arange(parts)[:, None, None] * share
    bounds = jnp.stack([first, jnp.minimum(last_block, first + share - 1)], axis=-1)
    return bounds.astype(jnp.int32)


def _by_lane(x, value=0):
    """(b, t) as (b, blocks, lanes), the end filled up."""
    return pad_time(x, LANES, value=value).reshape(x.shape[0], -1, LANES)


def _lanes(ref, index):
    return plgpu.load(ref.at[index], layout=_LAYOUT, optimized=False)
