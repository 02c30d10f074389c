"""The tile of `chunks` as Mosaic GPU kernels, for Hopper and newer.

Three kernels of one warpgroup a program: forward, gradient of the queries, gradients of keys and values. A
program holds a whole chunk: scores (queries x keys) live in registers, and the rules run there on integers.
No program writes what another writes, so nothing is atomic and every run gives the same bits.

bfloat16 inputs multiply as they are. A float32 input is split into three bfloat16 parts, which hold its 24
bits, and a product is the sum of the six products of parts that matter: float32's accuracy from the matrix
units, whose own float32 mode (TF32) keeps 11 bits.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops.sparse_attention.chunks import NO_KEY, NO_QUERY, Tile, visible

# How tests on a CPU run the kernels: Pallas' interpreter's settings, or None to compile them.
interpret: Any = None

LOG2E = math.log2(math.e)
# A matrix instruction has 64 rows: chunks have 64 queries, and keys come in groups of 64.
ROWS = 64
FEATURES = (16, 32, 64, 128)
MAX_KEYS = 256
# Values are worked on this many features at a time.
WIDTHS = (128, 64)

_ALONG_ROWS = plgpu.Layout.WGMMA.reduce(1)
_ALONG_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def _forward(kinds, scale, q, k, v, rows, columns):
    num_keys, features, width = _check(q, k, v)
    heads, chunks = q.shape[:2]
    q, k, v = _parts(_pad_features(q)), _parts(_pad_features(_pad_keys(k))), _parts(_pad_values(_pad_keys(v)))
    rows, columns = _stack(rows, NO_QUERY, ROWS), _stack(columns, NO_KEY, k.shape[3])
    parts, block = q.shape[0], _block(v.shape[-1])
    keys = k.shape[3]

    def body(q_ref, k_ref, v_ref, rows_ref, columns_ref, out_ref, lse_ref,
             q_sm, k_sm, v_sm, columns_sm, out_sm, lse_sm, arrived):  # fmt: skip
        head, chunk, part_of_v = (lax.axis_index(name) for name in ("head", "chunk", "block"))
        values = pl.ds(part_of_v * block, block)
        _copy_parts(q_ref, (head, chunk), q_sm, arrived)
        _copy_parts(k_ref, (head, chunk), k_sm, arrived)
        plgpu.copy_gmem_to_smem(columns_ref.at[chunk], columns_sm, arrived)
        _copy_parts(v_ref, (head, chunk, slice(None), values), v_sm, arrived)
        row_integers = _load_rows(rows_ref.at[chunk], rows.shape[1])
        plgpu.barrier_wait(arrived)
        scores = _product(q_sm, k_sm, (ROWS, keys))
        mask = _mask(kinds, row_integers, _load_columns(columns_sm, columns.shape[1]), (ROWS, keys), False)
        scores = jnp.where(mask, scores * (scale * LOG2E), -jnp.inf)
        highest = scores.max(axis=1)
        highest = jnp.where(highest == -jnp.inf, 0.0, highest)
        weights = jnp.exp2(scores - _down(highest, (ROWS, keys)))
        total = weights.sum(axis=1)
        out = _product_from_registers(weights, v_sm, (ROWS, block), v.dtype, parts)
        seen = total > 0.0
        safe = jnp.where(seen, total, 1.0)
        out_sm[...] = out * _down(1.0 / safe, (ROWS, block))
        lse_sm[...] = jnp.where(seen, highest * (1 / LOG2E) + jnp.log(safe), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_sm, out_ref.at[head, chunk, :, values])

        @pl.when(part_of_v == 0)
        def _():
            plgpu.copy_smem_to_gmem(lse_sm, lse_ref.at[head, chunk])

        plgpu.wait_smem_to_gmem(0)

    out, lse = _kernel(
        body,
        out_type=[_array((heads, chunks, ROWS, v.shape[-1])), _array((heads, chunks, ROWS))],
        scratch_types=[
            _tiled((parts, ROWS, q.shape[-1]), q.dtype),
            _tiled((parts, keys, k.shape[-1]), k.dtype),
            _tiled((parts, keys, block), v.dtype),
            plgpu.SMEM((columns.shape[1], keys), jnp.int32),
            _tiled((ROWS, block), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=3 * parts + 1),
        ],
        grid=(heads, chunks, v.shape[-1] // block),
    )(q, k, v, rows, columns)
    return out[..., :width], lse


def _backward(kinds, scale, q, k, v, rows, columns, d_out, lse, delta):
    num_keys, features, width = _check(q, k, v)
    q, k, v = _parts(_pad_features(q)), _parts(_pad_features(_pad_keys(k))), _parts(_pad_values(_pad_keys(v)))
    d_out = _parts(_pad_values(d_out))
    rows, columns = _stack(rows, NO_QUERY, ROWS), _stack(columns, NO_KEY, k.shape[3])
    statistics = jnp.stack([lse * LOG2E, delta], axis=2)
    arguments = (q, k, v, d_out, rows, columns, statistics)
    d_q = _query_gradient(kinds, scale, *arguments)
    d_k, d_v = _key_gradients(kinds, scale, *arguments)
    return d_q[..., :features], d_k[:, :, :num_keys, :features], d_v[:, :, :num_keys, :width]


def _query_gradient(kinds, scale, q, k, v, d_out, rows, columns, statistics):
    parts, heads, chunks, keys = k.shape[:4]
    block = _block(v.shape[-1])
    shape = (ROWS, keys)

    def body(q_ref, k_ref, v_ref, d_out_ref, rows_ref, columns_ref, statistics_ref, d_q_ref,
             q_sm, k_sm, v_sm, d_out_sm, columns_sm, d_q_sm, arrived, values_arrived):  # fmt: skip
        head, chunk = lax.axis_index("head"), lax.axis_index("chunk")
        _copy_parts(q_ref, (head, chunk), q_sm, arrived)
        _copy_parts(k_ref, (head, chunk), k_sm, arrived)
        plgpu.copy_gmem_to_smem(columns_ref.at[chunk], columns_sm, arrived)
        row_integers = _load_rows(rows_ref.at[chunk], rows.shape[1])
        lse, delta = _load_rows(statistics_ref.at[head, chunk], 2)

        def add_block(index, d_weights):
            values = pl.ds(index * block, block)
            _copy_parts(v_ref, (head, chunk, slice(None), values), v_sm, values_arrived)
            _copy_parts(d_out_ref, (head, chunk, slice(None), values), d_out_sm, values_arrived)
            plgpu.barrier_wait(values_arrived)
            return d_weights + _product(d_out_sm, v_sm, shape)

        d_weights = _accumulate(add_block, v.shape[-1] // block, shape)
        plgpu.barrier_wait(arrived)
        scores = _product(q_sm, k_sm, shape)
        mask = _mask(kinds, row_integers, _load_columns(columns_sm, columns.shape[1]), shape, False)
        weights = jnp.exp2(jnp.where(mask, scores * (scale * LOG2E) - _down(lse, shape), -jnp.inf))
        d_scores = jnp.where(mask, weights * (d_weights - _down(delta, shape)) * scale, 0.0)
        d_q_sm[...] = _product_from_registers(d_scores, k_sm, (ROWS, q.shape[-1]), q.dtype, parts)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(d_q_sm, d_q_ref.at[head, chunk])
        plgpu.wait_smem_to_gmem(0)

    return _kernel(
        body,
        out_type=_array((heads, chunks, ROWS, q.shape[-1])),
        scratch_types=[
            _tiled((parts, ROWS, q.shape[-1]), q.dtype),
            _tiled((parts, keys, k.shape[-1]), k.dtype),
            _tiled((parts, keys, block), v.dtype),
            _tiled((parts, ROWS, block), v.dtype),
            plgpu.SMEM((columns.shape[1], keys), jnp.int32),
            _tiled((ROWS, q.shape[-1]), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * parts + 1),
            plgpu.Barrier(num_arrivals=2 * parts),
        ],
        grid=(heads, chunks, 1),
    )(q, k, v, d_out, rows, columns, statistics)


def _key_gradients(kinds, scale, q, k, v, d_out, rows, columns, statistics):
    parts, heads, chunks, keys = k.shape[:4]
    block = _block(v.shape[-1])
    shape = (ROWS, ROWS)
    num_blocks = v.shape[-1] // block

    def body(q_ref, k_ref, v_ref, d_out_ref, rows_ref, columns_ref, statistics_ref, d_k_ref, d_v_ref,
             q_sm, k_sm, v_sm, d_out_sm, rows_sm, statistics_sm, d_k_sm, d_v_sm,
             arrived, values_arrived):  # fmt: skip
        head, chunk, group = (lax.axis_index(name) for name in ("head", "chunk", "block"))
        here = pl.ds(group * ROWS, ROWS)
        _copy_parts(q_ref, (head, chunk), q_sm, arrived)
        _copy_parts(k_ref, (head, chunk, here), k_sm, arrived)
        plgpu.copy_gmem_to_smem(rows_ref.at[chunk], rows_sm, arrived)
        plgpu.copy_gmem_to_smem(statistics_ref.at[head, chunk], statistics_sm, arrived)
        # The tile stands on its side here: a row is a key.
        key_integers = _load_rows(columns_ref.at[chunk, :, here], columns.shape[1])

        def add_block(index, d_weights):
            values = pl.ds(index * block, block)
            _copy_parts(v_ref, (head, chunk, here, values), v_sm, values_arrived)
            _copy_parts(d_out_ref, (head, chunk, slice(None), values), d_out_sm, values_arrived)
            plgpu.barrier_wait(values_arrived)
            return d_weights + _product(v_sm, d_out_sm, shape)

        d_weights = _accumulate(add_block, num_blocks, shape)
        plgpu.barrier_wait(arrived)
        scores = _product(k_sm, q_sm, shape)
        mask = _mask(kinds, key_integers, _load_columns(rows_sm, rows.shape[1]), shape, True)
        lse, delta = (_across(_load(statistics_sm.at[x], _ALONG_COLUMNS), shape) for x in range(2))
        weights = jnp.exp2(jnp.where(mask, scores * (scale * LOG2E) - lse, -jnp.inf))
        d_scores = jnp.where(mask, weights * (d_weights - delta) * scale, 0.0)
        d_k_sm[...] = _product_from_registers(d_scores, q_sm, (ROWS, q.shape[-1]), q.dtype, parts)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(d_k_sm, d_k_ref.at[head, chunk, here])

        def write_block(index, last):
            values = pl.ds(index * block, block)
            if num_blocks > 1:
                _copy_parts(d_out_ref, (head, chunk, slice(None), values), d_out_sm, values_arrived)
                # The second arrival that this barrier counts.
                _copy_parts(v_ref, (head, chunk, here, values), v_sm, values_arrived)
                plgpu.barrier_wait(values_arrived)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            d_v_sm[...] = _product_from_registers(weights, d_out_sm, (ROWS, block), v.dtype, parts)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(d_v_sm, d_v_ref.at[head, chunk, here, values])
            return last

        if num_blocks == 1:
            write_block(0, None)
        else:
            lax.fori_loop(jnp.int32(0), jnp.int32(num_blocks), write_block, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    return _kernel(
        body,
        out_type=[
            _array((heads, chunks, keys, k.shape[-1])),
            _array((heads, chunks, keys, v.shape[-1])),
        ],
        scratch_types=[
            _tiled((parts, ROWS, q.shape[-1]), q.dtype),
            _tiled((parts, ROWS, k.shape[-1]), k.dtype),
            _tiled((parts, ROWS, block), v.dtype),
            _tiled((parts, ROWS, block), v.dtype),
            plgpu.SMEM((rows.shape[1], ROWS), jnp.int32),
            plgpu.SMEM((2, ROWS), jnp.float32),
            _tiled((ROWS, k.shape[-1]), jnp.float32),
            _tiled((ROWS, block), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * parts + 2),
            plgpu.Barrier(num_arrivals=2 * parts),
        ],
        grid=(heads, chunks, keys // ROWS),
    )(q, k, v, d_out, rows, columns, statistics)


TILE = Tile(_forward, _backward)


# --------------------------------------------------------------------------------------------- in a kernel


def _product(a_sm, b_sm, shape):
    """a b^T of the sums of parts, in float32; both (parts, rows, features) in shared memory."""

    def multiply(acc_ref):
        for a, b in _pairs(a_sm.shape[0]):
            plgpu.wgmma(acc_ref, a_sm.at[a], plgpu.transpose_ref(b_sm.at[b], (1, 0)))
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _product_from_registers(a, b_sm, shape, dtype, parts):
    """a b with float32 a in registers, split there, and b (parts, rows, features) in shared memory."""
    pieces, rest = [], a
    for _ in range(parts):
        piece = rest.astype(dtype)
        pieces.append(piece)
        rest = rest - piece.astype(jnp.float32)

    def multiply(acc_ref):
        for a_part, b_part in _pairs(parts):
            plgpu.wgmma(acc_ref, pieces[a_part], b_sm.at[b_part])
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _pairs(parts):
    """The products of parts that float32 can tell from zero, small ones first."""
    return [(a, b) for total in reversed(range(parts)) for a in range(parts) for b in [total - a] if b >= 0]


def _accumulate(step, count, shape):
    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    if count == 1:
        return step(0, zeros)
    return lax.fori_loop(jnp.int32(0), jnp.int32(count), step, zeros)


def _mask(kinds, rows, columns, shape, transposed):
    rows = [_down(x, shape) for x in rows]
    columns = [_across(x, shape) for x in columns]
    return visible(kinds, columns, rows) if transposed else visible(kinds, rows, columns)


def _down(x, shape):
    return lax.broadcast_in_dim(x, shape, [0])


def _across(x, shape):
    return lax.broadcast_in_dim(x, shape, [1])


def _copy_parts(ref, index, target, barrier):
    """One copy a part: the copy engine takes arrays of five axes at most."""
    for part in range(target.shape[0]):
        plgpu.copy_gmem_to_smem(ref.at[(part, *index)], target.at[part], barrier)


def _load(ref, layout, optimized=True):
    return plgpu.load(ref, layout=layout, optimized=optimized)


def _load_rows(ref, count):
    return [_load(ref.at[x], _ALONG_ROWS, optimized=False) for x in range(count)]


def _load_columns(ref, count):
    return [_load(ref.at[x], _ALONG_COLUMNS) for x in range(count)]


# ------------------------------------------------------------------------------------------ around a kernel


def _kernel(body, *, grid, **types):
    if interpret is not None:
        types["interpret"] = interpret
    return plgpu.kernel(
        body,
        grid=grid,
        grid_names=("head", "chunk", "block"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **types,
    )


def _array(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _tiled(shape, dtype):
    """Shared memory in the tiles that matrix instructions read, with the widest swizzle that fits."""
    for swizzle in (128, 64, 32):
        columns = swizzle // jnp.dtype(dtype).itemsize
        if shape[-1] % columns == 0:
            transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
            return plgpu.SMEM(shape, dtype, transforms=transforms)
    raise ValueError(f"the last axis of {shape} is not a multiple of 32 bytes")


def _check(q, k, v):
    return k.shape[2], q.shape[-1], v.shape[-1]


def _pad_features(x):
    target = next(size for size in FEATURES if size >= x.shape[-1])
    return _pad(x, 3, target)


def _pad_values(x):
    return _pad(x, 3, -(-x.shape[-1] // WIDTHS[-1]) * WIDTHS[-1])


def _pad_keys(x):
    return _pad(x, 2, -(-x.shape[2] // ROWS) * ROWS)


def _pad(x, axis, size):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths) if size > x.shape[axis] else x


def _block(width):
    return next(block for block in WIDTHS if width % block == 0)


def _parts(x):
    """(p, h, c, ...) bfloat16 arrays whose sum is x: itself, or three for float32."""
    if x.dtype == jnp.bfloat16:
        return x[None]
    parts = []
    for _ in range(3):
        # Not a cast there and back, which the compiler may take for nothing.
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return jnp.stack(parts)


def _stack(integers, absent, size):
    """(c, number, size) of integers (c, slots); absent positions in slots that pad."""
    padded = [
        jnp.pad(x, ((0, 0), (0, size - x.shape[1])), constant_values=absent if number == 0 else 0)
        for number, x in enumerate(integers)
    ]
    return jnp.stack(padded, axis=1)
