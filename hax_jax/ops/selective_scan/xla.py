"""The recurrence in chunks: `lax.associative_scan` inside a chunk, a sequential scan over chunks.

An associative scan over the whole length would write (b, t, e, n) several times over. Here only one chunk
of that size exists at a time, and the backward pass computes it again from the state that entered it.
"""

import jax
import jax.numpy as jnp
from jax import lax

from hax_jax.ops import segments
from hax_jax.ops.numerics import pad_time, wide


def _combine(left, right):
    """Composes two steps h -> decay h + drive, `left` first."""
    left_decay, left_drive = left
    right_decay, right_drive = right
    return left_decay * right_decay, right_decay * left_drive + right_drive


def selective_scan(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size, softplus):
    batch, length, _ = x.shape
    dtype = wide(x.dtype, A.dtype)
    A = A.astype(dtype)
    dt = jax.nn.softplus(dt.astype(dtype)) if softplus else dt
    chunk_size = min(chunk_size, length)
    keep = ~segments.starts(segments.as_array(segment_ids, x.shape[:2]))
    if initial_state is None:
        initial_state = jnp.zeros((batch, *A.shape), dtype)

    @jax.checkpoint
    def chunk(state, inputs):
        x_c, dt_c, B_c, C_c, keep_c = inputs
        decay = jnp.exp(dt_c[..., None] * A) * keep_c[..., None, None]
        drive = (dt_c * x_c)[..., None] * B_c[:, :, None, :]
        drive = drive.at[:, 0].add(decay[:, 0] * state)
        _, states = lax.associative_scan(_combine, (decay, drive), axis=1)
        return states[:, -1], (states * C_c[:, :, None, :]).sum(-1)

    def chunks(array, value=0):
        array = pad_time(array.astype(dtype), chunk_size, value=value)
        return jnp.moveaxis(array.reshape(batch, -1, chunk_size, *array.shape[2:]), 1, 0)

    # A padded position has dt = 0 and keeps the state: the last state is that of the last real position.
    inputs = (*(chunks(array) for array in (x, dt, B, C)), chunks(keep, value=1))
    state, y = lax.scan(chunk, initial_state.astype(dtype), inputs)
    y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, x.shape[2])[:, :length]
    return y if D is None else y + D.astype(dtype) * x, state
