"""Two rules of arithmetic that every op keeps.

Products accumulate in float32 at least, whatever the inputs' dtype, and float32 inputs are never rounded
to TF32 on the way (a GPU's default), so that float32 means float32 everywhere.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def wide(*dtypes: jnp.dtype) -> jnp.dtype:
    """The dtype that recurrences, softmax and losses use for inputs of these dtypes: at least float32."""
    return jnp.result_type(jnp.float32, *dtypes)


def einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    """`jnp.einsum` that accumulates in, and returns, at least float32."""
    return jnp.einsum(
        subscripts,
        *operands,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=wide(*(x.dtype for x in operands)),
    )


def blocks(x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Blocks of the last axis, of so many each."""
    return jnp.split(x, list(itertools.accumulate(sizes))[:-1], axis=-1)


def pad_time(x: jax.Array, multiple: int, axis: int = 1, value: float = 0) -> jax.Array:
    """Pads the end of the time axis with `value` up to a multiple of `multiple`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)


def bfloat16_parts(x: jax.Array, count: int) -> jax.Array:
    """Splits float32 x into `count` bfloat16 arrays (count, ...) whose sum it is; three hold all 24 bits.

    What a kernel multiplies exactly on matrix units that take bfloat16. For use outside a kernel, as `split`
    is for use inside.
    """
    if count == 1:
        return x.astype(jnp.bfloat16)[None]
    parts = []
    for _ in range(count):
        # Not a cast there and back: under jit XLA takes that for nothing on a GPU, and all later parts for 0.
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return jnp.stack(parts)


def split(x: jax.Array, count: int) -> list[jax.Array]:
    """As `bfloat16_parts`, as a list; for use inside a kernel, where a cast is a cast."""
    parts: list[jax.Array] = []
    for _ in range(count):
        if parts:
            x = x - parts[-1].astype(jnp.float32)
        parts.append(x.astype(jnp.bfloat16))
    return parts
