"""The norm with its gradient as one Mosaic GPU kernel, for NVIDIA GPUs of the Hopper generation.

The forward pass is XLA's. Of the gradient XLA makes three passes: the sums over a row, what they are needed
for, and the weight's sum over all rows. Here a warp has a row in its registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops import dispatch, lanes_mosaic_gpu
from hax_jax.ops.gated_rms_norm import xla

# Rows of a program, and numbers that its lanes have asked for at a time, of each array.
ROWS, AT_ONCE = 64, 4096
# Each lane of a warp has its part of a row in registers.
WARP, MOST = 32, 1024


def gated_rms_norm(x, gate, weight, eps):
    """`ops.gated_rms_norm` on a Hopper GPU."""
    dispatch.check_mosaic_gpu("gated_rms_norm", why_not(x, gate, weight))
    return norm_in_tiles(x, gate, weight, eps)


def why_not(x, gate, weight) -> str | None:
    """Why the kernel cannot run this call, or None if it can."""
    dtypes = {array.dtype.name for array in (x, gate, weight)}
    if not dtypes <= {"float32", "bfloat16"}:
        return f"`x`, `gate` and `weight` must be float32 or bfloat16, got {', '.join(sorted(dtypes))}"
    if x.shape[-1] % WARP or x.shape[-1] > MOST:
        return f"`x` must have a multiple of {WARP} features, at most {MOST}, got {x.shape[-1]}"
    if x.size >= 2**31:
        return f"`x` must have fewer than 2^31 elements, got {x.size}"
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
    """dx and dgate (rows, d) of the gate's dtype, and parts of the weight's gradient, (parts, d)."""
    rows, width = x.shape
    # A row for each warp: neighbouring lanes read what lies side by side, and a row's sum stays in its warp.
    warps = lanes_mosaic_gpu.WARPS
    several, at_once = warps * width, next(n for n in (16, 8, warps) if n * width <= AT_ONCE or n == warps)
    layout = lanes_mosaic_gpu.quarters(several)

    def gated_norm_gradients(x_ref, gate_ref, dy_ref, weight_ref, dx_ref, dgate_ref, dweight_ref):
        program = lax.axis_index("i")
        load = functools.partial(plgpu.load, layout=layout, optimized=False)
        weight = load(weight_ref)

        def some_rows(j, dweight):
            first = (program * ROWS + j * at_once) * width
            places = [pl.ds(first + i * several, several) for i in range(at_once // warps)]
            # All are asked for before the first is written: none waits for another.
            loaded = [[load(ref.at[here]) for ref in (x_ref, gate_ref, dy_ref)] for here in places]
            for here, arrays in zip(places, loaded, strict=True):
                x, gate, dy = (array.astype(jnp.float32) for array in arrays)
                sigmoid = 1.0 / (1.0 + jnp.exp(-gate))
                u, dnormed = x * gate * sigmoid, dy * weight
                squares, products = (lanes_mosaic_gpu.quarter_sums(array) for array in (u * u, u * dnormed))
                scale = lax.rsqrt(squares / width + eps)
                du = dnormed * scale - u * (scale * scale * scale * products / width)
                dx_ref[here] = (du * gate * sigmoid).astype(dx_ref.dtype)
                dgate = du * x * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                dgate_ref[here] = dgate.astype(dgate_ref.dtype)
                dweight = dweight + dy * u * scale
            return dweight

        zero = plgpu.layout_cast(jnp.zeros(several, jnp.float32), layout)
        dweight_ref[program] = lax.fori_loop(0, ROWS // at_once, some_rows, zero)

    programs = rows // ROWS
    dx, dgate, dweight = plgpu.kernel(
        gated_norm_gradients,
        out_type=[
            # x may be wider because it is what was at hand; its gradient is rounded next, as the gate's is.
            jax.ShapeDtypeStruct((x.size,), gate.dtype),
            jax.ShapeDtypeStruct((x.size,), gate.dtype),
            jax.ShapeDtypeStruct((programs, several), jnp.float32),
        ],
        grid=(programs,),
        grid_names=("i",),
        compiler_params=plgpu.CompilerParams(
            # Its error is far below that of a bfloat16 number, not of a float32 one.
            approx_math=gate.dtype == jnp.bfloat16,
            # Nothing that is written is read: no store needs a barrier.
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(x.reshape(-1), gate.reshape(-1), dy.reshape(-1), jnp.tile(weight, warps))
    return dx.reshape(x.shape), dgate.reshape(x.shape), dweight.reshape(-1, width)
