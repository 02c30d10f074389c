"""A Mosaic GPU kernel for integers that compare each position with all others of its segment.

Counting in pairs is quadratic, yet for rows of a few thousand one launch of it costs a tenth of the sorts and
scans that are linear: a position is a lane, what it compares itself with is broadcast from shared memory, and
segments bound the loop. Loops over long segments are what takes the time, so that they are cut into parts for
programs of their own.
"""

from typing import Any, NamedTuple

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
UNROLL = 8
MAX_PARTS = 8


def why_not(shape) -> str | None:
    """Why the kernel should not be used for rows (b, t), or None if it should."""
    return f"rows must be at most {MAX_LENGTH} long, got {shape[1]}" if shape[1] > MAX_LENGTH else None


def check(op: str) -> None:
    """Raises ValueError where the kernel cannot run."""
    dispatch.check_mosaic_gpu(op, None, interpreted=interpret is not None)


class Parts(NamedTuple):
    """How the loops of a block of looking positions over its segments are cut.

    Attributes:
      number: (b, t) int32, the number of each position's segment.
      bounds: (parts, b, blocks, 2) int32, the first and the last block of positions that each part of a
        block's loop looks at; parts follow one another in time, and of an empty one the last is before the
        first.
    """

    number: jax.Array
    bounds: jax.Array

    def only(self, wanted) -> "Parts":
        """The same where `wanted` (parts, b, t) is true for any of a block's positions, nothing elsewhere."""
        wanted = _by_lane(wanted, False).any(-1)
        first, last = self.bounds[..., 0], self.bounds[..., 1]
        return self._replace(bounds=jnp.stack([first, jnp.where(wanted, last, first - 1)], axis=-1))


def cut(segment_ids, shape, *, past_only=False) -> Parts:
    """Cuts the loops over segments of rows (b, t) into parts of nearly as many blocks.

    Args:
      segment_ids: (b, t), or None for one segment a row.
      shape: (b, t).
      past_only: whether positions after the looking one make no difference, so that they can be left out.
    """
    ids = segments.as_array(segment_ids, shape)
    blocks = -(-shape[1] // LANES)
    last = jnp.minimum(jnp.arange(1, blocks + 1) * LANES, shape[1]) - 1
    first_block = segments.begins(ids)[:, ::LANES] // LANES
    last_block = jnp.broadcast_to(jnp.arange(blocks), first_block.shape)
    if not past_only:
        last_block = (segments.ends(ids)[:, last] - 1) // LANES
    parts = min(blocks, MAX_PARTS)
    share = (last_block - first_block + parts) // parts
    first = first_block + jnp.arange(parts)[:, None, None] * share
    bounds = jnp.stack([first, jnp.minimum(last_block, first + share - 1)], axis=-1)
    return Parts(segments.numbers(ids), bounds.astype(jnp.int32))


def compare(step, own, others, initial, parts: Parts):
    """Runs loops over the positions of each position's segment, one for each part of it.

    Args:
      step: step(other, position, values, mine, state, together) -> state, elementwise over int32 vectors of
        positions. `other` is the position that is looked at and `values` its integers, scalars; `position`
        and `mine` are those of the looking positions, `together` says which share the other's segment.
      own: integers of the looking positions, (b, t) int32 each.
      others: integers of the positions looked at, (b, t) int32 each.
      initial: the state at the start of each part, for each result an int or, where parts differ,
        (parts, b, t) int32.
      parts: of the loops.

    Returns:
      The state after each part, (parts, b, t) int32 each.
    """
    own, others = _in_blocks((parts.number, *own)), _in_blocks((parts.number, *others))
    (batch, num_own, blocks, _), num_others = own.shape, others.shape[1]
    num_parts, length = parts.bounds.shape[0], parts.number.shape[1]
    given = [_by_lane(x) for x in initial if not isinstance(x, int)]
    # The most blocks of a part.
    most = -(-blocks // num_parts)

    def body(own_ref, others_ref, bounds_ref, *refs):
        *given_refs, out_ref, others_sm, arrived = refs
        row, block, part = (lax.axis_index(name) for name in ("row", "block", "part"))
        mine = [_lanes(own_ref, (row, x, block)) for x in range(num_own)]
        lane = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=_LAYOUT)
        here = block * LANES + lane
        begin = iter([_lanes(ref, (part, row, block)) for ref in given_refs])
        state = tuple(_filled(x) if isinstance(x, int) else next(begin) for x in initial)
        first, last = bounds_ref[part, row, block, 0], bounds_ref[part, row, block, 1]
        # So that what is copied ends with the row at the latest.
        base = jnp.clip(first, 0, blocks - most)

        @pl.when(first <= last)
        def _():
            plgpu.copy_gmem_to_smem(others_ref.at[row, :, pl.ds(base, most)], others_sm, arrived)
            plgpu.barrier_wait(arrived)

        def look_at_block(other_block, state):
            def look(number, state):
                for offset in range(UNROLL):
                    other = number * UNROLL + offset
                    values = [others_sm[x, other_block - base, other] for x in range(num_others)]
                    together = mine[0] == values[0]
                    state = step(other_block * LANES + other, here, values[1:], mine[1:], state, together)
                return state

            return lax.fori_loop(0, LANES // UNROLL, look, state)

        state = lax.fori_loop(first, last + 1, look_at_block, state)
        for x, result in enumerate(state):
            out_ref[part, row, x, block] = result

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_parts, batch, len(initial), blocks, LANES), jnp.int32),
        scratch_types=[plgpu.SMEM((num_others, most, LANES), jnp.int32), plgpu.Barrier()],
        grid=(batch, blocks, num_parts),
        grid_names=("row", "block", "part"),
        **({} if interpret is None else {"interpret": interpret}),
    )
    out = kernel(own, others, parts.bounds, *given)
    return tuple(out[:, :, x].reshape(num_parts, batch, -1)[..., :length] for x in range(len(initial)))


_LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)


def _in_blocks(arrays):
    """Integers (b, t) as (b, number, blocks, lanes), the end filled up."""
    return jnp.stack([_by_lane(x) for x in arrays], axis=1)


def _by_lane(x, value=-1):
    """(..., t) as (..., blocks, lanes), the end filled up."""
    return pad_time(x, LANES, axis=-1, value=value).reshape(*x.shape[:-1], -1, LANES)


def _filled(value):
    return plgpu.layout_cast(jnp.full((LANES,), value, jnp.int32), _LAYOUT)


def _lanes(ref, index):
    return plgpu.load(ref.at[index], layout=_LAYOUT, optimized=False)
