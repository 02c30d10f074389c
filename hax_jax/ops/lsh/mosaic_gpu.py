"""Orders and counts by comparing pairs, in one kernel; rows too long for that are sorted as in 'xla'."""

import jax.numpy as jnp

from hax_jax.ops import pairs_mosaic_gpu
from hax_jax.ops.lsh import xla


def bucket_orders(query_code, key_code, segment_ids, num_codes=None):
    pairs_mosaic_gpu.check("bucket_orders")
    if pairs_mosaic_gpu.why_not(query_code.shape):
        return xla.bucket_orders(query_code, key_code, segment_ids, num_codes)
    codes = query_code, key_code
    counts = pairs_mosaic_gpu.compare(
        _step, codes, (key_code,), (0, 0), segment_ids, past_only=True, in_parts=True
    )
    return tuple(x.sum(0, dtype=jnp.int32) for x in counts)


def _step(other, position, values, mine, state, together):
    count, order = state
    seen = together & (mine[0] == values[0]) & (other <= position)
    earlier = together & (mine[1] == values[0]) & (other < position)
    return count + jnp.where(seen, 1, 0), order + jnp.where(earlier, 1, 0)
