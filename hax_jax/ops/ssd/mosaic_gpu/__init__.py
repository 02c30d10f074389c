"""SSD as Mosaic GPU kernels, for NVIDIA GPUs of the Hopper generation.

Each direction is three kernels: the state every chunk leaves (or, backwards, the gradient it asks of the
state that enters it), the sum of those along the chunks, and the outputs (or gradients) of every chunk, all
chunks at once. Nothing is added up in an order that the hardware chooses.
"""

import functools

import jax
import jax.numpy as jnp

from hax_jax.ops import dispatch, segments
from hax_jax.ops.numerics import bfloat16_parts, pad_time
from hax_jax.ops.ssd.mosaic_gpu import backward, forward, states
from hax_jax.ops.ssd.mosaic_gpu.tiles import CHUNK, LOG2E, Tiles, choose_tiles, why_not
from hax_jax.ops.ssd.time_steps import time_steps


def ssd(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size, dt_bias=None):
    """`ops.ssd`; the kernels' chunks have 64 positions whatever `chunk_size` says."""
    dispatch.check_mosaic_gpu("ssd", why_not(x, A, B, C))
    return ssd_in_tiles(x, dt, A, B, C, D, initial_state, segment_ids, choose_tiles(x, B), dt_bias)


def ssd_in_tiles(x, dt, A, B, C, D, initial_state, segment_ids, tiles: Tiles, dt_bias=None):
    """`ssd` on whatever device there is: a Hopper GPU, or the interpreter."""
    batch, length, heads, p = x.shape
    n = B.shape[3]
    D = jnp.zeros(heads) if D is None else D
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, p, n), jnp.float32)

    ids = segments.as_array(segment_ids, (batch, length))
    x_rows, B_rows, C_rows = (array.reshape(batch, length, -1) for array in (x, B, C))
    single = lambda tree: jax.tree.map(lambda array: array.astype(jnp.float32), tree)  # noqa: E731
    dt, A, D, initial_state, dt_bias = single((dt, A, D, initial_state, dt_bias))
    # With short time steps D x is most of y, and the gradient of the decays needs y without it: taken off
    # again, it leaves its rounding, some 1e-5 of that gradient. That of bfloat16 inputs is far larger anyway.
    apart = tiles.planes > 1
    inside = jnp.zeros_like(D) if apart else D
    y, final = _ssd(x_rows, dt, A, B_rows, C_rows, inside, initial_state, _runs(ids), dt_bias, tiles)
    y = y.reshape(x.shape)
    return y + D[:, None] * x if apart else y, final


def _runs(ids):
    """(b, c, 64) float32: how many boundaries a chunk has had by each position; 0 goes on from before it."""
    boundary = pad_time(segments.starts(ids), CHUNK, value=False)
    return jnp.cumsum(boundary.reshape(ids.shape[0], -1, CHUNK), axis=-1).astype(jnp.float32)


def _planes(array, tiles: Tiles):
    return bfloat16_parts(pad_time(array, CHUNK), tiles.planes)


def _by_chunk(array):
    """(b, t, h) as (b, c, h, 64), with zeros at the end: where dt is 0 the state stays as it is."""
    batch, _, heads = array.shape
    array = pad_time(array, CHUNK)
    return jnp.swapaxes(array.reshape(batch, -1, CHUNK, heads), 2, 3)


def _vectors(dt, A, run):
    """What the kernels need of the decays, each (b, c, h, 64) float32.

    cum is the log2 of the decay from before the chunk to a position. What enters reaches a position by the
    factor `enter`, at the last one the decay of the chunk; what a position adds reaches the end of the chunk
    by the factor `leave`.
    """
    dt = _by_chunk(dt)
    cum = jnp.cumsum(dt * (A * LOG2E)[:, None], axis=-1)
    run, last = run[:, :, None], cum[..., -1:]
    enter = jnp.where(run == 0, jnp.exp2(cum), 0.0)
    leave = jnp.where(run == run[..., -1:], jnp.exp2(last - cum), 0.0)
    return dt, cum, enter, leave


