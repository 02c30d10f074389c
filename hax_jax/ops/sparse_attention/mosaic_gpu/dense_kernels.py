"""Flash attention over tiles of 64 queries x 64 keys, with the rules evaluated in registers.

A program is one warpgroup. It holds a tile of queries (or, for the gradients of keys and values, of keys) and
walks over the tiles on the other side that share a segment with it; the next one's copies run while it works.
The forward pass notes which pairs of tiles have anything visible, and the backward pass visits just those.
Nothing is atomic: every run gives the same bits.

Arrays come as `dense.py` lays them out: inputs (parts, positions, heads, features), integers
(number, positions), and for each tile the furthest tile that it has to look at. `distance` is how many tiles
a tile of keys lies before one of queries.

A program takes as long as its walk. Two of them fit on a multiprocessor, so that several hundred come in
waves; `order` says which tile each program has, those that may walk furthest first.

Wide values are cut into blocks, one a program; the score gradient is linear in the values, so every block has
its own share of the gradients of queries and keys, to be added up.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops.sparse_attention.chunks import shown_by_each
from hax_jax.ops.sparse_attention.mosaic_gpu import building_blocks as bb

LOG2E = math.log2(math.e)
SHAPE = (bb.ROWS, bb.ROWS)


@dataclasses.dataclass(frozen=True)
class Form:
    """What the kernels are compiled for.

    Attributes:
      kinds: the sources, without their arrays.
      num_groups: how many integers after the position must be equal for a key to be visible at all.
      max_distance: the number of tiles that one tile may have to look at.
      width: features of a block of values.
      slots: tiles in shared memory at a time, of those that a program walks over.
      dtype: of the gradients of q, k and v.
    """

    kinds: Any
    num_groups: int
    scale: float
    max_distance: int
    width: int
    slots: int
    dtype: Any


def fit(num_parts: int, features: int, width: int) -> tuple[int, int]:
    """(width of a block of values, slots): the largest that fit into shared memory."""
    for block, slots in ((128, 2), (128, 1), (64, 2), (64, 1)):
        row = features + block
        if width % block == 0 and bb.ROWS * row * (2 * num_parts * (1 + slots) + 4) <= bb.SHARED_MEMORY:
            return block, slots
    raise ValueError(f"{features} features in {num_parts} parts do not fit into shared memory")


def forward(form: Form, q, k, v, rows, columns, order, first_key_tile, dtype):
    """Returns out (positions, heads, e) of `dtype`; log-sum-exps to base 2 (heads, positions); visited tiles.

    Visited pairs are (tiles, max_distance) int32, by tile of queries and by tile of keys; what lies beyond
    the furthest tile is never written.
    """
    num_parts, positions, heads, features = q.shape
    num_tiles, width = positions // bb.ROWS, form.width

    def body(q_ref, k_ref, v_ref, rows_ref, columns_ref, order_ref, first_ref, out_ref, lse_ref,
             by_query_ref, by_key_ref, q_sm, k_sm, v_sm, columns_sm, out_sm, lse_sm,
             q_arrived, arrived):  # fmt: skip
        head, program, block = (lax.axis_index(name) for name in ("head", "chunk", "block"))
        tile = order_ref[program]
        here, values = _tile(tile), pl.ds(block * width, width)
        count = tile + 1 - first_ref[tile]

        def fetch(distance, slot):
            there = _tile(tile - distance)
            bb.copy_parts(k_ref, (there, head), k_sm.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(columns_ref.at[:, there], columns_sm.at[slot], arrived.at[slot])
            bb.copy_parts(v_ref, (there, head, values), v_sm.at[slot], arrived.at[slot])

        fetch(jnp.int32(0), jnp.int32(0))
        bb.copy_parts(q_ref, (here, head), q_sm, q_arrived)
        row_integers = bb.load_rows(rows_ref.at[:, here], rows.shape[0])
        plgpu.barrier_wait(q_arrived)

        def step(distance, slot, carry):
            plgpu.barrier_wait(arrived.at[slot])

            def mask():
                key_integers = bb.load_columns(columns_sm.at[slot], columns.shape[0])
                return _mask(form, row_integers, key_integers, transposed=False)

            scores, visible = bb.product(q_sm, k_sm.at[slot], SHAPE, mask)
            scores = jnp.where(visible, scores * (form.scale * LOG2E), -jnp.inf)
            tile_highest = scores.max(axis=1)
            # NaN counts as visible, so that it is not hidden.
            anything = tile_highest.max() != -jnp.inf

            @pl.when((head == 0) & (block == 0))
            def _():
                visited = jnp.where(anything, jnp.int32(1), jnp.int32(0))
                by_query_ref[tile, distance] = visited
                by_key_ref[tile - distance, distance] = visited

            def add(carry):
                return _add_tile(carry, scores, tile_highest, v_sm.at[slot], num_parts)

            return lax.cond(anything, add, lambda carry: carry, carry)

        empty = (bb.zeros((bb.ROWS, width)), bb.filled_rows(bb.ROWS, -jnp.inf), bb.filled_rows(bb.ROWS, 0.0))
        following = lambda distance: distance  # noqa: E731
        out, highest, total = _walk(form.slots, count, following, fetch, step, empty)
        seen = total > 0.0
        safe = jnp.where(seen, total, 1.0)
        out_sm[...] = (out * bb.down(1.0 / safe, (bb.ROWS, width))).astype(dtype)
        lse_sm[...] = jnp.where(seen, highest + jnp.log(safe) * LOG2E, -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_sm, out_ref.at[here, head, values])

        @pl.when(block == 0)
        def _():
            plgpu.copy_smem_to_gmem(lse_sm, lse_ref.at[head, here])

        plgpu.wait_smem_to_gmem(0)

    pairs = jax.ShapeDtypeStruct((num_tiles, form.max_distance), jnp.int32)
    return bb.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((positions, heads, v.shape[-1]), dtype),
            bb.array((heads, positions)),
            pairs,
            pairs,
        ],
        scratch_types=[
            bb.tiled((num_parts, bb.ROWS, features), q.dtype),
            bb.tiled((form.slots, num_parts, bb.ROWS, features), k.dtype),
            bb.tiled((form.slots, num_parts, bb.ROWS, width), v.dtype),
            plgpu.SMEM((form.slots, columns.shape[0], bb.ROWS), jnp.int32),
            bb.tiled((bb.ROWS, width), dtype),
            plgpu.SMEM((bb.ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=num_parts),
            plgpu.Barrier(num_arrivals=2 * num_parts + 1, num_barriers=form.slots),
        ],
        grid=(heads, num_tiles, v.shape[-1] // width),
    )(q, k, v, rows, columns, order, first_key_tile)


def _add_tile(carry, scores, tile_highest, v_sm, num_parts):
    """One more tile of keys in the running softmax (output, highest score, sum of weights)."""
    out, highest, total = carry
    new_highest = jnp.maximum(highest, tile_highest)
    # Rows that have seen nothing yet have weights of 0, not NaN.
    reference = jnp.where(new_highest == -jnp.inf, 0.0, new_highest)
    decay = jnp.exp2(highest - reference)
    weights = jnp.exp2(scores - bb.down(reference, SHAPE))
    total = total * decay + weights.sum(axis=1)
    out = out * bb.down(decay, out.shape)
    out = bb.add_product_from_registers(out, weights, v_sm, num_parts)
    return out, new_highest, total


def query_gradient(form: Form, q, k, v, d_out, rows, columns, lse, delta, order, first_key_tile, visited):
    """Returns the shares of the values' blocks in the gradient of q, (blocks, positions, heads, n)."""
    num_parts, positions, heads, features = q.shape
    width, num_blocks = form.width, v.shape[-1] // form.width

    def body(q_ref, k_ref, v_ref, d_out_ref, rows_ref, columns_ref, lse_ref, delta_ref,
             order_ref, first_ref, visited_ref, d_q_ref, q_sm, k_sm, v_sm, d_out_sm, columns_sm, d_q_sm,
             here_arrived, arrived):  # fmt: skip
        head, program, block = (lax.axis_index(name) for name in ("head", "chunk", "block"))
        tile = order_ref[program]
        here, values = _tile(tile), pl.ds(block * width, width)
        count = tile + 1 - first_ref[tile]
        following = functools.partial(_next_visited, visited_ref, tile, count)

        def fetch(distance, slot):
            there = _tile(tile - distance)
            bb.copy_parts(k_ref, (there, head), k_sm.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(columns_ref.at[:, there], columns_sm.at[slot], arrived.at[slot])
            bb.copy_parts(v_ref, (there, head, values), v_sm.at[slot], arrived.at[slot])

        begin = following(jnp.int32(0))
        pl.when(begin < count)(lambda: fetch(begin, jnp.int32(0)))
        bb.copy_parts(q_ref, (here, head), q_sm, here_arrived)
        bb.copy_parts(d_out_ref, (here, head, values), d_out_sm, here_arrived)
        row_integers = bb.load_rows(rows_ref.at[:, here], rows.shape[0])
        lse = bb.load_row(lse_ref.at[head, here])
        delta = bb.load_row(delta_ref.at[head, block, here])
        plgpu.barrier_wait(here_arrived)

        def step(distance, slot, d_q):
            del distance
            plgpu.barrier_wait(arrived.at[slot])

            def mask():
                key_integers = bb.load_columns(columns_sm.at[slot], columns.shape[0])
                return _mask(form, row_integers, key_integers, transposed=False)

            scores, visible = bb.product(q_sm, k_sm.at[slot], SHAPE, mask)
            d_weights = bb.product(d_out_sm, v_sm.at[slot], SHAPE)
            exponents = scores * (form.scale * LOG2E) - bb.down(lse, SHAPE)
            weights = jnp.exp2(jnp.where(visible, exponents, -jnp.inf))
            d_scores = jnp.where(visible, weights * (d_weights - bb.down(delta, SHAPE)), 0.0)
            return bb.add_product_from_registers(d_q, d_scores, k_sm.at[slot], num_parts)

        d_q = _walk(form.slots, count, following, fetch, step, bb.zeros((bb.ROWS, features)), begin)
        d_q_sm[...] = (d_q * form.scale).astype(d_q_sm.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(d_q_sm, d_q_ref.at[block, here, head])
        plgpu.wait_smem_to_gmem(0)

    dtype = _dtype_of_shares(form, num_blocks)
    return bb.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_blocks, positions, heads, features), dtype),
        scratch_types=[
            bb.tiled((num_parts, bb.ROWS, features), q.dtype),
            bb.tiled((form.slots, num_parts, bb.ROWS, features), k.dtype),
            bb.tiled((form.slots, num_parts, bb.ROWS, width), v.dtype),
            bb.tiled((num_parts, bb.ROWS, width), v.dtype),
            plgpu.SMEM((form.slots, columns.shape[0], bb.ROWS), jnp.int32),
            bb.tiled((bb.ROWS, features), dtype),
            plgpu.Barrier(num_arrivals=2 * num_parts),
            plgpu.Barrier(num_arrivals=2 * num_parts + 1, num_barriers=form.slots),
        ],
        grid=(heads, positions // bb.ROWS, num_blocks),
    )(q, k, v, d_out, rows, columns, lse, delta, order, first_key_tile, visited)


