"""Linear map and embedding with the project's precision rules."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hax_jax.layers import initializers
from hax_jax.layers.precision import Precision
from hax_jax.ops.numerics import einsum


class Linear(nnx.Module):
    """y = x W + bias, with W (in, out).

    Args:
      in_size, out_size: widths.
      scale: standard deviation of the initial W; the bias starts at 0.
      use_bias: whether there is a bias.
      kernel_bound: if given, W starts uniform in +-bound instead.
      precision: dtypes; products accumulate in at least float32.
      rngs: `rngs.params()` gives the initial values' key.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        scale: float = 0.0,
        use_bias: bool = False,
        kernel_bound: float | None = None,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        shape = (in_size, out_size)
        if kernel_bound is None:
            kernel = initializers.normal(rngs.params(), shape, scale, precision.param)
        else:
            kernel = initializers.uniform(rngs.params(), shape, kernel_bound, precision.param)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(out_size, precision.param)) if use_bias else None
        self.precision = precision

    @jax.named_scope("linear")
    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        matmul = self.precision.matmul
        y = einsum("...i,io->...o", x.astype(matmul), self.kernel[...].astype(matmul))
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y.astype(self.precision.activation)


class Embedding(nnx.Module):
    """Token vectors, and the logits that the same vectors give when used as output layer (`attend`)."""

    def __init__(self, vocab_size: int, size: int, *, scale: float, precision: Precision, rngs: nnx.Rngs):
        self.embedding = nnx.Param(
            initializers.normal(rngs.params(), (vocab_size, size), scale, precision.param)
        )
        self.precision = precision

    @jax.named_scope("embedding")
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        return jnp.take(self.embedding[...], tokens, axis=0).astype(self.precision.activation)

    @jax.named_scope("head")
    def attend(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """x times the transposed embedding, at least float32."""
        matmul = self.precision.matmul
        return einsum("btd,vd->btv", x.astype(matmul), self.embedding[...].astype(matmul))
