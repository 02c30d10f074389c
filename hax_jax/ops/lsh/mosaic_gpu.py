"""Orders and counts by comparing pairs, in one kernel; rows too long for that are sorted as in 'xla'."""

import jax.numpy as jnp

from hax_jax.ops import pairs_mosaic_gpu
from hax_jax.ops.lsh import xla


def bucket_orders(query_code, key_code, segment_ids, num_codes=None):
    pairs_mosaic_gpu.check("bucket_orders")
    if pairs_mosaic_gpu.why_not(query_code.shape):
        return xla.bucket_orders(query_code, key_code, segment_ids, num_codes)
    own, others = (query_code, key_code), (key_code,)
    parts = pairs_mosaic_gpu.compare_with_segment(
        _step, own, others, (0, 0), segment_ids, query_code.shape, past_only=True
    )
    return tuple(x.sum(0) for x in parts)


def _step(other, position, values, mine, state, together):
    count, order = state
    seen = together & (mine[0] == values[0]) & (other <= position)
    earlier = together & (mine[1] == values[0]) & (other < position)
    return count + jnp.where(seen, 1, 0), order + jnp.where(earlier, 1, 0)