def key_gradients(form: Form, q, k, v, d_out, rows, columns, lse, delta, order, last_query_tile, visited):
    """Returns the shares in the gradient of k, (blocks, positions, heads, n), and the gradient of v."""
    num_parts, positions, heads, features = q.shape
    width, num_blocks = form.width, v.shape[-1] // form.width

    def body(q_ref, k_ref, v_ref, d_out_ref, rows_ref, columns_ref, lse_ref, delta_ref,
             order_ref, last_ref, visited_ref, d_k_ref, d_v_ref, q_sm, k_sm, v_sm, d_out_sm, rows_sm,
             lse_sm, delta_sm, d_k_sm, d_v_sm, here_arrived, arrived):  # fmt: skip
        head, program, block = (lax.axis_index(name) for name in ("head", "chunk", "block"))
        tile = order_ref[program]
        here, values = _tile(tile), pl.ds(block * width, width)
        count = last_ref[tile] + 1 - tile
        following = functools.partial(_next_visited, visited_ref, tile, count)

        def fetch(distance, slot):
            there, barrier = _tile(tile + distance), arrived.at[slot]
            bb.copy_parts(q_ref, (there, head), q_sm.at[slot], barrier)
            plgpu.copy_gmem_to_smem(rows_ref.at[:, there], rows_sm.at[slot], barrier)
            plgpu.copy_gmem_to_smem(lse_ref.at[head, there], lse_sm.at[slot], barrier)
            plgpu.copy_gmem_to_smem(delta_ref.at[head, block, there], delta_sm.at[slot], barrier)
            bb.copy_parts(d_out_ref, (there, head, values), d_out_sm.at[slot], barrier)

        begin = following(jnp.int32(0))
        pl.when(begin < count)(lambda: fetch(begin, jnp.int32(0)))
        bb.copy_parts(k_ref, (here, head), k_sm, here_arrived)
        bb.copy_parts(v_ref, (here, head, values), v_sm, here_arrived)
        # The tile stands on its side here: a row is a key.
        key_integers = bb.load_rows(columns_ref.at[:, here], columns.shape[0])
        plgpu.barrier_wait(here_arrived)

        def step(distance, slot, carry):
            del distance
            d_k, d_v = carry
            plgpu.barrier_wait(arrived.at[slot])

            def mask():
                row_integers = bb.load_columns(rows_sm.at[slot], rows.shape[0])
                return _mask(form, row_integers, key_integers, transposed=True)

            scores, visible = bb.product(k_sm, q_sm.at[slot], SHAPE, mask)
            lse, delta = (
                bb.across(bb.load(ref.at[slot], bb.ALONG_COLUMNS), SHAPE) for ref in (lse_sm, delta_sm)
            )
            weights = jnp.exp2(jnp.where(visible, scores * (form.scale * LOG2E) - lse, -jnp.inf))
            d_v = bb.add_product_from_registers(d_v, weights, d_out_sm.at[slot], num_parts)
            d_weights = bb.product(v_sm, d_out_sm.at[slot], SHAPE)
            d_scores = jnp.where(visible, weights * (d_weights - delta), 0.0)
            d_k = bb.add_product_from_registers(d_k, d_scores, q_sm.at[slot], num_parts)
            return d_k, d_v

        empty = (bb.zeros((bb.ROWS, features)), bb.zeros((bb.ROWS, width)))
        d_k, d_v = _walk(form.slots, count, following, fetch, step, empty, begin)
        d_k_sm[...] = (d_k * form.scale).astype(d_k_sm.dtype)
        d_v_sm[...] = d_v.astype(d_v_sm.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(d_k_sm, d_k_ref.at[block, here, head])
        plgpu.copy_smem_to_gmem(d_v_sm, d_v_ref.at[here, head, values])
        plgpu.wait_smem_to_gmem(0)

    dtype = _dtype_of_shares(form, num_blocks)
    return bb.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((num_blocks, positions, heads, features), dtype),
            jax.ShapeDtypeStruct((positions, heads, v.shape[-1]), form.dtype),
        ],
        scratch_types=[
            bb.tiled((form.slots, num_parts, bb.ROWS, features), q.dtype),
            bb.tiled((num_parts, bb.ROWS, features), k.dtype),
            bb.tiled((num_parts, bb.ROWS, width), v.dtype),
            bb.tiled((form.slots, num_parts, bb.ROWS, width), v.dtype),
            plgpu.SMEM((form.slots, rows.shape[0], bb.ROWS), jnp.int32),
            plgpu.SMEM((form.slots, bb.ROWS), jnp.float32),
            plgpu.SMEM((form.slots, bb.ROWS), jnp.float32),
            bb.tiled((bb.ROWS, features), dtype),
            bb.tiled((bb.ROWS, width), form.dtype),
            plgpu.Barrier(num_arrivals=2 * num_parts),
            plgpu.Barrier(num_arrivals=2 * num_parts + 3, num_barriers=form.slots),
        ],
        grid=(heads, positions // bb.ROWS, num_blocks),
    )(q, k, v, d_out, rows, columns, lse, delta, order, last_query_tile, visited)


