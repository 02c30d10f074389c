"""The convolution's two kernels, in which a lane walks along time with one channel.

What the next positions need stays in its registers. Channels go in groups of 128 lanes; blocks of channels
are arrays of their own, and a group may have lanes of several of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops import lanes_mosaic_gpu

LANES = lanes_mosaic_gpu.LANES
# What a program can have on Hopper, less what else it holds.
_SHARED_BYTES = 227 * 1024 - 4096
# The first channel and the number of channels of each block.
Blocks = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      steps: positions of one program; of the gradient's, one less than the filter's width are added.
      unroll: positions whose instructions are written one after the other; divides `steps`.
      pad: whether inputs are padded beforehand, for the interpreter: the hardware reads zeros outside.
    """

    steps: int = 32
    unroll: int = 4
    pad: bool = False


def fits(dtype, taps: int, blocks: Blocks, tiles: Tiles) -> bool:
    """Whether the gradient's tiles fit into shared memory."""
    halo = taps - 1
    size = tiles.steps + halo
    rows = (size + 2 * halo) + len(_shared_tiles(blocks)) * (size + halo) + size
    return rows * LANES * jnp.dtype(dtype).itemsize <= _SHARED_BYTES


def outputs(x, parameters, keep, blocks: Blocks, tiles: Tiles):
    """SiLU of the filtered x (b, t, c), an array (b, t, size) for each block of channels.

    Args:
      x: (b, t, c).
      parameters: (w + 1, lanes) float32, the filter's taps and the bias.
      keep: (b, t, >= w) float32, 0 where nothing is to be seen of the position d steps before, and for d = 0
        where the result is zero, whatever the filter sees; None where there is no such place.
      blocks: of channels.
      tiles: how the work is cut.
    """
    batch, length, _ = x.shape
    halo, size = parameters.shape[0] - 2, tiles.steps
    programs = -(-length // size)
    time = programs * size if tiles.pad else length
    sources, before = [x], halo
    keeps = [] if keep is None else [keep]
    if tiles.pad:
        sources, before = [_surrounded(x, (halo, time - length), 0, parameters)], 0
        keeps = [_in_time(keep, (0, time - length)) for keep in keeps]
    sources += keeps

    def conv_outputs(*refs):
        x_ref, *keep_ref = refs[: len(sources)]
        parameters_ref, *y_refs, x_sm = refs[len(sources) : len(sources) + len(blocks) + 2]
        *keep_sm, arrived = refs[len(sources) + len(blocks) + 2 :]
        b, i, k = (lax.axis_index(name) for name in ("b", "i", "k"))
        plgpu.copy_gmem_to_smem(_tile(x_ref, x_sm, b, i * size - before, k * LANES), x_sm, arrived)
        _bring_keep(keep_ref, keep_sm, b, i * size, arrived)
        *filters, bias = _filter(parameters_ref, k, halo)
        channel = lanes_mosaic_gpu.iota(LANES) + k * LANES
        plgpu.barrier_wait(arrived)

        def step(s, past):
            seen = (_load(x_sm.at[s + halo]), *past)
            filtered = _filtered(_kept(seen, keep_sm, s), filters, bias)
            y = filtered / (1.0 + jnp.exp(-filtered))
            if keep_sm:
                y = y * keep_sm[0][s, 0]
            t = i * size + s
            for (first, width), y_ref in zip(blocks, y_refs, strict=True):
                # Lanes of other blocks are left out, and positions beyond the row's end.
                place = jnp.where(t < time, channel - first, width)
                lanes_mosaic_gpu.put(y_ref.at[b, t], place, y.astype(y_ref.dtype))
            return seen[:halo]

        past = tuple(_load(x_sm.at[halo - d]) for d in range(1, halo + 1))
        _walk(step, 0, tiles, past)

    ys = plgpu.kernel(
        conv_outputs,
        out_type=[jax.ShapeDtypeStruct((batch, time, width), x.dtype) for _, width in blocks],
        scratch_types=[
            _rows(size + halo, x),
            *_keep_rows(size, keeps),
            plgpu.Barrier(num_arrivals=len(sources)),
        ],
        **_grid(batch, programs, parameters, x.dtype),
    )(*sources, parameters)
    return tuple(y[:, :length] for y in ys)


def gradients(x, dys, parameters, keep, blocks: Blocks, tiles: Tiles):
    """The gradient of x, and for each program the sums over its positions: (b, programs, w + 1, lanes).

    Args:
      x, parameters, keep, blocks, tiles: as those of `outputs`.
      dys: the gradients of its results, in the dtype of x.
    """
    batch, length, channels = x.shape
    halo = parameters.shape[0] - 2
    size = tiles.steps + halo
    programs = -(-length // size)
    time = programs * size if tiles.pad else length
    sources, before, firsts = [x, *dys], halo, [first for first, _ in blocks]
    keeps = [] if keep is None else [keep]
    if tiles.pad:
        after = time - length + halo + 8
        sources = [
            _surrounded(x, (halo, after), 0, parameters),
            *(_surrounded(dy, (0, after), first, parameters) for dy, first in zip(dys, firsts, strict=True)),
        ]
        keeps = [_in_time(keep, (0, after)) for keep in keeps]
        before, firsts = 0, [0] * len(firsts)
    sources += keeps
    shared = _shared_tiles(blocks)

    def conv_gradients(*refs):
        x_ref, *dy_refs = refs[: 1 + len(dys)]
        *keep_ref, parameters_ref, dx_ref, sums_ref, x_sm = refs[1 + len(dys) : len(sources) + 4]
        dy_sms = refs[len(sources) + 4 : len(sources) + 4 + len(shared)]
        *keep_sm, dx_sm, arrived = refs[len(sources) + 4 + len(shared) :]
        b, i, k = (lax.axis_index(name) for name in ("b", "i", "k"))
        start = i * size
        plgpu.copy_gmem_to_smem(_tile(x_ref, x_sm, b, start - before, k * LANES), x_sm, arrived)
        for target, members in zip(dy_sms, shared, strict=True):
            for number, groups in members:
                tile = _tile(dy_refs[number], target, b, start, k * LANES - firsts[number])
                copy = functools.partial(plgpu.copy_gmem_to_smem, tile, target, arrived)
                pl.when((k >= groups.start) & (k < groups.stop))(copy)
        _bring_keep(keep_ref, keep_sm, b, start, arrived)
        *filters, bias = _filter(parameters_ref, k, halo)
        plgpu.barrier_wait(arrived)
        step = functools.partial(_gradient_step, (x_sm, dy_sms, keep_sm), dx_sm, filters, bias)
        zero = lanes_mosaic_gpu.full(LANES, 0.0, jnp.float32)
        past = tuple(_load(x_sm.at[halo - d]) for d in range(1, halo + 1))
        carry = (past, (zero,) * halo, (zero,) * (halo + 2))
        for s in range(halo):
            carry = step(s, carry, whole=False)
        carry = _walk(step, halo, tiles, carry)
        sums = carry[2]
        for s in range(size, size + halo):
            carry = step(s, carry)
        for tap, value in enumerate(sums):
            sums_ref[b, i, tap, _lanes(k)] = value
        plgpu.commit_smem()
        _write(dx_sm, dx_ref.at[b, :, _lanes(k)], start, one_piece=dx_ref.shape[2] == LANES)

    dx, sums = plgpu.kernel(
        conv_gradients,
        out_type=[
            jax.ShapeDtypeStruct((batch, time, sources[0].shape[2]), x.dtype),
            jax.ShapeDtypeStruct((batch, programs, halo + 2, parameters.shape[1]), jnp.float32),
        ],
        scratch_types=[
            _rows(size + 2 * halo, x),
            *[_rows(size + halo, x)] * len(shared),
            *_keep_rows(size + halo, keeps),
            _rows(size, x),
            plgpu.Barrier(num_arrivals=1 + len(shared) + len(keeps)),
        ],
        **_grid(batch, programs, parameters, x.dtype),
    )(*sources, parameters)
    return dx[:, :length, :channels], sums


def _gradient_step(loaded, dx_sm, filters, bias, s, carry, whole=True):
    """One position: its share of the sums, and of dx at its own and the positions before it.

    The carry holds x at the positions before, dx that is not complete yet, and the sums.
    """
    past, pending, sums = carry
    halo = len(past)
    x_sm, dy_sms, keep_sm = loaded
    seen = (_load(x_sm.at[s + halo]), *past)
    # Beyond the row's end everything is zero, and so is what it adds.
    kept = _kept(seen, keep_sm, s)
    filtered = _filtered(kept, filters, bias)
    sigmoid = 1.0 / (1.0 + jnp.exp(-filtered))
    # Of lanes that belong to another block a tile holds zeros.
    dy = sum(_load(dy_sm.at[s]) for dy_sm in dy_sms)
    if keep_sm:
        dy = dy * keep_sm[0][s, 0]
    gradient = dy * sigmoid * (1.0 + filtered * (1.0 - sigmoid))
    shares = _kept([gradient * filters[halo - d] for d in range(halo + 1)], keep_sm, s)
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


def _filtered(kept, filters, bias):
    """The filter's result from x at the position itself and those before it."""
    for x, tap in zip(kept, reversed(filters), strict=True):
        bias = bias + tap * x
    return bias


def _kept(values, keep_sm, s):
    """Values of the positions d steps before, d = 0 first, with zeros for earlier ones that are not seen."""
    return [value * keep_sm[0][s, d] if keep_sm and d else value for d, value in enumerate(values)]


def _walk(step, start, tiles: Tiles, carry):
    """step(s, carry) -> carry for `tiles.steps` positions from `start` on."""

    def several(j, carry):
        for u in range(tiles.unroll):
            carry = step(start + j * tiles.unroll + u, carry)
        return carry

    return lax.fori_loop(0, tiles.steps // tiles.unroll, several, carry)


def _shared_tiles(blocks: Blocks) -> list[list[tuple[int, range]]]:
    """Which blocks are brought to which tile of a program, and for which groups of lanes.

    Blocks that have lanes in the same group need a tile each. In a group where a tile's block has no lanes,
    all that is brought lies outside of it: zeros.
    """
    spans = [range(first // LANES, (first + width - 1) // LANES + 1) for first, width in blocks]
    tiles: list[list[int]] = []
    for number, span in enumerate(spans):
        free = [tile for tile in tiles if spans[tile[-1]].stop <= span.start]
        if free:
            free[0].append(number)
        else:
            tiles.append([number])
    groups = max(span.stop for span in spans)
    found = []
    for tile in tiles:
        starts = [0, *(spans[number].start for number in tile[1:]), groups]
        found.append([(number, range(*starts[at : at + 2])) for at, number in enumerate(tile)])
    return found


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


def _grid(batch: int, programs: int, parameters, dtype) -> dict[str, Any]:
    return {
        "grid": (batch, programs, parameters.shape[1] // LANES),
        "grid_names": ("b", "i", "k"),
        "compiler_params": plgpu.CompilerParams(
            # Its error is far below that of a bfloat16 number, not of a float32 one.
            approx_math=dtype == jnp.bfloat16,
            # Nothing that lanes write is read before `commit_smem`: no store needs a barrier.
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    }


def _rows(count: int, array):
    """Shared memory for so many positions of a group's lanes."""
    return plgpu.SMEM((count, LANES), array.dtype)


def _keep_rows(count: int, keeps) -> list:
    """Shared memory for so many positions of `keep`, if there is one."""
    # A copy must be a multiple of 128 bytes; a row may have 16.
    return [plgpu.SMEM((-(-count // 8) * 8, keep.shape[2]), keep.dtype) for keep in keeps]


def _tile(ref, target, b, start, first_lane):
    """The part of an array that a tile of shared memory is to hold: from a position, and a lane, on."""
    return ref.at[b, pl.ds(start, target.shape[0]), pl.ds(first_lane, LANES)]


def _bring_keep(refs, targets, b, start, barrier):
    for ref, target in zip(refs, targets, strict=True):
        plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(start, target.shape[0])], target, barrier)


def _lanes(k):
    return pl.ds(k * LANES, LANES)


def _filter(ref, k, halo):
    """The taps and the bias of a group's lanes."""
    return [_load(ref.at[tap, _lanes(k)]) for tap in range(halo + 2)]


def _load(ref):
    return lanes_mosaic_gpu.load(ref, LANES).astype(jnp.float32)


def _surrounded(array, time: tuple[int, int], first: int, parameters):
    """A block of channels where it lies among all lanes, with so many more positions: zeros."""
    lanes = (first, parameters.shape[1] - first - array.shape[2])
    return jnp.pad(array, ((0, 0), time, lanes))


def _in_time(array, time: tuple[int, int]):
    return jnp.pad(array, ((0, 0), time, (0, 0)))
