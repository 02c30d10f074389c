"""Linear map and embedding with the project's precision rules."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hax_jax.layers import initializers
from hax_jax.layers.precision import Precision
from hax_jax.ops import devices
from hax_jax.ops.numerics import blocks, einsum, wide

# A gradient of W summed over at least so many positions is summed in so many parts side by side.
_MANY_POSITIONS, _MOST_PARTS = 1 << 13, 64
# A W of no more columns than this is multiplied with column by column in the gradient of x.
_NARROW = 8
# A table of more rows than this has its gradient scattered: few tokens share a row, and a 0/1 row is long.
_FEW_ROWS = 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, "*batch i"], kernel: Float[Array, "i o"], dtype: Any) -> Float[Array, "*batch o"]:
    """x W with the factors of this product, and of those in its gradients, rounded to `dtype`.

    Left to itself, differentiation would multiply a float32 gradient with a bfloat16 factor, which a GPU does
    in float32 without tensor cores, and then round the gradient of W to bfloat16. Here gradients are rounded
    before they are multiplied, as x and W are, and what is summed up stays at least float32.

    Args:
      x: (..., i); what the gradient keeps of it is rounded to `dtype`.
      kernel: (i, o), W.
      dtype: of the factors.

    Returns:
      (..., o), at least float32.
    """
    return einsum("...i,io->...o", x.astype(dtype), kernel.astype(dtype))


def _matmul_forward(x, kernel, dtype):
    rounded = x.astype(dtype)
    # An empty array remembers the dtype that the gradient has to have.
    return einsum("...i,io->...o", rounded, kernel.astype(dtype)), (rounded, kernel, jnp.empty(0, x.dtype))


def _matmul_backward(dtype, saved, d_y):
    x, kernel, like = saved
    d_x, d_kernel = _gradients(x, kernel, d_y, dtype)
    return d_x.astype(like.dtype), d_kernel.astype(kernel.dtype)


def _gradients(x, kernel, d_y, dtype):
    """Those of x (rounded to `dtype`) and W, at least float32."""
    d_y, kernel = d_y.astype(dtype), kernel.astype(dtype)
    if kernel.shape[1] > _NARROW:
        d_x = einsum("...o,io->...i", d_y, kernel)
    else:
        # Left to what reads it: a product would be written, and read as a whole to be added to others.
        d_y_wide, kernel = (array.astype(wide(array.dtype)) for array in (d_y, kernel))
        d_x = sum(d_y_wide[..., i : i + 1] * kernel[:, i] for i in range(kernel.shape[1]))
    return d_x, _sum_of_products(x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def split_matmul(
    x: Float[Array, "*batch i"], kernel: Float[Array, "i o"], sizes: tuple[int, ...], dtype: Any
) -> tuple[Float[Array, "*batch p"], ...]:
    """`matmul`, its columns in blocks of these sizes, each an array of its own.

    Kernels take whole arrays: a block of the columns of one product would be copied for them.
    """
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    # Behind a barrier the compiler does not see that the products share a factor, and leaves them apart.
    factors = jax.lax.optimization_barrier((x,) * len(sizes))
    return tuple(
        einsum("...i,io->...o", factor, block)
        for factor, block in zip(factors, blocks(kernel, sizes), strict=True)
    )


def _split_matmul_forward(x, kernel, sizes, dtype):
    saved = x.astype(dtype), kernel, jnp.empty(0, x.dtype)
    return split_matmul(x, kernel, sizes, dtype), saved


def _split_matmul_backward(sizes, dtype, saved, d_blocks):
    """Block by block: their gradients come at different times, and none is made to wait for another's."""
    x, kernel, like = saved
    d_x: Any = 0
    d_kernels = []
    factors = jax.lax.optimization_barrier((x,) * len(sizes))
    for factor, block, d_block in zip(factors, blocks(kernel, sizes), d_blocks, strict=True):
        part, d_kernel = _gradients(factor, block, d_block, dtype)
        d_x += part
        d_kernels.append(d_kernel)
    d_kernel = jnp.concatenate(d_kernels, axis=1)
    return d_x.astype(like.dtype), d_kernel.astype(kernel.dtype)


