"""Orders of positions by integer keys, on the sort that is fastest for the length."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Integer

# XLA sorts short rows in one kernel whatever the number of keys. Long ones by one key after the other: a pair
# of key and value is what its GPU library's radix sort takes, many times faster than a comparison sort.
MIN_LENGTH_OF_RADIX = 4096


def stable_order(*keys: Integer[Array, "b t"]) -> Int[Array, "b t"]:
    """The positions of each row in order of their keys, the first key first, ties in order of position.

    Args:
      keys: (b, t) int32 or uint32 each.

    Returns:
      (b, t) int32, a permutation of 0..t - 1 in each row.
    """
    batch, length = keys[0].shape
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if length < MIN_LENGTH_OF_RADIX:
        return lax.sort((*keys, position), dimension=1, num_keys=len(keys) + 1)[-1]
    order = jnp.arange(batch * length, dtype=jnp.int32)
    row = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], (batch, length))
    sorted_by = [*reversed(keys), row] if batch > 1 else list(reversed(keys))
    for number, key in enumerate(sorted_by):
        key = key.reshape(-1)
        key = key if number == 0 else key[order]
        # Stable: what earlier, less significant keys have ordered stays so among equal ones.
        _, order = lax.sort((key, order), num_keys=1, is_stable=True)
    return order.reshape(batch, length) - length * row


def descending(x: Float[Array, "*shape"]) -> jax.Array:
    """Unsigned integers whose ascending order is the descending order of x; the two zeros are equal.

    Args:
      x: any float dtype, no NaN.

    Returns:
      uint32 of the same shape; uint64 for float64.
    """
    x = jnp.where(x == 0, 0, x)
    x, unsigned, width = (
        (x, jnp.uint64, 64) if x.dtype == jnp.float64 else (x.astype(jnp.float32), jnp.uint32, 32)
    )
    bits = lax.bitcast_convert_type(x, unsigned)
    # Among negative numbers larger bits are smaller numbers, so those descend already.
    return jnp.where(bits >> (width - 1) == 0, (1 << (width - 1)) - 1 - bits, bits)
