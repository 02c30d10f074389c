"""The recurrence a step at a time."""

import jax.numpy as jnp
from jax import lax

from hax_jax.ops import segments
from hax_jax.ops.numerics import wide
from hax_jax.ops.ssd.time_steps import time_steps


def ssd(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size, dt_bias=None):
    del chunk_size
    batch, length, heads, head_dim = x.shape
    dtype = wide(x.dtype, A.dtype)
    dt = time_steps(dt, dt_bias)
    x, dt, A, B, C = (array.astype(dtype) for array in (x, dt, A, B, C))
    B, C = (jnp.repeat(array, heads // array.shape[2], axis=2) for array in (B, C))
    reset = segments.starts(segments.as_array(segment_ids, (batch, length)))
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, B.shape[-1]), dtype)

    def step(state, inputs):
        x_t, dt_t, B_t, C_t, reset_t = inputs
        state = jnp.where(reset_t[:, None, None, None], 0, state)
        drive = (dt_t[..., None] * x_t)[..., None] * B_t[:, :, None, :]
        state = jnp.exp(dt_t * A)[..., None, None] * state + drive
        return state, (state * C_t[:, :, None, :]).sum(-1)

    time_first = tuple(jnp.moveaxis(array, 1, 0) for array in (x, dt, B, C, reset))
    state, y = lax.scan(step, initial_state.astype(dtype), time_first)
    y = jnp.moveaxis(y, 0, 1)
    return y if D is None else y + D.astype(dtype)[:, None] * x, state
