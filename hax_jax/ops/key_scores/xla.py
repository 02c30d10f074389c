"""Three products, each layer rounded to the dtype that the next one multiplies."""

import jax
import jax.numpy as jnp

from hax_jax.ops.numerics import einsum


def key_scores(k, summary, w1, b1, w2, b2, w3, b3):
    def layer(x, weight, bias):
        y = einsum("...i,io->...o", x, weight.astype(k.dtype))
        return y + bias.astype(y.dtype)

    x = jnp.concatenate([k, summary.astype(k.dtype)], axis=-1)
    for weight, bias in ((w1, b1), (w2, b2)):
        x = jax.nn.relu(layer(x, weight, bias).astype(k.dtype))
    return layer(x, w3, b3)[..., 0]
