"""The recurrence as matrix products inside chunks and an associative scan between them.

Inside a chunk, position i receives exp(sum_{j < m <= i} dt_m A) dt_j (C_i . B_j) x_j from every j <= i: a
masked product of tiles. What a chunk leaves behind is one state, and states combine associatively.
"""

import jax.numpy as jnp
from jax import lax

from hax_jax.ops import segments
from hax_jax.ops.numerics import einsum, pad_time, wide
from hax_jax.ops.ssd.time_steps import time_steps


def ssd(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size, dt_bias=None):
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    per_group = heads // groups
    dtype, matmul_dtype = wide(x.dtype, A.dtype), x.dtype
    chunk_size = min(chunk_size, length)
    ids = segments.as_array(segment_ids, (batch, length))

    def chunks(array, *shape, edge=False):
        # Padded positions have dt = 0, so they leave the state as it is; their segment is the last one.
        if edge:
            array = jnp.pad(array, ((0, 0), (0, -length % chunk_size)), mode="edge")
        return pad_time(array, chunk_size).reshape(batch, -1, chunk_size, *shape)

    inputs, x = x, chunks(x, groups, per_group, head_dim)
    dt = chunks(time_steps(dt, dt_bias).astype(dtype), groups, per_group)
    B, C = chunks(B, groups, state_size), chunks(C, groups, state_size)
    ids = chunks(ids, edge=True)

    # log_decay[i] = sum of dt A over the chunk's positions up to and including i.
    log_decay = jnp.cumsum(dt * A.astype(dtype).reshape(groups, per_group), axis=2)
    last = log_decay[:, :, -1:]

    y = _within_chunks(x, dt, B, C, log_decay, ids, matmul_dtype)

    # The state that a chunk leaves, from the positions of its last segment only.
    weight = jnp.exp(last - log_decay) * dt
    weight = jnp.where((ids == ids[:, :, -1:])[..., None, None], weight, 0)
    weighted = (x.astype(dtype) * weight[..., None]).astype(matmul_dtype)
    left_by_chunk = einsum("bcsgrp,bcsgn->bcgrpn", weighted, B)

    # The segment that the state entering a chunk belongs to: that of the position before it.
    entering = jnp.concatenate([ids[:, :1, 0], ids[:, :-1, -1]], axis=1)
    survives = (entering == ids[:, :, -1])[..., None, None]
    chunk_decay = jnp.where(survives, jnp.exp(last[:, :, 0]), 0)
    before, final = _between_chunks(chunk_decay, left_by_chunk, initial_state, dtype)

    from_before = einsum("bctgn,bcgrpn->bctgrp", C, before.astype(matmul_dtype))
    reach = jnp.where((ids == entering[:, :, None])[..., None, None], jnp.exp(log_decay), 0)
    y = y + from_before * reach[..., None]
    y = y.reshape(batch, -1, heads, head_dim)[:, :length]
    if D is not None:
        y = y + D.astype(dtype)[:, None] * inputs
    return y, final


def _within_chunks(x, dt, B, C, log_decay, ids, matmul_dtype):
    chunk_size = x.shape[2]
    scores = einsum("bctgn,bcsgn->bcgts", C, B)
    visible = jnp.tril(jnp.ones((chunk_size, chunk_size), bool)) & (ids[:, :, :, None] == ids[:, :, None, :])
    by_head = jnp.moveaxis(log_decay, 2, -1)
    # The exponent is masked, not the exponential: above the diagonal it grows without bound.
    exponent = by_head[..., :, None] - by_head[..., None, :]
    decay = jnp.exp(jnp.where(visible[:, :, None, None], exponent, -jnp.inf))
    weights = scores[:, :, :, None] * decay * jnp.moveaxis(dt, 2, -1)[..., None, :]
    return einsum("bcgrts,bcsgrp->bctgrp", weights.astype(matmul_dtype), x)


def _between_chunks(chunk_decay, left_by_chunk, initial_state, dtype):
    """States entering each chunk (b, c, g, r, p, n), and the one after the last (b, h, p, n)."""
    batch, _, groups, per_group, head_dim, state_size = left_by_chunk.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, groups * per_group, head_dim, state_size), dtype)
    first = initial_state.astype(dtype).reshape(batch, 1, groups, per_group, head_dim, state_size)

    def combine(left, right):
        left_decay, left_state = left
        right_decay, right_state = right
        return left_decay * right_decay, right_decay * left_state + right_state

    decay = jnp.concatenate([jnp.ones_like(chunk_decay[:, :1]), chunk_decay], axis=1)[..., None, None]
    states = jnp.concatenate([first, left_by_chunk], axis=1)
    _, states = lax.associative_scan(combine, (decay, states), axis=1)
    return states[:, :-1], states[:, -1].reshape(batch, groups * per_group, head_dim, state_size)
