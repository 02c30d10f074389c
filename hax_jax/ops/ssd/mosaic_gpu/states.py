"""Kernels for what passes between chunks: the state each chunk leaves, and the sum of those before it."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops.numerics import split
from hax_jax.ops.ssd.mosaic_gpu.tiles import (
    CHUNK,
    ROW,
    Tiles,
    down,
    fetch_vectors,
    load,
    load_planes,
    params,
    tile,
    vectors,
)

# Chunks whose states one program of `carry_states` has in flight.
_AT_ONCE = 8


def chunk_states(x, weight, B, tiles: Tiles):
    """sum over a chunk's positions of weight x B^T, per head.

    x (planes, b, t, h p) and B (planes, b, t, g n) as bfloat16 planes, weight (b, c, h, 64) float32;
    returns (b, c, h p, n) float32.
    """
    batch, chunks, heads, _ = weight.shape
    p, n, block = tiles.head_dim, tiles.state_size, tiles.heads
    planes, width = tiles.planes, tiles.heads * tiles.head_dim
    of_heads_sm = vectors(tiles, 1)

    def ssd_chunk_states(x_ref, weight_ref, B_ref, out_ref, x_sm, B_sm, weighted_sm, *scratch):
        *weight_sm, loaded = scratch
        b, c, k = (lax.axis_index(name) for name in ("b", "c", "k"))
        time, columns = pl.ds(c * CHUNK, CHUNK), pl.ds(k * width, width)
        group = pl.ds((k * block // tiles.heads_per_group) * n, n)
        for plane in range(planes):
            plgpu.copy_gmem_to_smem(x_ref.at[plane, b, time, columns], x_sm.at[plane], loaded)
            plgpu.copy_gmem_to_smem(B_ref.at[plane, b, time, group], B_sm.at[plane], loaded)
        (weights,) = fetch_vectors([weight_ref], weight_sm, loaded, tiles, b, c, k)
        plgpu.barrier_wait(loaded)
        for head in range(block):
            here = pl.ds(head * p, p)
            w = load(weights.at[head], ROW)
            for plane, part in enumerate(split(load_planes(x_sm, here) * down(w, (CHUNK, p)), planes)):
                weighted_sm[plane, :, here] = part
        plgpu.commit_smem()

        def product(acc):
            for i, j in tiles.plane_pairs:
                plgpu.wgmma(acc, weighted_sm.at[i].transpose((1, 0)), B_sm.at[j])
            return acc[...]

        out_ref[b, c, columns] = pl.run_scoped(product, plgpu.ACC((width, n), jnp.float32))

    return plgpu.kernel(
        ssd_chunk_states,
        out_type=jax.ShapeDtypeStruct((batch, chunks, heads * p, n), jnp.float32),
        scratch_types=[
            tile(tiles, CHUNK, width),
            tile(tiles, CHUNK, n),
            tile(tiles, CHUNK, width),
            *of_heads_sm,
            plgpu.Barrier(num_arrivals=2 * planes + len(of_heads_sm)),
        ],
        grid=(batch, chunks, heads // block),
        grid_names=("b", "c", "k"),
        compiler_params=params(),
    )(x, weight, B)


def carry_states(states, enter, first, tiles: Tiles, *, reverse: bool):
    """The state that enters each chunk, and the one after the last.

    before_c = S, then S = decay_c S + states_c, along the chunks or, with `reverse`, against them; decay_c is
    what `enter` is at the chunk's last position.

    states (b, c, h p, n) float32, enter (b, c, h, 64) float32, first (b, h, p, n) float32; returns
    before (planes, b, c, h p, n) as bfloat16 planes, and the last S (b, h, p, n) float32.
    """
    batch, chunks, width, n = states.shape
    heads = enter.shape[2]
    size = width * n // heads
    block = next(size for size in (512, 256, 128) if (width * n // heads) % size == 0)
    layout = plgpu.Layout.WG_STRIDED((block,), vec_size=block // 128)

    def ssd_carry_states(states_ref, enter_ref, first_ref, before_ref, last_ref):
        b, h = lax.axis_index("b"), lax.axis_index("h")
        here = pl.ds(lax.axis_index("k") * block, block)

        def steps(start, count, state):
            # All loads before the first store: they do not wait for one another.
            order = [chunks - 1 - start - i if reverse else start + i for i in range(count)]
            new = [load(states_ref.at[b, c, h, here], layout) for c in order]
            for c, left in zip(order, new, strict=True):
                for plane, part in enumerate(split(state, tiles.planes)):
                    before_ref[plane, b, c, h, here] = part
                state = enter_ref[b, c, h, CHUNK - 1] * state + left
            return state

        state = load(first_ref.at[b, h, here], layout)
        whole, rest = divmod(chunks, _AT_ONCE)
        state = lax.fori_loop(0, whole, lambda i, state: steps(i * _AT_ONCE, _AT_ONCE, state), state)
        last_ref[b, h, here] = steps(whole * _AT_ONCE, rest, state)

    before, last = plgpu.kernel(
        ssd_carry_states,
        out_type=[
            jax.ShapeDtypeStruct((tiles.planes, batch, chunks, heads, size), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, heads, size), jnp.float32),
        ],
        grid=(batch, heads, size // block),
        grid_names=("b", "h", "k"),
        compiler_params=params(),
    )(states.reshape(batch, chunks, heads, size), enter, first.reshape(batch, heads, size))
    return before.reshape(tiles.planes, batch, chunks, width, n), last.reshape(first.shape)
