"""What Pallas lacks for lanes: reading and writing memory where each of them says, and sums within a warp.

Vectors are laid out with one position a lane (`layout`), or a part for each warp (`quarters`); indices are
int32. Pallas' interpreter, which tests use on a CPU, cannot run the inlined instructions, so there the same
is said in JAX.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, memref, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

# How tests on a CPU run the kernels: Pallas' interpreter's settings, or None to compile them.
interpret: Any = None

# A warpgroup has this many lanes; vectors are as long or a multiple of it.
LANES = 128
WARPS = 4


def layout(count):
    return plgpu.Layout.WG_STRIDED((count,), vec_size=1)


def iota(count):
    return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout(count))


def full(count, value, dtype=jnp.int32):
    return plgpu.layout_cast(jnp.full((count,), value, dtype), layout(count))


def load(ref, count):
    """A vector from memory of any kind."""
    return plgpu.load(ref, layout=layout(count), optimized=False)


def gather(ref, index):
    """ref[index] for `ref` in memory of any kind; every index must be inside it."""
    (count,) = index.shape
    is_signed = True if jnp.issubdtype(ref.dtype, jnp.integer) else None
    if interpret is not None:
        return ref[...][index]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), layout(count)),
        return_type=plgpu.ShapeDtypeStruct((count,), ref.dtype, layout=layout(count)),
    )
    def read(ctx, ref, index):
        del ctx
        load = lambda i, _: memref.load(ref, [_as_index(i)])  # noqa: E731
        return index.foreach(load, create_array=True, is_signed=is_signed)

    return read(ref, index)


def scatter(ref, index, *values):
    """ref[x, index] = values[x] for int32 `ref` (x, size) in shared memory.

    Indices beyond the end are left out; no two others may be equal. All lanes have written when this returns.
    """
    (count,) = index.shape
    if interpret is not None:
        for x, value in enumerate(values):
            ref[x] = ref[x].at[index].set(value, mode="drop")
        return
    size = ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout(count), [layout(count)] * len(values)))
    def write(ctx, ref, index, values):
        del ctx
        # What other lanes still read of the memory comes first.
        mgpu.warpgroup_barrier()
        registers: list[list[ir.Value]] = [[] for _ in values]
        for registers_of_value, value in zip(registers, values, strict=True):
            value.foreach(lambda v, _, to=registers_of_value: to.append(v))
        number = iter(range(count // LANES))

        def store(i, _):
            here = next(number)
            inside = arith.cmpi(arith.CmpIPredicate.ult, i, mgpu.c(size, i.type))
            with mgpu.when(inside):
                for x, registers_of_value in enumerate(registers):
                    memref.store(registers_of_value[here], ref, [mgpu.c(x, ir.IndexType.get()), _as_index(i)])

        index.foreach(store)
        mgpu.warpgroup_barrier()

    write(ref, index, list(values))


def put(ref, index, value):
    """ref[index] = value for `ref` (size,) in memory of any kind, of one lane of 128 for each index.

    Indices outside are left out; no two others may be equal. Nothing waits for the others' writing.
    """
    (size,) = ref.shape
    if interpret is not None:
        # JAX would count negative ones from the end.
        ref[...] = ref[...].at[jnp.where(index < 0, size, index)].set(value, mode="drop")
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout(LANES), layout(LANES)))
    def write(ctx, ref, index, value):
        del ctx
        registers: list[ir.Value] = []
        value.foreach(lambda v, _: registers.append(v))

        def store(i, _):
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, i, mgpu.c(size, i.type))):
                memref.store(registers[0], ref, [_as_index(i)])

        index.foreach(store)

    write(ref, index, value)


def quarters(count):
    """A layout in which each warp has a quarter of a vector, and each of its lanes neighbouring elements."""
    return plgpu.Layout.WG_STRIDED((count,), vec_size=count // LANES)


def quarter_sums(array):
    """Each quarter of a float32 vector in the layout `quarters` filled with its sum."""
    (count,) = array.shape
    if interpret is not None:
        rows = array.reshape(WARPS, -1)
        return jnp.broadcast_to(rows.sum(1, keepdims=True), rows.shape).reshape(count)
    result = plgpu.ShapeDtypeStruct((count,), jnp.float32, layout=quarters(count))

    @plgpu.inline_mgpu(arg_types=(quarters(count),), return_type=result)
    def add(ctx, array):
        del ctx
        (register,) = array.registers
        elements = (
            vector.extract(register, dynamic_position=[], static_position=[i]) for i in range(count // LANES)
        )
        total = functools.reduce(arith.addf, elements)
        for distance in (16, 8, 4, 2, 1):
            total = arith.addf(total, mgpu.utils.shfl_bfly(total, distance))
        filled = np.asarray([vector.broadcast(register.type, total)], dtype=object)
        return mgpu.FragmentedArray(_registers=filled, _layout=array.layout, _is_signed=None)

    return add(array)


def _as_index(i):
    return arith.index_cast(ir.IndexType.get(), i)
