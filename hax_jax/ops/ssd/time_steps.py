"""The time steps of the recurrence from what a projection gives."""

import jax

from hax_jax.ops.numerics import wide


def time_steps(dt, bias):
    """softplus(dt + bias), at least float32; dt itself where `bias` is None."""
    if bias is None:
        return dt
    dtype = wide(dt.dtype, bias.dtype)
    return jax.nn.softplus(dt.astype(dtype) + bias.astype(dtype))
