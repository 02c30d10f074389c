"""Sums of rows that share a key, always in the same order: what a scatter-add with atomics is not."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from hax_jax.ops.numerics import einsum

BLOCK = 32


def sum_of_runs(
    rows: Float[Array, "*h p f"], keys: Int[Array, " p"], first: Int[Array, " m"]
) -> Float[Array, "*h m f"]:
    """Adds up runs of rows with equal keys.

    out_m = sum of the rows from first_m to the end of the run that begins there; zeros where first_m = p.

    Blocks of rows are summed by one small triangular matrix each; what a run leaves in the next blocks comes
    by a scan over blocks. So a run of any length costs what many short ones cost.

    Args:
      rows: (..., p, f) at least float32.
      keys: (p,) int32, equal ones next to each other.
      first: (m,) int32, the first row of a run each, or p.

    Returns:
      (..., m, f). Memory grows as p f.
    """
    lead, (num_rows, width) = rows.shape[:-2], rows.shape[-2:]
    padding = -num_rows % BLOCK
    num_blocks = (num_rows + padding) // BLOCK
    rows = jnp.pad(rows, [(0, 0)] * len(lead) + [(0, padding), (0, 0)])
    rows = rows.reshape(*lead, num_blocks, BLOCK, width)
    # Filler keys begin no run that anybody asks for.
    keys = jnp.pad(keys, (0, padding), mode="edge").reshape(num_blocks, BLOCK)
    index = jnp.arange(BLOCK)
    within = (keys[:, :, None] == keys[:, None, :]) & (index[:, None] <= index)
    partial = einsum("crs,...csf->...crf", within.astype(rows.dtype), rows)

    # rest_c: what the run that is going on at the end of block c still gets from later blocks.
    goes_on = jnp.pad(keys[1:, 0] == keys[:-1, -1], (0, 1))
    whole = jnp.pad(keys[1:, 0] == keys[1:, -1], (0, 1))
    following = jnp.concatenate([partial[..., 1:, 0, :], jnp.zeros_like(partial[..., :1, 0, :])], axis=-2)
    following = jnp.where(goes_on[:, None], following, 0)
    passes = (goes_on & whole)[:, None]

    def combine(later, earlier):
        later_sum, later_passes = later
        earlier_sum, earlier_passes = earlier
        return earlier_sum + jnp.where(earlier_passes, later_sum, 0), later_passes & earlier_passes

    passes = jnp.broadcast_to(passes, following.shape)
    rest, _ = lax.associative_scan(combine, (following, passes), reverse=True, axis=following.ndim - 2)
    at_end = keys == keys[:, -1:]
    total = partial + jnp.where(at_end[:, :, None], rest[..., None, :], 0)
    total = total.reshape(*lead, num_blocks * BLOCK, width)
    exists = first < num_rows
    return jnp.where(exists[:, None], total[..., jnp.where(exists, first, 0), :], 0)
