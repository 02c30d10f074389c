"""The convolution with its gradient as one Mosaic GPU kernel, for NVIDIA GPUs of the Hopper generation.

The forward pass is XLA's: one fusion, near the bytes it has to move. Its gradient needs the filtered input at
several positions for every one it writes, and sums over all of them for the filter: XLA makes four passes of
it. Here a lane walks along time with one channel and keeps what the next positions need in registers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops import dispatch, segments
from hax_jax.ops.causal_conv1d import xla

LANES = 128
LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      steps: positions of one program are `steps` and one less than the filter's width.
      unroll: positions whose instructions are written one after the other; divides `steps`.
      pad: whether the input is padded beforehand, for the interpreter: the hardware reads zeros outside.
    """

    steps: int = 32
    unroll: int = 4
    pad: bool = False


def causal_conv1d(x, weight, bias, segment_ids):
    """`ops.causal_conv1d` on a Hopper GPU."""
    dispatch.check_mosaic_gpu("causal_conv1d", why_not(x, weight))
    return conv_in_tiles(x, weight, bias, segment_ids, Tiles())


def why_not(x, weight) -> str | None:
    """Why the kernel cannot run this call, or None if it can."""
    if x.dtype not in (jnp.float32, jnp.bfloat16) or weight.dtype not in (jnp.float32, jnp.bfloat16):
        return f"`x` and `weight` must be float32 or bfloat16, got {x.dtype} and {weight.dtype}"
    if x.shape[2] % 8:
        return f"the number of channels must be a multiple of 8, got {x.shape[2]}"
    if not 2 <= weight.shape[0] <= 8:
        return f"the filter must have 2 to 8 taps, got {weight.shape[0]}"
    return None


