"""Attention inside chunks (`..chunks.Tile`): forward, gradient of the queries, gradients of keys and values.

A program is one warpgroup and holds one chunk: scores (queries x keys) live in registers, and the rules run
there on integers. No program writes what another writes, so nothing is atomic and every run gives the same
bits.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops.running_best_mosaic_gpu import alive_at_chunks
from hax_jax.ops.sparse_attention.chunks import NO_KEY, NO_QUERY, Tile
from hax_jax.ops.sparse_attention.mosaic_gpu import building_blocks as bb
from hax_jax.ops.sparse_attention.mosaic_gpu import carried_sums

LOG2E = math.log2(math.e)


def block_of(num_parts: int, keys: int, features: int, width: int) -> int | None:
    """How many features of the values a program works on at a time: the most that fit, or None."""
    both = bb.ROWS + keys
    for block in (128, 64, 32):
        inputs_and_output = (
            (both * features + keys * block, block),
            (both * (features + block), features),
            (2 * bb.ROWS * (features + block), features + block),
        )
        needed = max(2 * num_parts * inputs + 4 * bb.ROWS * output for inputs, output in inputs_and_output)
        if width % block == 0 and needed <= bb.SHARED_MEMORY:
            return block
    return None


def _block(*sizes: int) -> int:
    block = block_of(*sizes)
    assert block is not None, "the entry point asks `block_of` first"
    return block


def _forward(kinds, scale, q, k, v, rows, columns):
    heads, num_chunks = q.shape[:2]
    width = v.shape[-1]
    q, k, v = (
        bb.parts(bb.pad_features(q)),
        bb.parts(bb.pad_features(k)),
        bb.parts(bb.pad_values(v)),
    )
    rows, columns = bb.stack(rows, NO_QUERY, bb.ROWS), bb.stack(columns, NO_KEY, k.shape[3])
    num_parts, width_of_block = q.shape[0], _block(q.shape[0], k.shape[3], q.shape[-1], v.shape[-1])
    keys = k.shape[3]

    def body(q_ref, k_ref, v_ref, rows_ref, columns_ref, out_ref, lse_ref,
             q_sm, k_sm, v_sm, columns_sm, out_sm, lse_sm, arrived):  # fmt: skip
        head, chunk, part_of_v = (lax.axis_index(name) for name in ("head", "chunk", "block"))
        values = pl.ds(part_of_v * width_of_block, width_of_block)
        bb.copy_parts(q_ref, (head, chunk), q_sm, arrived)
        bb.copy_parts(k_ref, (head, chunk), k_sm, arrived)
        plgpu.copy_gmem_to_smem(columns_ref.at[chunk], columns_sm, arrived)
        bb.copy_parts(v_ref, (head, chunk, slice(None), values), v_sm, arrived)
        row_integers = bb.load_rows(rows_ref.at[chunk], rows.shape[1])
        plgpu.barrier_wait(arrived)
        scores = bb.product(q_sm, k_sm, (bb.ROWS, keys))
        visible = bb.mask(
            kinds, row_integers, bb.load_columns(columns_sm, columns.shape[1]), (bb.ROWS, keys), False
        )
        scores = jnp.where(visible, scores * (scale * LOG2E), -jnp.inf)
        highest = scores.max(axis=1)
        highest = jnp.where(highest == -jnp.inf, 0.0, highest)
        weights = jnp.exp2(scores - bb.down(highest, (bb.ROWS, keys)))
        total = weights.sum(axis=1)
        out = bb.product_from_registers(weights, v_sm, (bb.ROWS, width_of_block), num_parts)
        seen = total > 0.0
        safe = jnp.where(seen, total, 1.0)
        out_sm[...] = out * bb.down(1.0 / safe, (bb.ROWS, width_of_block))
        lse_sm[...] = jnp.where(seen, highest * (1 / LOG2E) + jnp.log(safe), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_sm, out_ref.at[head, chunk, :, values])

        @pl.when(part_of_v == 0)
        def _():
            plgpu.copy_smem_to_gmem(lse_sm, lse_ref.at[head, chunk])

        plgpu.wait_smem_to_gmem(0)

    out, lse = bb.kernel(
        body,
        out_type=[
            bb.array((heads, num_chunks, bb.ROWS, v.shape[-1])),
            bb.array((heads, num_chunks, bb.ROWS)),
        ],
        scratch_types=[
            bb.tiled((num_parts, bb.ROWS, q.shape[-1]), q.dtype, keys),
            bb.tiled((num_parts, keys, k.shape[-1]), k.dtype, keys),
            bb.tiled((num_parts, keys, width_of_block), v.dtype, keys),
            plgpu.SMEM((columns.shape[1], keys), jnp.int32),
            bb.tiled((bb.ROWS, width_of_block), jnp.float32),
            plgpu.SMEM((bb.ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=3 * num_parts + 1),
        ],
        grid=(heads, num_chunks, v.shape[-1] // width_of_block),
    )(q, k, v, rows, columns)
    return out[..., :width], lse


def _backward(kinds, scale, q, k, v, rows, columns, d_out, lse, delta):
    features = q.shape[-1]
    q, k, v = (
        bb.parts(bb.pad_features(q)),
        bb.parts(bb.pad_features(k)),
        bb.parts(bb.pad_values(v)),
    )
    d_out = bb.parts(bb.pad_values(d_out))
    rows, columns = bb.stack(rows, NO_QUERY, bb.ROWS), bb.stack(columns, NO_KEY, k.shape[3])
    statistics = jnp.stack([lse * LOG2E, delta], axis=2)
    arguments = (q, k, v, d_out, rows, columns, statistics)
    d_q = _query_gradient(kinds, scale, *arguments)
    return d_q[..., :features], _key_gradients(kinds, scale, *arguments)


def _query_gradient(kinds, scale, q, k, v, d_out, rows, columns, statistics):
    num_parts, heads, num_chunks, keys = k.shape[:4]
    width_of_block = _block(num_parts, keys, q.shape[-1], v.shape[-1])
    shape = (bb.ROWS, keys)

    def body(q_ref, k_ref, v_ref, d_out_ref, rows_ref, columns_ref, statistics_ref, d_q_ref,
             q_sm, k_sm, v_sm, d_out_sm, columns_sm, d_q_sm, arrived, values_arrived):  # fmt: skip
        head, chunk = lax.axis_index("head"), lax.axis_index("chunk")
        bb.copy_parts(q_ref, (head, chunk), q_sm, arrived)
        bb.copy_parts(k_ref, (head, chunk), k_sm, arrived)
        plgpu.copy_gmem_to_smem(columns_ref.at[chunk], columns_sm, arrived)
        row_integers = bb.load_rows(rows_ref.at[chunk], rows.shape[1])
        lse, delta = bb.load_rows(statistics_ref.at[head, chunk], 2)

        def add_block(index, d_weights):
            values = pl.ds(index * width_of_block, width_of_block)
            bb.copy_parts(v_ref, (head, chunk, slice(None), values), v_sm, values_arrived)
            bb.copy_parts(d_out_ref, (head, chunk, slice(None), values), d_out_sm, values_arrived)
            plgpu.barrier_wait(values_arrived)
            return d_weights + bb.product(d_out_sm, v_sm, shape)

        d_weights = bb.accumulate(add_block, v.shape[-1] // width_of_block, shape)
        plgpu.barrier_wait(arrived)
        scores = bb.product(q_sm, k_sm, shape)
        visible = bb.mask(kinds, row_integers, bb.load_columns(columns_sm, columns.shape[1]), shape, False)
        weights = jnp.exp2(jnp.where(visible, scores * (scale * LOG2E) - bb.down(lse, shape), -jnp.inf))
        d_scores = jnp.where(visible, weights * (d_weights - bb.down(delta, shape)) * scale, 0.0)
        d_q_sm[...] = bb.product_from_registers(d_scores, k_sm, (bb.ROWS, q.shape[-1]), num_parts)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(d_q_sm, d_q_ref.at[head, chunk])
        plgpu.wait_smem_to_gmem(0)

    return bb.kernel(
        body,
        out_type=bb.array((heads, num_chunks, bb.ROWS, q.shape[-1])),
        scratch_types=[
            bb.tiled((num_parts, bb.ROWS, q.shape[-1]), q.dtype, keys),
            bb.tiled((num_parts, keys, k.shape[-1]), k.dtype, keys),
            bb.tiled((num_parts, keys, width_of_block), v.dtype, keys),
            bb.tiled((num_parts, bb.ROWS, width_of_block), v.dtype, keys),
            plgpu.SMEM((columns.shape[1], keys), jnp.int32),
            bb.tiled((bb.ROWS, q.shape[-1]), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * num_parts + 1),
            plgpu.Barrier(num_arrivals=2 * num_parts),
        ],
        grid=(heads, num_chunks, 1),
    )(q, k, v, d_out, rows, columns, statistics)


def _key_gradients(kinds, scale, q, k, v, d_out, rows, columns, statistics):
    """Gradients of values and keys side by side, (h, c, k, f), filled up with anything to whole lanes.

    Values come first: what is written begins at whole tiles of shared memory, and keys may be narrower than
    those.
    """
    num_parts, heads, num_chunks, keys = k.shape[:4]
    width_of_block = _block(num_parts, keys, q.shape[-1], v.shape[-1])
    shape = (bb.ROWS, bb.ROWS)
    # Keys in groups of as many rows as a matrix instruction has: carried ones first, then the chunk's own.
    # The last group of carried ones may reach into the own; what it has of those is not written.
    num_carried = keys - bb.ROWS
    last_group = -(-num_carried // bb.ROWS) - 1
    rows_of_last = num_carried - last_group * bb.ROWS
    num_blocks = v.shape[-1] // width_of_block
    width = k.shape[-1] + v.shape[-1]

    def body(q_ref, k_ref, v_ref, d_out_ref, rows_ref, columns_ref, statistics_ref, out_ref,
             q_sm, k_sm, v_sm, d_out_sm, rows_sm, statistics_sm, d_k_sm, d_v_sm,
             arrived, values_arrived):  # fmt: skip
        head, chunk, group = (lax.axis_index(name) for name in ("head", "chunk", "block"))
        begin = pl.multiple_of(jnp.minimum(group * bb.ROWS, num_carried), bb.KEYS)
        here = pl.ds(begin, bb.ROWS)

        def write(source, features):
            def write_rows(count):
                to = out_ref.at[head, chunk, pl.ds(begin, count), features]
                plgpu.copy_smem_to_gmem(source.at[pl.ds(0, count)], to)

            @pl.when(group != last_group)
            def _():
                write_rows(bb.ROWS)

            if num_carried:

                @pl.when(group == last_group)
                def _():
                    write_rows(rows_of_last)

        bb.copy_parts(q_ref, (head, chunk), q_sm, arrived)
        bb.copy_parts(k_ref, (head, chunk, here), k_sm, arrived)
        plgpu.copy_gmem_to_smem(rows_ref.at[chunk], rows_sm, arrived)
        plgpu.copy_gmem_to_smem(statistics_ref.at[head, chunk], statistics_sm, arrived)
        # The tile stands on its side here: a row is a key.
        key_integers = bb.load_rows(columns_ref.at[chunk, :, here], columns.shape[1])

        def add_block(index, d_weights):
            values = pl.ds(index * width_of_block, width_of_block)
            bb.copy_parts(v_ref, (head, chunk, here, values), v_sm, values_arrived)
            bb.copy_parts(d_out_ref, (head, chunk, slice(None), values), d_out_sm, values_arrived)
            plgpu.barrier_wait(values_arrived)
            return d_weights + bb.product(v_sm, d_out_sm, shape)

        d_weights = bb.accumulate(add_block, num_blocks, shape)
        plgpu.barrier_wait(arrived)
        scores = bb.product(k_sm, q_sm, shape)
        visible = bb.mask(kinds, key_integers, bb.load_columns(rows_sm, rows.shape[1]), shape, True)
        lse, delta = (bb.across(bb.load(statistics_sm.at[x], bb.ALONG_COLUMNS), shape) for x in range(2))
        weights = jnp.exp2(jnp.where(visible, scores * (scale * LOG2E) - lse, -jnp.inf))
        d_scores = jnp.where(visible, weights * (d_weights - delta) * scale, 0.0)
        d_k_sm[...] = bb.product_from_registers(d_scores, q_sm, (bb.ROWS, q.shape[-1]), num_parts)
        plgpu.commit_smem()
        write(d_k_sm, pl.ds(v.shape[-1], k.shape[-1]))

        def write_block(index, last):
            values = pl.ds(index * width_of_block, width_of_block)
            if num_blocks > 1:
                bb.copy_parts(d_out_ref, (head, chunk, slice(None), values), d_out_sm, values_arrived)
                # The second arrival that this barrier counts.
                bb.copy_parts(v_ref, (head, chunk, here, values), v_sm, values_arrived)
                plgpu.barrier_wait(values_arrived)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            d_v_sm[...] = bb.product_from_registers(weights, d_out_sm, (bb.ROWS, width_of_block), num_parts)
            plgpu.commit_smem()
            write(d_v_sm, values)
            return last

        if num_blocks == 1:
            write_block(0, None)
        else:
            lax.fori_loop(jnp.int32(0), jnp.int32(num_blocks), write_block, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    return bb.kernel(
        body,
        out_type=bb.array((heads, num_chunks, keys, width + -width % carried_sums.LANES)),
        scratch_types=[
            bb.tiled((num_parts, bb.ROWS, q.shape[-1]), q.dtype),
            bb.tiled((num_parts, bb.ROWS, k.shape[-1]), k.dtype),
            bb.tiled((num_parts, bb.ROWS, width_of_block), v.dtype),
            bb.tiled((num_parts, bb.ROWS, width_of_block), v.dtype),
            plgpu.SMEM((rows.shape[1], bb.ROWS), jnp.int32),
            plgpu.SMEM((2, bb.ROWS), jnp.float32),
            bb.tiled((bb.ROWS, k.shape[-1]), jnp.float32),
            bb.tiled((bb.ROWS, width_of_block), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * num_parts + 2),
            plgpu.Barrier(num_arrivals=2 * num_parts),
        ],
        grid=(heads, num_chunks, last_group + 2),
    )(q, k, v, d_out, rows, columns, statistics)


def _sums(plan, d_keys, features, width):
    total = carried_sums.sum_of_slots(plan, d_keys)
    begin = bb.padded_values(width)
    return total[..., begin : begin + features], total[..., :width]


TILE = Tile(_forward, _backward, _sums, bb.KEYS, alive_at_chunks)
