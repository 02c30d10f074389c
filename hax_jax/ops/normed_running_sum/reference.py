"""The formula, with every position's sum by itself."""

import jax.numpy as jnp

from hax_jax.ops.numerics import einsum, wide

_TINY = 1e-12


def normed_running_sum(x, segment_ids, dtype):
    time = jnp.arange(x.shape[1])
    counts = (time[:, None] >= time)[None]
    if segment_ids is not None:
        counts = counts & (segment_ids[:, :, None] == segment_ids[:, None, :])
    x = x.astype(wide(x.dtype))
    counts = jnp.broadcast_to(counts, (x.shape[0], *counts.shape[1:])).astype(x.dtype)
    total = einsum("bts,bsn->btn", counts, x)
    norm = jnp.sqrt(einsum("bts,bsn->btn", counts, total * total))
    return (total / jnp.maximum(norm, _TINY)).astype(dtype)