def conv_in_tiles(x, weight, bias, segment_ids, tiles: Tiles):
    """`causal_conv1d` on whatever device there is: a Hopper GPU, or the interpreter."""
    keep = None
    if segment_ids is not None:
        # keep[..., d]: whether the position d steps before belongs to the same segment.
        reach = segments.positions(segment_ids)[..., None]
        keep = (reach >= jnp.arange(4 * -(-weight.shape[0] // 4))).astype(jnp.float32)
    bias = jnp.zeros(weight.shape[1], weight.dtype) if bias is None else bias
    return _conv(x, weight, bias, segment_ids, keep, tiles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _conv(x, weight, bias, segment_ids, keep, tiles):
    del keep, tiles
    return xla.causal_conv1d(x, weight, bias, segment_ids)


def _forward(x, weight, bias, segment_ids, keep, tiles):
    return _conv(x, weight, bias, segment_ids, keep, tiles), (x, weight, bias, keep)


def _backward(tiles, residuals, dy):
    x, weight, bias, keep = residuals
    taps, channels = weight.shape
    # Lanes beyond the channels read and write nothing of x; what they read of the filter is zero.
    lanes = ((0, 0), (0, -channels % LANES))
    parameters = jnp.pad(jnp.concatenate([weight, bias[None]]).astype(jnp.float32), lanes)
    dx, sums = _gradients(x, dy.astype(x.dtype), parameters, keep, tiles)
    sums = sums.sum((0, 1))[:, :channels]
    return dx, sums[:taps].astype(weight.dtype), sums[taps].astype(bias.dtype), None, None


_conv.defvjp(_forward, _backward)


def _gradients(x, dy, parameters, keep, tiles: Tiles):
    """dx, and for each program the sums over its positions: (b, programs, taps + 1, channels)."""
    batch, length, channels = x.shape
    halo = parameters.shape[0] - 2
    size = tiles.steps + halo
    programs = -(-length // size)
    inputs = [x, dy] if keep is None else [x, dy, keep]
    before = [halo, 0, 0]
    if tiles.pad:
        after = programs * size + halo + 8 - length
        width = -channels % LANES
        inputs = [
            jnp.pad(array, ((0, 0), (front, after), (0, width if array.shape[2] == channels else 0)))
            for array, front in zip(inputs, before, strict=False)
        ]
        before = [0, 0, 0]

    def conv_gradients(*refs):
        count = len(inputs)
        sources, parameters_ref, dx_ref, sums_ref = refs[:count], *refs[count : count + 3]
        *loaded, dx_sm, arrived = refs[count + 3 :]
        b, i, k = (lax.axis_index(name) for name in ("b", "i", "k"))
        lanes = pl.ds(k * LANES, LANES)
        for source, front, target in zip(sources, before, loaded, strict=False):
            time = pl.ds(i * size - front, target.shape[0])
            here = source.at[b, time, lanes] if target.shape[1] == LANES else source.at[b, time]
            plgpu.copy_gmem_to_smem(here, target, arrived)
        *filters, bias = (_load(parameters_ref.at[tap, lanes]) for tap in range(halo + 2))
        plgpu.barrier_wait(arrived)
        step = functools.partial(_step, loaded, dx_sm, filters, bias)
        zero = plgpu.layout_cast(jnp.zeros(LANES, jnp.float32), LAYOUT)
        past = tuple(_load(loaded[0].at[halo - d]) for d in range(1, halo + 1))
        carry = (past, (zero,) * halo, (zero,) * (halo + 2))
        for s in range(halo):
            carry = step(s, carry, whole=False)
        carry = lax.fori_loop(
            0, tiles.steps // tiles.unroll,
            lambda j, carry: functools.reduce(
                lambda carry, u: step(halo + j * tiles.unroll + u, carry), range(tiles.unroll), carry
            ),
            carry,
        )  # fmt: skip
        sums = carry[2]
        for s in range(size, size + halo):
            carry = step(s, carry)
        for tap, value in enumerate(sums):
            sums_ref[b, i, tap, lanes] = value
        plgpu.commit_smem()
        _write(dx_sm, dx_ref.at[b, :, lanes], i * size, one_piece=dx_ref.shape[2] == LANES)

    # A copy must be a multiple of 128 bytes; a row of `keep` may have 16.
    rows = [size + 2 * halo, size + halo, -(-(size + halo) // 8) * 8]
    widths = [LANES, LANES, inputs[2].shape[2] if keep is not None else 0]
    time_out = programs * size if tiles.pad else length
    dx, sums = plgpu.kernel(
        conv_gradients,
        out_type=[
            jax.ShapeDtypeStruct((batch, time_out, inputs[0].shape[2]), x.dtype),
            jax.ShapeDtypeStruct((batch, programs, halo + 2, parameters.shape[1]), jnp.float32),
        ],
        scratch_types=[
            *(
                plgpu.SMEM((row, width), array.dtype)
                for row, width, array in zip(rows, widths, inputs, strict=False)
            ),
            plgpu.SMEM((size, LANES), x.dtype),
            plgpu.Barrier(num_arrivals=len(inputs)),
        ],
        grid=(batch, programs, parameters.shape[1] // LANES),
        grid_names=("b", "i", "k"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*inputs, parameters)
    return dx[:, :length, :channels], sums


def _write(tile, target, start, one_piece: bool):
    """Copies the rows of a tile that lie inside the target (time, lanes).

    The hardware leaves out the others, unless the tile is as wide as the array: such a tile is copied as one
    piece, over the beginning of the next row of the batch.
    """
    size, length = tile.shape[0], target.shape[0]

    def whole():
        plgpu.copy_smem_to_gmem(tile, target.at[pl.ds(start, size)])
        plgpu.wait_smem_to_gmem(0)

    def row_by_row():
        def row(r, _):
            plgpu.copy_smem_to_gmem(tile.at[r], target.at[start + r])

        lax.fori_loop(0, length - start, row, None)
        plgpu.wait_smem_to_gmem(0)

    if one_piece and length % size:
        pl.when(start + size <= length)(whole)
        pl.when(start + size > length)(row_by_row)
    else:
        whole()


def _step(loaded, dx_sm, filters, bias, s, carry, whole=True):
    """One position: its share of the sums, and of dx at its own and the positions before it.

    The carry holds x at the positions before, dx that is not complete yet, and the sums.
    """
    past, pending, sums = carry
    halo = len(past)
    x_sm, dy_sm, *keep_sm = loaded
    seen = (_load(x_sm.at[s + halo]), *past)
    # Beyond the row's end everything is zero, and so is what it adds.
    kept = [x * keep_sm[0][s, d] if keep_sm and d else x for d, x in enumerate(seen)]
    before = bias
    for d, x in enumerate(kept):
        before = before + filters[halo - d] * x
    sigmoid = 1.0 / (1.0 + jnp.exp(-before))
    gradient = _load(dy_sm.at[s]) * sigmoid * (1.0 + before * (1.0 - sigmoid))
    pending = [*(dx for dx in pending), None]
    shares = [gradient * filters[halo - d] for d in range(halo + 1)]
    if keep_sm:
        shares = [share * keep_sm[0][s, d] if d else share for d, share in enumerate(shares)]
    # pending[d - 1] belongs to the position d steps before this one.
    complete = pending[halo - 1] + shares[halo]
    pending = (shares[0], *(pending[d - 1] + shares[d] for d in range(1, halo)))
    if whole:
        dx_sm[s - halo] = complete.astype(dx_sm.dtype)
    sums = (
        *(total + gradient * kept[halo - tap] for tap, total in enumerate(sums[:-1])),
        sums[-1] + gradient,
    )
    return seen[:halo], pending, sums


def _load(ref):
    return plgpu.load(ref, layout=LAYOUT, optimized=False).astype(jnp.float32)
