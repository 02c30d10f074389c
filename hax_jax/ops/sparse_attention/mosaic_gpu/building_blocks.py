"""What the kernels are made of: split products, loads in the matrix unit's layout, padding, memory.

Matrices of a kernel are (rows, columns) accumulators of `wgmma`, in the layout that it leaves them in. Inputs
come in parts (see `parts`): shared memory holds them as (parts, rows, features).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops.numerics import bfloat16_parts, split
from hax_jax.ops.sparse_attention.chunks import visible

# How tests on a CPU run the kernels: Pallas' interpreter's settings, or None to compile them.
interpret: Any = None

# A matrix instruction has 64 rows: chunks have 64 queries.
ROWS = 64
# The number of keys of a chunk is a multiple of this: Pallas sums over whole tiles of shared memory, which
# are so long at the second widest swizzle.
KEYS = 32
FEATURES = (16, 32, 64, 128)
# Values are padded to a multiple of this.
WIDTH = 64
# What a program may use of a multiprocessor's 227 KiB, with room for integers and what the compiler adds.
SHARED_MEMORY = 219 * 1024

_ALONG_ROWS = plgpu.Layout.WGMMA.reduce(1)
ALONG_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def product(a_sm, b_sm, shape, meanwhile=None):
    """a b^T of the sums of parts, in float32; both (parts, rows, features) in shared memory.

    With `meanwhile`, the pair of the product and of what that function computes while the product runs.
    """

    def multiply(acc_ref):
        for a, b in _pairs(a_sm.shape[0]):
            plgpu.wgmma(acc_ref, a_sm.at[a], b_sm.at[b].transpose((1, 0)))
        if meanwhile is None:
            return acc_ref[...]
        result = meanwhile()
        return acc_ref[...], result

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def product_from_registers(a, b_sm, shape, parts):
    """a b with float32 a in registers, split there, and b (parts, rows, features) in shared memory."""
    pieces = split(a, parts)

    def multiply(acc_ref):
        for a_part, b_part in _pairs(parts):
            plgpu.wgmma(acc_ref, pieces[a_part], b_sm.at[b_part])
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def add_product_from_registers(total, a, b_sm, parts):
    """total + a b, as `product_from_registers` has a and b."""
    # The matrix unit cuts low bits off long sums: what float32 inputs gain by their parts it would lose here.
    # And Pallas' interpreter has no accumulators that begin with a value.
    if parts > 1 or interpret is not None:
        return total + product_from_registers(a, b_sm, total.shape, parts)
    a = a.astype(jnp.bfloat16)

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a, b_sm.at[0])

    return pl.run_state(multiply)(plgpu.ACC.init(total))


def _pairs(parts):
    """The products of parts that float32 can tell from zero, small ones first."""
    return [(a, b) for total in reversed(range(parts)) for a in range(parts) for b in [total - a] if b >= 0]


def accumulate(step, count, shape):
    if count == 1:
        return step(0, zeros(shape))
    return lax.fori_loop(jnp.int32(0), jnp.int32(count), step, zeros(shape))


def zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def filled_rows(count, value):
    """A number for each row of a matrix."""
    return plgpu.layout_cast(jnp.full((count,), value, jnp.float32), _ALONG_ROWS)


def mask(kinds, rows, columns, shape, transposed):
    rows = [down(x, shape) for x in rows]
    columns = [across(x, shape) for x in columns]
    return visible(kinds, columns, rows) if transposed else visible(kinds, rows, columns)


def down(x, shape):
    return lax.broadcast_in_dim(x, shape, [0])


def across(x, shape):
    return lax.broadcast_in_dim(x, shape, [1])


def copy_parts(ref, index, target, barrier):
    """One copy a part: the copy engine takes arrays of five axes at most."""
    for part in range(target.shape[0]):
        plgpu.copy_gmem_to_smem(ref.at[(part, *index)], target.at[part], barrier)


def load(ref, layout, optimized=True):
    return plgpu.load(ref, layout=layout, optimized=optimized)


def load_row(ref):
    return load(ref, _ALONG_ROWS, optimized=False)


def load_rows(ref, count):
    return [load_row(ref.at[x]) for x in range(count)]


def load_columns(ref, count):
    return [load(ref.at[x], ALONG_COLUMNS) for x in range(count)]


def kernel(body, *, grid, **types):
    if interpret is not None:
        types["interpret"] = interpret
    return plgpu.kernel(
        body,
        grid=grid,
        grid_names=("head", "chunk", "block"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **types,
    )


def array(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def tiled(shape, dtype, summed_over=ROWS):
    """Shared memory in the tiles that matrix instructions read, with the widest swizzle that fits.

    Both factors of a product need the same one, and where a product sums over rows, `summed_over` of them,
    these must be whole tiles.
    """
    for swizzle in (128, 64, 32):
        columns = swizzle // jnp.dtype(dtype).itemsize
        if shape[-1] % columns == 0 and summed_over % columns == 0:
            tiling = plgpu.TilingTransform((8, columns))  # type: ignore[abstract]
            swizzling = plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
            return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzling))
    raise ValueError(f"the last axis of {shape} is not a multiple of 32 bytes")


def padded_features(count):
    return next(size for size in FEATURES if size >= count)


def padded_values(count):
    return -(-count // WIDTH) * WIDTH


def pad_features(x):
    return _pad(x, 3, padded_features(x.shape[-1]))


def pad_values(x):
    return _pad(x, 3, padded_values(x.shape[-1]))


def _pad(x, axis, size):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths) if size > x.shape[axis] else x


def parts(x):
    """(p, h, c, ...) bfloat16 arrays whose sum is x: itself, or three for float32."""
    return bfloat16_parts(x, 1 if x.dtype == jnp.bfloat16 else 3)


def stack(integers, absent, size):
    """(c, number, size) of integers (c, slots); absent positions in slots that pad."""
    padded = [
        jnp.pad(x, ((0, 0), (0, size - x.shape[1])), constant_values=absent if number == 0 else 0)
        for number, x in enumerate(integers)
    ]
    return jnp.stack(padded, axis=1)
