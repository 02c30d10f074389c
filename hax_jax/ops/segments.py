"""Segments: runs of positions in a row that know nothing of each other.

Packed items are segments; in causal routing pads are segments of their own. Everything that moves along
time (convolution, state, running sums, hash orders, attention) stops at a boundary. Segment ids are any
int32 numbers but the least (`empty`); equal neighbours belong together, and an id is not used again later in
the row.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hax_jax.ops.numerics import einsum, pad_time, wide

# Positions that `running_sum` adds up by one product.
BLOCK = 64
# Positions of a segment that holds nothing: no more than a tile of the kernels.
EMPTY = 64


def starts(segment_ids: Int[Array, "b t"]) -> Bool[Array, "b t"]:
    """True at each segment's first position, except at position 0, which may continue an earlier row."""
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)), constant_values=False)


def empty(position: Int[Array, "*t"]) -> Int[Array, "*t"]:
    """Ids for positions that hold nothing: the least int32 numbers, another every `EMPTY` positions.

    Nothing else may have these ids. As one segment such positions would be long, and what compares the
    positions of a segment would do so for nothing.
    """
    return jnp.iinfo(jnp.int32).min + position // EMPTY


def apart(is_real: Bool[Array, "b t"], segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """The ids, with pads in segments of their own (`empty`)."""
    return jnp.where(is_real, segment_ids, empty(_index(segment_ids)))


def numbers(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Numbers the segments of all rows from 0 up, in the order of the rows laid end to end."""
    first = starts(segment_ids).at[:, 0].set(True)
    return jnp.cumsum(first.reshape(-1).astype(jnp.int32)).reshape(segment_ids.shape) - 1


def positions(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Position of each token inside its segment, from 0."""
    return _index(segment_ids) - begins(segment_ids)


def begins(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """The first position of each token's segment, in its row."""
    return lax.cummax(jnp.where(starts(segment_ids), _index(segment_ids), 0), axis=1)


def ends(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """The position after the last one of each token's segment, in its row."""
    changes = jnp.pad(starts(segment_ids)[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    after = jnp.where(changes, _index(segment_ids) + 1, segment_ids.shape[1])
    return lax.cummin(after, axis=1, reverse=True)


def running_sum(x: Float[Array, "b t n"], segment_ids: Int[Array, "b t"] | None) -> Array:
    """Inclusive sum over time of x (b, t, n), begun anew in every segment; at least float32.

    A boundary must not leave the rounding of earlier segments behind, as a difference of two long sums
    would. Blocks of positions, then the sums of blocks, are multiplied by matrices of 0 and 1 that say what
    belongs together: few passes, where a scan whose sum restarts has two for each doubling of the length.
    """
    x = x.astype(wide(x.dtype))
    if segment_ids is None:
        return jnp.cumsum(x, axis=1)
    if x.shape[1] <= BLOCK:
        return _masked_sum(x, segment_ids)
    length, ids = x.shape[1], _in_blocks(segment_ids)
    within = einsum("bcts,bcsn->bctn", _together(ids).astype(x.dtype), _in_blocks(x))
    # A block hands on the sum of its last segment, which is as much of it as the block holds.
    handed_on = ids[:, :-1, -1]
    arriving = running_sum(within[:, :-1, -1], handed_on)
    goes_on = ids[:, 1:] == handed_on[:, :, None]
    arriving = jnp.where(goes_on[..., None], arriving[:, :, None], 0)
    # Nothing arrives at the first block.
    y = within + jnp.pad(arriving, ((0, 0), (1, 0), (0, 0), (0, 0)))
    return y.reshape(x.shape[0], -1, x.shape[2])[:, :length]


def _masked_sum(x, segment_ids):
    """`running_sum` of a few positions: one kernel, where a product would be given a mask and padding."""
    return jnp.where(_together(segment_ids)[..., None], x[:, None], 0).sum(2)


def _together(ids):
    """(..., t, t): whether the second position is no later than the first, and in its segment."""
    earlier = jnp.tril(jnp.ones((ids.shape[-1],) * 2, bool))
    return earlier & (ids[..., :, None] == ids[..., None, :])


def _in_blocks(x):
    x = pad_time(x, BLOCK)
    return x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:])


def as_array(segment_ids: Int[Array, "b t"] | None, shape: tuple[int, ...]) -> jax.Array:
    """The ids, or one segment a row where there are none."""
    return jnp.zeros(shape, jnp.int32) if segment_ids is None else segment_ids


def _index(segment_ids):
    return jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