def _tile(index):
    return pl.ds(index * bb.ROWS, bb.ROWS)


def _dtype_of_shares(form, num_blocks):
    """A single share is the gradient itself; several are added up before they are rounded."""
    return form.dtype if num_blocks == 1 else jnp.float32


def _mask(form, queries, keys, *, transposed):
    lay_queries, lay_keys = (bb.across, bb.down) if transposed else (bb.down, bb.across)
    i, *queries = (lay_queries(x, SHAPE) for x in queries)
    j, *keys = (lay_keys(x, SHAPE) for x in keys)
    n = form.num_groups
    mask = functools.reduce(jnp.logical_or, shown_by_each(form.kinds, i, j, queries[n:], keys[n:]))
    for query_group, key_group in zip(queries[:n], keys[:n], strict=True):
        mask = mask & (query_group == key_group)
    return mask


def _next_visited(visited_ref, tile, count, begin):
    """The first distance from `begin` on with anything visible, or `count`."""

    def at(distance):
        return visited_ref[tile, jnp.minimum(distance, count - 1)]

    def advance(state):
        distance = state[0] + 1
        return distance, at(distance)

    return lax.while_loop(lambda state: (state[0] < count) & (state[1] == 0), advance, (begin, at(begin)))[0]


def _walk(slots, count, following, fetch, step, carry, begin=None):
    """Carries `carry` through `step(distance, slot, carry)` at each distance below `count` to visit.

    `following(distance)` is the first to visit from `distance` on. The copies for `begin` are under way;
    those for the next one are started as soon as a slot is free.
    """

    def fetch_next(distance, slot):
        @pl.when(distance < count)
        def _():
            # All threads are done with what the slot held, also with what they read by themselves.
            plgpu.commit_smem()
            fetch(distance, slot)

    def advance(state):
        number, distance, carry = state
        next_distance = following(distance + 1)
        slot, next_slot = lax.rem(number, jnp.int32(slots)), lax.rem(number + 1, jnp.int32(slots))
        if slots > 1:
            fetch_next(next_distance, next_slot)
        carry = step(distance, slot, carry)
        if slots == 1:
            fetch_next(next_distance, next_slot)
        return number + 1, next_distance, carry

    begin = jnp.int32(0) if begin is None else begin
    return lax.while_loop(lambda state: state[1] < count, advance, (jnp.int32(0), begin, carry))[2]
