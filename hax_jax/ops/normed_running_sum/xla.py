"""Running sums by blocks, each a product with a matrix of 0 and 1."""

import jax.numpy as jnp

from hax_jax.ops import segments
from hax_jax.ops.numerics import wide

# What sums of zeros are divided by.
TINY = 1e-12


def normed_running_sum(x, segment_ids, dtype):
    total = segments.running_sum(x.astype(wide(x.dtype)), segment_ids)
    norm = jnp.sqrt(segments.running_sum(total * total, segment_ids))
    return (total / jnp.maximum(norm, TINY)).astype(dtype)