@functools.partial(jax.custom_vjp, nondiff_argnums=(9,))
def _ssd(x, dt, A, B, C, D, initial_state, run, dt_bias, tiles):
    return _forward(x, dt, A, B, C, D, initial_state, run, dt_bias, tiles)[0]


def _forward(x, dt, A, B, C, D, initial_state, run, dt_bias, tiles):
    vectors = by_chunk, cum, enter, leave = _vectors(time_steps(dt, dt_bias), A, run)
    x, B, C = (_planes(array, tiles) for array in (x, B, C))
    left = states.chunk_states(x, leave * by_chunk, B, tiles.halved())
    before, final = states.carry_states(left, enter, initial_state, tiles, reverse=False)
    y = forward.outputs(x, B, C, before, D, cum, by_chunk, enter, run, tiles.halved())
    y = y[:, : dt.shape[1]]
    return (y, final), (x, A, B, C, D, vectors, run, before, y, dt_bias)


def _backward(tiles, residuals, cotangents):
    x, A, B, C, D, vectors, run, before, y, dt_bias = residuals
    by_chunk, cum, enter, leave = vectors
    dy, dfinal = cotangents
    dtype = jnp.bfloat16 if tiles.planes == 1 else jnp.float32
    # Rounded once, for all that follows: y dy and x dx have to cancel where nothing is carried.
    dy = dy.astype(dtype)
    dy_planes = _planes(dy, tiles)
    asked = states.chunk_states(dy_planes, enter, C, tiles.halved())
    after, dinitial = states.carry_states(asked, enter, dfinal, tiles, reverse=True)
    dx, dB, dC, direct, left, skip = backward.gradients(
        x, dy_planes, B, C, before, after, D, cum, by_chunk, enter, leave, run, tiles
    )

    # Every term of y_i but D x_i grows with exp(cum_i), every term with dt_j falls with exp(cum_j), and the
    # state a chunk leaves grows with the exponential of its last cum: what it kept of the state before, and
    # what it added. The last is summed from `left`, so that it cancels what `direct` holds of it.
    time = slice(dy.shape[1])
    by_head = (*dy.shape[:2], A.shape[0], tiles.head_dim)
    through_y = _by_chunk((y * dy.astype(jnp.float32)).reshape(by_head).sum(-1)) - D[:, None] * skip
    grown = through_y - by_chunk * direct
    decay = enter[..., -1]
    grown = grown.at[..., -1].add(decay * _overlap(before, after, decay.shape) + (by_chunk * left).sum(-1))
    dlog = jnp.flip(jnp.cumsum(jnp.flip(grown, -1), axis=-1), -1)
    ddt = direct + dlog * A[:, None]
    if dt_bias is not None:
        # The slope of the softplus, here and not around the op: it is in the order of time that `ddt` is in.
        ddt = ddt * -jnp.expm1(-by_chunk)
    # Sums over a chunk, then all of them over all chunks at once.
    of_heads = jnp.stack([array.sum(-1) for array in (dlog * by_chunk, skip, ddt)])
    dA, dD, dbias = of_heads.sum((1, 2))
    ddt = jnp.swapaxes(ddt, 2, 3).reshape(dy.shape[0], -1, A.shape[0])[:, time]
    dB, dC = (_sum_of_blocks(array, tiles)[:, time].astype(dtype) for array in (dB, dC))
    dbias = None if dt_bias is None else dbias
    return dx[:, time], ddt, dA, dB, dC, dD, dinitial, jnp.zeros_like(run), dbias


def _overlap(before, after, shape):
    """The products of states and their gradients, summed per chunk and head."""
    before, after = (array.astype(jnp.float32).sum(0) for array in (before, after))
    return (before * after).reshape(*shape, -1).sum(-1)


def _sum_of_blocks(array, tiles):
    """(k, b, t, n) for every block of heads as (b, t, g n)."""
    blocks, batch, time, n = array.shape
    groups = blocks * tiles.heads // tiles.heads_per_group
    array = array.reshape(groups, -1, batch, time, n).sum(1)
    return jnp.moveaxis(array, 0, 2).reshape(batch, time, groups * n)


_ssd.defvjp(_forward, _backward)
