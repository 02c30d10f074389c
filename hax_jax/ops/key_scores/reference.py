"""The formula."""

import jax
import jax.numpy as jnp

from hax_jax.ops.numerics import einsum, wide


def key_scores(k, summary, w1, b1, w2, b2, w3, b3):
    arrays = (k, summary, w1, b1, w2, b2, w3, b3)
    dtype = wide(*(array.dtype for array in arrays))
    k, summary, w1, b1, w2, b2, w3, b3 = (array.astype(dtype) for array in arrays)
    x = jnp.concatenate([k, summary], axis=-1)
    x = jax.nn.relu(einsum("bti,if->btf", x, w1) + b1)
    x = jax.nn.relu(einsum("btf,fg->btg", x, w2) + b2)
    return (einsum("btf,fo->bto", x, w3) + b3)[..., 0]
