"""The recurrence a step at a time."""

import jax
import jax.numpy as jnp
from jax import lax

from hax_jax.ops import segments
from hax_jax.ops.numerics import wide


def selective_scan(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size, softplus):
    del chunk_size
    dtype = wide(x.dtype, A.dtype)
    x, dt, A, B, C = (array.astype(dtype) for array in (x, dt, A, B, C))
    dt = jax.nn.softplus(dt) if softplus else dt
    reset = segments.starts(segments.as_array(segment_ids, x.shape[:2]))
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *A.shape), dtype)

    def step(state, inputs):
        x_t, dt_t, B_t, C_t, reset_t = inputs
        state = jnp.where(reset_t[:, None, None], 0, state)
        state = jnp.exp(dt_t[..., None] * A) * state + (dt_t * x_t)[..., None] * B_t[:, None, :]
        return state, (state * C_t[:, None, :]).sum(-1)

    time_first = tuple(jnp.moveaxis(array, 1, 0) for array in (x, dt, B, C, reset))
    state, y = lax.scan(step, initial_state.astype(dtype), time_first)
    y = jnp.moveaxis(y, 0, 1)
    return y if D is None else y + D.astype(dtype) * x, state