split_matmul.defvjp(_split_matmul_forward, _split_matmul_backward)


def _sum_of_products(x, d_y):
    """x^T d_y for x (m, i) and d_y (m, o), at least float32."""
    # Of each device: those of all of them together would leave a device fewer and longer parts.
    shards = devices.count()
    positions = x.shape[0] // shards
    parts = math.gcd(positions, _MOST_PARTS)
    if x.shape[0] % shards or positions < _MANY_POSITIONS or parts < _MOST_PARTS // 8:
        return einsum("mi,mo->io", x, d_y)
    # A small W is a few tiles, and a GPU has many processors. Left to itself, XLA divides the sum too, but
    # copies both factors first where its parts do not divide the positions.
    x, d_y = (array.reshape(parts * shards, -1, array.shape[1]) for array in (x, d_y))
    return einsum("pmi,pmo->pio", x, d_y).sum(axis=0)


matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: Float[Array, "v d"], tokens: Int[Array, "b t"], dtype: Any) -> Float[Array, "b t d"]:
    """The rows of a table that tokens name.

    Its gradient is a product of 0/1 rows with the gradient rounded to `dtype`, row by row of the batch and
    then added up: the scatter that differentiation would make adds thousands of vectors to each of a few
    places, one after the other and on a GPU in any order. Memory of the gradient grows as b t v.
    """
    del dtype
    return jnp.take(table, tokens, axis=0)


def _lookup_forward(table, tokens, dtype):
    return lookup(table, tokens, dtype), (tokens, jnp.empty((table.shape[0], 0), table.dtype))


def _lookup_backward(dtype, saved, d_y):
    tokens, like = saved
    named = jax.nn.one_hot(tokens, like.shape[0], dtype=dtype)
    # In this order: with the factors the other way round, members of a population that share their tokens
    # come to a bfloat16 product that XLA cannot do on a CPU.
    d_table = einsum("btd,btv->bdv", d_y.astype(dtype), named).sum(axis=0).T
    return d_table.astype(like.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


class Linear(nnx.Module):
    """y = x W + bias, with W (in, out).

    Args:
      in_size, out_size: widths.
      scale: standard deviation of the initial W; the bias starts at 0.
      use_bias: whether there is a bias.
      kernel_bound: if given, W starts uniform in +-bound instead.
      inner: whether what it returns stays inside of a mixer (`Precision.inner`).
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
        inner: bool = False,
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
        self.dtype = precision.inner if inner else precision.activation

    @jax.named_scope("linear")
    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        y = matmul(x, self.kernel[...], self.precision.matmul)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y.astype(self.dtype)

    @jax.named_scope("linear")
    def split(self, x: Float[Array, "*batch i"], *sizes: int) -> tuple[Float[Array, "*batch p"], ...]:
        """x W of a map without a bias, by blocks of columns of these sizes; at least float32."""
        assert self.bias is None
        return split_matmul(x, self.kernel[...], sizes, self.precision.matmul)


class Embedding(nnx.Module):
    """Token vectors, and the logits that the same vectors give when used as output layer (`attend`)."""

    def __init__(self, vocab_size: int, size: int, *, scale: float, precision: Precision, rngs: nnx.Rngs):
        self.embedding = nnx.Param(
            initializers.normal(rngs.params(), (vocab_size, size), scale, precision.param)
        )
        self.precision = precision

    @jax.named_scope("embedding")
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        table = self.embedding[...]
        if table.shape[0] <= _FEW_ROWS:
            vectors = lookup(table, tokens, self.precision.matmul)
        else:
            vectors = jnp.take(table, tokens, axis=0)
        return vectors.astype(self.precision.activation)

    @jax.named_scope("head")
    def attend(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """x times the transposed embedding, at least float32."""
        return matmul(x, self.embedding[...].T, self.precision.matmul)
