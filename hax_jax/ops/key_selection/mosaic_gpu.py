"""Lifetimes by comparing pairs, in one kernel; rows too long for that are sorted as in 'xla'."""

import jax.numpy as jnp
from jax import lax

from hax_jax.ops import pairs_mosaic_gpu
from hax_jax.ops.key_selection import xla
from hax_jax.ops.sorting import descending


def key_lifetimes(scores, num_keys, segment_ids):
    pairs_mosaic_gpu.check("key_lifetimes")
    length = scores.shape[1]
    if pairs_mosaic_gpu.why_not(scores.shape) or scores.dtype == jnp.float64:
        return xla.key_lifetimes(scores, num_keys, segment_ids)
    # Signed integers in the same order: the smaller, the better.
    rank = lax.bitcast_convert_type(descending(scores) ^ jnp.uint32(1 << 31), jnp.int32)

    def step(other, position, values, mine, state, together):
        better_so_far, expiry = state
        # Of equal scores the earlier is better.
        better = together & (values[0] < mine[0] + jnp.where(other < position, 1, 0))
        better_so_far = better_so_far + jnp.where(better, 1, 0)
        return better_so_far, jnp.where(better & (better_so_far == num_keys), other, expiry)

    return pairs_mosaic_gpu.compare_with_segment(
        step, (rank,), (rank,), (0, length), segment_ids, scores.shape
    )[1]
