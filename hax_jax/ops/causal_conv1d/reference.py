"""The convolution as a sum over explicit windows."""

import jax
import jax.numpy as jnp

from hax_jax.ops.numerics import blocks, wide


def causal_conv1d(x, weight, bias, segment_ids, mask, sizes):
    width, length = weight.shape[0], x.shape[1]
    dtype = wide(x.dtype, weight.dtype)
    outputs = []
    for t in range(length):
        total = jnp.zeros((x.shape[0], x.shape[2]), dtype)
        for tap in range(width):
            source = t - width + 1 + tap
            if source < 0:
                continue
            term = x[:, source].astype(dtype) * weight[tap].astype(dtype)
            if mask is not None:
                term = jnp.where(mask[:, source, None], term, 0)
            if segment_ids is not None:
                term = jnp.where((segment_ids[:, source] == segment_ids[:, t])[:, None], term, 0)
            total = total + term
        outputs.append(total)
    y = jnp.stack(outputs, axis=1)
    y = y if bias is None else y + bias.astype(dtype)
    y = jax.nn.silu(y).astype(x.dtype)
    if mask is not None:
        y = jnp.where(mask[..., None], y, 0)
    return tuple(blocks(y, sizes))
