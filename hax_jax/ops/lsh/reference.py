"""Orders and counts from all pairs of positions."""

import jax.numpy as jnp

from hax_jax.ops import segments


def bucket_orders(query_code, key_code, segment_ids, num_codes=None):
    del num_codes
    length = query_code.shape[1]
    ids = segments.as_array(segment_ids, query_code.shape)
    together = ids[:, :, None] == ids[:, None, :]
    not_later = jnp.tril(jnp.ones((length, length), bool))
    earlier = jnp.tril(not_later, -1)
    count = (together & not_later & (query_code[:, :, None] == key_code[:, None, :])).sum(-1)
    order = (together & earlier & (key_code[:, :, None] == key_code[:, None, :])).sum(-1)
    return count.astype(jnp.int32), order.astype(jnp.int32)
