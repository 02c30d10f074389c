"""The kernel that writes the gradients of a chunk.

It works on transposed tiles, row j and column i >= j, so that the weights of a head are the left operand of
the product that gives dx, in registers, and one exponential serves both them and the gradient of the scores.
"""

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
    tile,
    vectors,
    visible,
)

SQUARE = (CHUNK, CHUNK)


def gradients(x, dy, B, C, before, after, D, cum, dt, enter, leave, run, tiles: Tiles):
    """The gradients of one chunk's inputs, from dy and the gradient `after` of the state that it leaves.

    x and dy (planes, b, t, h p), B and C (planes, b, t, g n), before and after (planes, b, c, h p, n) as
    bfloat16 planes; D (h,), cum, dt, enter and leave (b, c, h, 64), run (b, c, 64) float32.

    Returns dx (b, length, h p), dB and dC for every block of heads (k, b, t, n), and three sums over the
    features of a head (b, c, h, 64): the part of dt's gradient that does not come through the decay, what of
    it comes from the state that the chunk leaves, and x dy. The sums are float32, and so are dB and dC where
    several blocks are to be added up; all else is as the inputs.
    """
    batch, chunks, heads, _ = cum.shape
    p, n, block = tiles.head_dim, tiles.state_size, tiles.heads
    planes, width, time_padded = tiles.planes, block * p, chunks * CHUNK
    of_heads_sm = vectors(tiles, 4)
    dx_type = jnp.bfloat16 if planes == 1 else jnp.float32
    shared_type = dx_type if block == tiles.heads_per_group else jnp.float32

    def ssd_gradients(*refs):
        inputs, (D_ref, *in_time, run_ref), outputs, shared, (dx_sm, dS_sm, *vectors_sm, loaded) = (
            refs[:6], refs[6:12], refs[12:18], refs[18:24], refs[24:]
        )  # fmt: skip
        b, c, k = (lax.axis_index(name) for name in ("b", "c", "k"))
        time, columns = pl.ds(c * CHUNK, CHUNK), pl.ds(k * width, width)
        group = pl.ds((k * block // tiles.heads_per_group) * n, n)
        places = [(b, time, group)] * 2 + [(b, time, columns)] * 2 + [(b, c, columns)] * 2
        for ref, place, sm in zip(inputs, places, shared, strict=True):
            for plane in range(planes):
                plgpu.copy_gmem_to_smem(ref.at[(plane, *place)], sm.at[plane], loaded)
        B_sm, C_sm, x_sm, dy_sm, before_sm, after_sm = shared
        of_heads = fetch_vectors(in_time, vectors_sm, loaded, tiles, b, c, k)
        cum_here, dt_here, enter_here, leave_here = of_heads
        dx_ref, dB_ref, dC_ref, *sums = outputs
        seen = visible(run_ref.at[b, c], transposed=True)
        plgpu.barrier_wait(loaded)

        def scores(acc):
            for i, j in tiles.plane_pairs:
                plgpu.wgmma(acc, B_sm.at[i], C_sm.at[j].transpose((1, 0)))
            return acc[...]

        S = jnp.where(seen, pl.run_scoped(scores, plgpu.ACC(SQUARE, jnp.float32)), 0.0)
        dS = plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), plgpu.Layout.WGMMA)

        def one_head(head, dS):
            here, index = pl.ds(head * p, p), k * block + head
            per_head = [ref.at[head] for ref in (cum_here, dt_here, leave_here)]
            of_head = (x_sm, dy_sm, B_sm, after_sm, *per_head)
            dx, sums_of_head, dS = _head(S, dS, D_ref[index], here, of_head, tiles)
            dx_sm[head] = dx.astype(dx_type)
            for ref, value in zip(sums, sums_of_head, strict=True):
                ref[b, c, index] = value
            return dS

        dS = lax.fori_loop(0, block, one_head, dS, unroll=tiles.unroll)
        dS = split(jnp.where(seen, dS, 0.0), planes)
        for plane in range(planes):
            dS_sm[plane] = dS[plane]
        plgpu.commit_smem()
        for head in range(block):
            plgpu.copy_smem_to_gmem(dx_sm.at[head], dx_ref.at[b, time, pl.ds(k * width + head * p, p)])

        def shared_gradients(dB, dC):
            for i, j in tiles.plane_pairs:
                plgpu.wgmma(dB, dS[i], C_sm.at[j])
                plgpu.wgmma(dC, dS_sm.at[i].transpose((1, 0)), B_sm.at[j])
            for head in range(block):
                here = pl.ds(head * p, p)
                leaving = load(dt_here.at[head], ROW) * load(leave_here.at[head], ROW)
                entering = load(enter_here.at[head], ROW)
                weighted = split(load_planes(x_sm, here) * down(leaving, (CHUNK, p)), planes)
                reached = split(load_planes(dy_sm, here) * down(entering, (CHUNK, p)), planes)
                for i, j in tiles.plane_pairs:
                    plgpu.wgmma(dB, weighted[i], after_sm.at[j, here])
                    plgpu.wgmma(dC, reached[i], before_sm.at[j, here])
            return dB[...].astype(shared_type), dC[...].astype(shared_type)

        accumulator = plgpu.ACC((CHUNK, n), jnp.float32)
        dB_ref[k, b, time], dC_ref[k, b, time] = pl.run_scoped(shared_gradients, accumulator, accumulator)
        plgpu.wait_smem_to_gmem(0)

    rows, states = tile(tiles, CHUNK, width), tile(tiles, width, n)
    of_group = jax.ShapeDtypeStruct((heads // block, batch, time_padded, n), shared_type)
    of_head = jax.ShapeDtypeStruct(cum.shape, jnp.float32)
    return plgpu.kernel(
        ssd_gradients,
        out_type=[
            jax.ShapeDtypeStruct((batch, tiles.length, heads * p), dx_type),
            of_group,
            of_group,
            *[of_head] * 3,
        ],
        scratch_types=[
            *[tile(tiles, CHUNK, n), tile(tiles, CHUNK, n), rows, rows, states, states],
            # A tile a head: see `Tiles.length`.
            plgpu.SMEM((block, CHUNK, p), dx_type),
            tile(tiles, *SQUARE),
            *of_heads_sm,
            plgpu.Barrier(num_arrivals=6 * planes + len(of_heads_sm)),
        ],
        grid=(batch, chunks, heads // block),
        grid_names=("b", "c", "k"),
        compiler_params=params(),
    )(B, C, x, dy, before, after, D, cum, dt, enter, leave, run)


def _head(S, dS, D, here, of_head, tiles):
    """dx of one head (64, p), its three sums (64,), and dS with its share."""
    x_sm, dy_sm, B_sm, after_sm, cum_ref, dt_ref, leave_ref = of_head
    rows, planes = (CHUNK, tiles.head_dim), tiles.planes
    x = load_planes(x_sm, here)
    dt = down(load(dt_ref, ROW), rows)
    driven = split(x * dt, planes)

    def products(through, from_state, from_outputs):
        for i, j in tiles.plane_pairs:
            plgpu.wgmma(through, driven[i], dy_sm.at[j, :, here].transpose((1, 0)))
            plgpu.wgmma(from_state, B_sm.at[i], after_sm.at[j, here].transpose((1, 0)))
        exponent = across(load(cum_ref, COLUMN), SQUARE) - down(load(cum_ref, ROW), SQUARE)
        decay = jnp.exp2(jnp.minimum(exponent, 0.0))
        weights = split(S * decay, tiles.weight_planes)
        for i, j in tiles.weight_pairs:
            plgpu.wgmma(from_outputs, weights[i], dy_sm.at[j, :, here])
        left = down(load(leave_ref, ROW), rows) * from_state[...]
        return left, left + from_outputs[...], dS + through[...] * decay

    accumulators = [plgpu.ACC(shape, jnp.float32) for shape in (SQUARE, rows, rows)]
    left, drive, dS = pl.run_scoped(products, *accumulators)
    dy = load_planes(dy_sm, here)
    sums = [(x * array).sum(axis=1) for array in (drive, left, dy)]
    return drive * dt + D * dy, sums, dS
