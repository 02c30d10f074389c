"""The kernel that writes the outputs of a chunk."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops.numerics import split
from hax_jax.ops.ssd.mosaic_gpu.tiles import (
    CHUNK,
    COLUMN,
    ROW,
    Tiles,
    across,
    down,
    fetch_vectors,
    load,
    load_planes,
    params,
    swizzled,
    tile,
    vectors,
    visible,
)


def outputs(x, B, C, before, D, cum, dt, enter, run, tiles: Tiles):
    """y_i = sum_{j <= i} 2^(cum_i - cum_j) dt_j (C_i . B_j) x_j + enter_i before C_i + D x_i, for one chunk.

    x (planes, b, t, h p), B and C (planes, b, t, g n), before (planes, b, c, h p, n) as bfloat16 planes;
    D (h,), cum, dt and enter (b, c, h, 64), run (b, c, 64) float32.
    Returns y (b, length, h p) float32.
    """
    batch, chunks, heads, _ = cum.shape
    p, n, block = tiles.head_dim, tiles.state_size, tiles.heads
    planes, width = tiles.planes, block * p
    of_heads_sm = vectors(tiles, 3)
    # Swizzled tiles hold 8 positions: only rows of a multiple of 8 can be written from them. Plain tiles have
    # fewer bank conflicts when they are narrow.
    by_head = bool(tiles.length % 8)
    if by_head:
        y_tile = plgpu.SMEM((block, CHUNK, p), jnp.float32)
    else:
        y_tile = swizzled((CHUNK, width), jnp.float32, min(128, 2 * tiles.swizzle))

    def ssd_outputs(
        x_ref, B_ref, C_ref, before_ref, D_ref, cum_ref, dt_ref, enter_ref, run_ref, y_ref, *scratch
    ):
        x_sm, B_sm, C_sm, before_sm, y_sm, *vectors_sm, loaded = scratch
        b, c, k = (lax.axis_index(name) for name in ("b", "c", "k"))
        time, columns = pl.ds(c * CHUNK, CHUNK), pl.ds(k * width, width)
        group = pl.ds((k * block // tiles.heads_per_group) * n, n)
        for plane in range(planes):
            plgpu.copy_gmem_to_smem(B_ref.at[plane, b, time, group], B_sm.at[plane], loaded)
            plgpu.copy_gmem_to_smem(C_ref.at[plane, b, time, group], C_sm.at[plane], loaded)
            plgpu.copy_gmem_to_smem(x_ref.at[plane, b, time, columns], x_sm.at[plane], loaded)
            plgpu.copy_gmem_to_smem(before_ref.at[plane, b, c, columns], before_sm.at[plane], loaded)
        of_heads = fetch_vectors([cum_ref, dt_ref, enter_ref], vectors_sm, loaded, tiles, b, c, k)
        seen = visible(run_ref.at[b, c])
        plgpu.barrier_wait(loaded)

        def scores(acc):
            for i, j in tiles.plane_pairs:
                plgpu.wgmma(acc, C_sm.at[i], B_sm.at[j].transpose((1, 0)))
            return acc[...]

        S = jnp.where(seen, pl.run_scoped(scores, plgpu.ACC((CHUNK, CHUNK), jnp.float32)), 0.0)

        def one_head(head, _):
            here = pl.ds(head * p, p)
            of_head = [ref.at[head] for ref in of_heads]
            y = _head(S, here, (x_sm, C_sm, before_sm, *of_head), tiles)
            y = y + D_ref[k * block + head] * load_planes(x_sm, here)
            if by_head:
                y_sm[head] = y
            else:
                y_sm[:, here] = y

        lax.fori_loop(0, block, one_head, None, unroll=tiles.unroll)
        plgpu.commit_smem()
        for head in range(block if by_head else 0):
            here = pl.ds(k * width + head * p, p)
            plgpu.copy_smem_to_gmem(y_sm.at[head], y_ref.at[b, time, here])
        if not by_head:
            plgpu.copy_smem_to_gmem(y_sm, y_ref.at[b, time, columns])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        ssd_outputs,
        out_type=jax.ShapeDtypeStruct((batch, tiles.length, heads * p), jnp.float32),
        scratch_types=[
            tile(tiles, CHUNK, width),
            tile(tiles, CHUNK, n),
            tile(tiles, CHUNK, n),
            tile(tiles, width, n),
            y_tile,
            *of_heads_sm,
            plgpu.Barrier(num_arrivals=4 * planes + len(of_heads_sm)),
        ],
        grid=(batch, chunks, heads // block),
        grid_names=("b", "c", "k"),
        compiler_params=params(),
    )(x, B, C, before, D, cum, dt, enter, run)


def _head(S, here, of_head, tiles):
    """y of one head (64, p)."""
    x_sm, C_sm, before_sm, cum_ref, dt_ref, enter_ref = of_head
    square, rows = (CHUNK, CHUNK), (CHUNK, tiles.head_dim)

    def products(from_before, within):
        for i, j in tiles.plane_pairs:
            plgpu.wgmma(from_before, C_sm.at[i], before_sm.at[j, here].transpose((1, 0)))
        exponent = down(load(cum_ref, ROW), square) - across(load(cum_ref, COLUMN), square)
        # Where it is above zero S is zero.
        decay = jnp.exp2(jnp.minimum(exponent, 0.0))
        weights = split(S * decay * across(load(dt_ref, COLUMN), square), tiles.weight_planes)
        for i, j in tiles.weight_pairs:
            plgpu.wgmma(within, weights[i], x_sm.at[j, :, here])
        return down(load(enter_ref, ROW), rows) * from_before[...] + within[...]

    accumulator = plgpu.ACC(rows, jnp.float32)
    return pl.run_scoped(products, accumulator, accumulator)
