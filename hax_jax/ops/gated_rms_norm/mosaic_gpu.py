"""The norm with its gradient as one Mosaic GPU kernel, for NVIDIA GPUs of the Hopper generation.

The forward pass is XLA's. Of the gradient XLA makes three passes: the sums over a row, what they are needed
for, and the weight's sum over all rows. Here a program reads its rows twice, the second time from the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops import dispatch
from hax_jax.ops.gated_rms_norm import xla

# Rows of a program, and the columns it holds in registers at a time.
ROWS, COLUMNS = 64, 32
TILE = (ROWS, COLUMNS)
LAYOUT = plgpu.Layout.WGMMA


def gated_rms_norm(x, gate, weight, eps):
    """`ops.gated_rms_norm` on a Hopper GPU."""
    dispatch.check_mosaic_gpu("gated_rms_norm", why_not(x, gate, weight))
    return norm_in_tiles(x, gate, weight, eps)


def why_not(x, gate, weight) -> str | None:
    """Why the kernel cannot run this call, or None if it can."""
    dtypes = {array.dtype.name for array in (x, gate, weight)}
    if not dtypes <= {"float32", "bfloat16"}:
        return f"`x`, `gate` and `weight` must be float32 or bfloat16, got {', '.join(sorted(dtypes))}"
    if x.shape[-1] % COLUMNS:
        return f"`x` must have a multiple of {COLUMNS} features, got {x.shape[-1]}"
    return None


def why_rather_not(x) -> str | None:
    """Why None should not mean the kernel: rows that do not fill its programs are copied first."""
    rows = x.size // x.shape[-1]
    return f"{rows} rows are no multiple of {ROWS}" if rows % ROWS else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def norm_in_tiles(x, gate, weight, eps):
    """`gated_rms_norm` on whatever device there is: a Hopper GPU, or the interpreter."""
    return xla.gated_rms_norm(x, gate, weight, eps)


def _forward(x, gate, weight, eps):
    return xla.gated_rms_norm(x, gate, weight, eps), (x, gate, weight)


def _backward(eps, residuals, dy):
    x, gate, weight = residuals
    width = x.shape[-1]
    rows = x.size // width
    # Zeros have no part in the weight's gradient.
    filled = lambda array: jnp.pad(array.reshape(rows, width), ((0, -rows % ROWS), (0, 0)))  # noqa: E731
    dx, dgate, dweight = _gradients(filled(x), filled(gate), filled(dy), weight.astype(jnp.float32), eps)
    return (
        dx[:rows].reshape(x.shape).astype(x.dtype),
        dgate[:rows].reshape(x.shape),
        dweight.sum(0).astype(weight.dtype),
    )


norm_in_tiles.defvjp(_forward, _backward)


def _gradients(x, gate, dy, weight, eps):
    """dx and dgate (rows, d) of the gate's dtype, and the weight's gradient of each program (programs, d)."""
    rows, width = x.shape

    def gated_norm_gradients(x_ref, gate_ref, dy_ref, weight_ref, dx_ref, dgate_ref, dweight_ref):
        program = lax.axis_index("i")
        here = pl.ds(program * ROWS, ROWS)

        def read(k):
            columns = pl.ds(k * COLUMNS, COLUMNS)
            x, gate, dy = (_load(ref.at[here, columns], LAYOUT) for ref in (x_ref, gate_ref, dy_ref))
            weight = _load(weight_ref.at[columns], LAYOUT.reduce(0))
            return x, gate, 1.0 / (1.0 + jnp.exp(-gate)), dy, lax.broadcast_in_dim(weight, TILE, [1])

        squares = plgpu.layout_cast(jnp.zeros(ROWS, jnp.float32), LAYOUT.reduce(1))
        products = squares
        for k in range(width // COLUMNS):
            x, gate, sigmoid, dy, weight = read(k)
            u = x * gate * sigmoid
            squares = squares + (u * u).sum(axis=1)
            products = products + (u * dy * weight).sum(axis=1)
        scale = lax.rsqrt(squares / width + eps)
        shrink = lax.broadcast_in_dim(scale * scale * scale * products / width, TILE, [0])
        scale = lax.broadcast_in_dim(scale, TILE, [0])
        for k in range(width // COLUMNS):
            columns = pl.ds(k * COLUMNS, COLUMNS)
            x, gate, sigmoid, dy, weight = read(k)
            u = x * gate * sigmoid
            du = dy * weight * scale - u * shrink
            dx_ref[here, columns] = (du * gate * sigmoid).astype(dx_ref.dtype)
            dgate = du * x * sigmoid * (1.0 + gate * (1.0 - sigmoid))
            dgate_ref[here, columns] = dgate.astype(dgate_ref.dtype)
            dweight_ref[program, columns] = (dy * u * scale).sum(axis=0)

    programs = rows // ROWS
    return plgpu.kernel(
        gated_norm_gradients,
        out_type=[
            # x may be wider because it is what was at hand; its gradient is rounded next, as the gate's is.
            jax.ShapeDtypeStruct(x.shape, gate.dtype),
            jax.ShapeDtypeStruct(gate.shape, gate.dtype),
            jax.ShapeDtypeStruct((programs, width), jnp.float32),
        ],
        grid=(programs,),
        grid_names=("i",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(x, gate, dy, weight)


def _load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
