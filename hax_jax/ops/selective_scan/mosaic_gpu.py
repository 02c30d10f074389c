"""The recurrence as Mosaic GPU kernels, for NVIDIA GPUs of the Hopper generation, with its gradients.

A row has too few channels to fill a GPU, so time is cut into chunks as well. One kernel finds what every
chunk does to a state that enters it (its decay and the state it adds); the next one joins the chunks before
it, in order, and runs its own chunk from there. The backward pass does the same from the end, and computes
states again from those that entered each tile of a few positions, which the forward pass saved. Nothing is
added atomically: sums over channels, rows and chunks have one order, so the same call gives the same bits.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops import dispatch, segments
from hax_jax.ops.numerics import pad_time
from hax_jax.ops.selective_scan import mosaic_gpu_kernels as kernels
from hax_jax.ops.selective_scan.mosaic_gpu_program import RESET, RESET_ROW, SLOTS, WARPGROUP, Plan

# A warpgroup's lanes, four to a channel.
MIN_CHANNELS = 32
MANY_CHUNKS = 16
# The share of the programs that the GPU works on at a time which is not worth narrower ones.
ENOUGH = 0.6
DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut; the defaults are what measured best (docs/performance.md).

    Args:
      steps: positions of a tile of the forward pass, 8, 16 or 32; a multiple of `backward_steps`.
      lanes: lanes that share the states of one channel, 1, 2 or 4; a group is 128 / lanes channels.
      groups: groups of channels a program of the forward pass works on.
      backward_steps: as `steps`, for the backward pass; the state that enters each of its tiles is saved.
      backward_lanes: as `lanes`, for the backward pass.
      backward_groups: as `groups`, for the backward pass.
      programs: that the GPU works on at a time. Where there are fewer, time is cut into chunks; that costs
        every exponential once more.
      keep_decays: whether the backward pass keeps a tile's decays in registers or computes them twice.
      pad: pad the inputs to whole tiles, for an interpreter that does not know reads beyond the end.
    """

    steps: int = 16
    lanes: int = 2
    groups: int = 1
    backward_steps: int = 8
    backward_lanes: int = 4
    backward_groups: int = 2
    programs: int = 264
    keep_decays: bool = True
    pad: bool = False

    def __post_init__(self):
        if self.steps % self.backward_steps:
            raise ValueError(f"`steps` must be a multiple of {self.backward_steps}, got {self.steps}")

    def plan(self, x: jax.Array, states: int, length: int, softplus: bool, backward: bool) -> Plan:
        batch, padded_length, channels = x.shape
        steps, lanes, groups = self.steps, self.lanes, self.groups
        if backward:
            steps, lanes, groups = self.backward_steps, self.backward_lanes, self.backward_groups
        tiles = pl.cdiv(padded_length, steps)
        while True:
            width = WARPGROUP // lanes * groups
            uncut = batch * channels / width
            chunks = min(max(int(self.programs / uncut), 1), tiles)
            # Wide programs do more with what they load; but every chunk joins those before it, and a number
            # of programs that is not worth cutting must not leave much of the GPU empty.
            fits = channels % width == 0 and chunks <= MANY_CHUNKS
            if width == MIN_CHANNELS or (fits and uncut * chunks >= ENOUGH * self.programs):
                break
            lanes, groups = (lanes, groups // 2) if groups > 1 else (lanes * 2, 1)
        # As many chunks as hold a tile each when all but the last have the same number of tiles.
        chunks = pl.cdiv(tiles, pl.cdiv(tiles, chunks))
        return Plan(batch, length, channels, states, steps, lanes, groups, tiles, chunks, softplus)


def why_not(x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> str | None:
    """What keeps these inputs from the kernels, or None: shapes and dtypes only, not the device."""
    channels, states = A.shape
    if channels % MIN_CHANNELS:
        return f"`x` must have a number of channels that is a multiple of {MIN_CHANNELS}, got {channels}"
    if states not in (8, 16, 32):
        return f"`A` must have 8, 16 or 32 states, got {states}"
    if not x.size:
        return f"`x` must not be empty, got shape {x.shape}"
    for name, array in {"x": x, "dt": dt, "A": A, "B": B, "C": C}.items():
        if array.dtype not in DTYPES:
            return f"`{name}` must be float32 or bfloat16, got {array.dtype}"
    return None


def selective_scan(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size, softplus):
    """As `ops.selective_scan`; raises ValueError where the kernels cannot run the call."""
    del chunk_size
    dispatch.check_mosaic_gpu("selective_scan", why_not(x, dt, A, B, C))
    tiles = tiles_for(A.shape[1])
    return scan_in_tiles(x, dt, A, B, C, D, initial_state, segment_ids, softplus, tiles)


def tiles_for(states: int) -> Tiles:
    """How the work is cut for so many states: those of a tile have to fit into the registers."""
    return Tiles() if states <= 16 else Tiles(lanes=4, backward_groups=1)


def scan_in_tiles(x, dt, A, B, C, D, initial_state, segment_ids, softplus: bool, tiles: Tiles):
    """`selective_scan` with the work cut as `tiles` says."""
    length = x.shape[1]
    A, D, initial_state = (None if p is None else p.astype(jnp.float32) for p in (A, D, initial_state))
    reset = None
    if segment_ids is not None:
        reset = pad_time(segments.starts(segment_ids), RESET_ROW)
        reset = jnp.where(reset, RESET, 0.0).astype(jnp.float32)
    if tiles.pad or _needs_whole_tiles(x, A.shape[1], tiles):
        x, dt, B, C = (pad_time(array, tiles.steps) for array in (x, dt, B, C))
    y, last = _scan(x, dt, A, B, C, D, initial_state, reset, length, softplus, tiles)
    return y[:, :length], last


def _needs_whole_tiles(x: jax.Array, states: int, tiles: Tiles) -> bool:
    """Whether copies of results beyond the end of a row would not end there.

    A tile as wide as its array is written as one piece, so its last positions would be the next row's. A row
    shorter than a tile is made one, too: a copy of more positions than there are is not relied on.
    """
    length = x.shape[1]
    plans = [tiles.plan(x, states, length, False, backward=backward) for backward in (False, True)]
    return length < tiles.steps or any(plan.blocks == 1 and length % plan.steps for plan in plans)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10))
def _scan(x, dt, A, B, C, D, start, reset, length, softplus, tiles):
    y, last, _ = _forward(x, dt, A, B, C, D, start, reset, length, softplus, tiles, save=False)
    return y, last


def _scan_forward(x, dt, A, B, C, D, start, reset, length, softplus, tiles):
    y, last, entry = _forward(x, dt, A, B, C, D, start, reset, length, softplus, tiles, save=True)
    return (y, last), (x, dt, A, B, C, D, start, reset, entry)


def _scan_backward(length, softplus, tiles, saved, gradients):
    x, dt, A, B, C, D, start, reset, entry = saved
    dy, dlast = gradients
    plan = tiles.plan(x, A.shape[1], length, softplus, backward=True)
    inputs = {"dt": dt, "dy": dy, "C": C, "reset": reset}
    chunks = _chunks(inputs, A, plan, reverse=True)
    inputs |= {"x": x, "B": B, "entry": entry}
    states = (plan.batch, plan.channels, plan.states)
    results = _call(
        functools.partial(kernels.backward_body, keep_decays=tiles.keep_decays),
        plan,
        inputs,
        {"A": A, "D": D, "dlast": dlast, **chunks},
        {
            "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "ddt": jax.ShapeDtypeStruct(dt.shape, dt.dtype),
            "dBC": _float32(plan.batch, plan.blocks, plan.tiles, 2 * plan.tile_states),
            "dA": _float32(plan.batch, plan.chunks, *A.shape),
            "dstart": _float32(*states),
            **({} if D is None else {"dD": _float32(plan.batch, plan.chunks, plan.channels)}),
        },
        {
            "dx_tile": plgpu.SMEM((SLOTS, plan.steps, plan.width), x.dtype),
            "ddt_tile": plgpu.SMEM((SLOTS, plan.steps, plan.width), dt.dtype),
            "parts": plgpu.SMEM((plan.group, plan.parts_row), jnp.float32),
            **({"slopes": plgpu.SMEM((plan.steps, plan.width), jnp.float32)} if softplus else {}),
        },
    )
    dBC = results["dBC"].sum(axis=1).reshape(plan.batch, plan.tiles, 2, plan.steps, plan.states)
    dB, dC = (
        dBC[:, :, which].reshape(plan.batch, -1, plan.states)[:, : array.shape[1]].astype(array.dtype)
        for which, array in enumerate((B, C))
    )
    dA = results["dA"].sum(axis=(0, 1))
    dD = None if D is None else results["dD"].sum(axis=(0, 1))
    dstart = None if start is None else results["dstart"]
    dreset = None if reset is None else jnp.zeros_like(reset)
    return results["dx"], results["ddt"], dA, dB, dC, dD, dstart, dreset


_scan.defvjp(_scan_forward, _scan_backward)


def _forward(x, dt, A, B, C, D, start, reset, length, softplus, tiles, save):
    plan = tiles.plan(x, A.shape[1], length, softplus, backward=False)
    inputs = {"dt": dt, "x": x, "B": B, "reset": reset}
    chunks = _chunks(inputs, A, plan, reverse=False)
    outputs = {
        "y": _float32(*x.shape),
        "last": _float32(plan.batch, plan.channels, plan.states),
    }
    if save:
        entries = plan.tiles * (plan.steps // tiles.backward_steps)
        outputs["entry_out"] = _float32(plan.batch, entries, plan.channels, plan.states)
    results = _call(
        functools.partial(kernels.forward_body, entry_steps=tiles.backward_steps),
        plan,
        inputs | {"C": C},
        {"A": A, "D": D, "start": start, **chunks},
        outputs,
        {"y_tile": plgpu.SMEM((SLOTS, plan.steps, plan.width), jnp.float32)},
    )
    return results["y"], results["last"], results.get("entry_out")


def _chunks(inputs, A, plan: Plan, reverse: bool) -> dict[str, jax.Array]:
    """Decay and state of every chunk that another follows, where there is more than one."""
    if plan.chunks == 1:
        return {}
    shape = _float32(plan.batch, plan.chunks - 1, plan.channels, plan.states)
    body = functools.partial(kernels.chunk_body, reverse=reverse)
    outputs = {"chunk_decay": shape, "chunk_state": shape}
    return _call(body, plan, inputs, {"A": A}, outputs, {}, chunks=plan.chunks - 1)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _call(
    body, plan: Plan, timed, whole, outputs, scratch, chunks: int | None = None
) -> dict[str, jax.Array]:
    """Runs a body on a grid of (row, block of channels, chunk of time).

    Args:
      body: called with its references by name, the plan, and the names of `timed`.
      plan: the sizes.
      timed: inputs that come in tiles of time; those that are None are left out.
      whole: other inputs; those that are None are left out.
      outputs: shapes of the results by name.
      scratch: further shared memory by name.
      chunks: how many chunks there is a program for; None for all.
    """
    timed = {name: array for name, array in timed.items() if array is not None}
    inputs = timed | {name: array for name, array in whole.items() if array is not None}
    shapes = {
        "entry": (plan.width, plan.states),
        "reset": (RESET_ROW,),
        "B": (plan.steps, plan.states),
        "C": (plan.steps, plan.states),
    }
    scratch = scratch | {
        f"{name}_tile": plgpu.SMEM((SLOTS, *shapes.get(name, (plan.steps, plan.width))), array.dtype)
        for name, array in timed.items()
    }
    for name in ("B", "C"):
        # Fewer values than lanes have no layout; they are read as they are.
        if name in timed and timed[name].dtype != jnp.float32 and plan.tile_states >= WARPGROUP:
            scratch[f"wide_{name}"] = plgpu.SMEM((plan.steps, plan.states), jnp.float32)
    if plan.softplus:
        scratch["time_steps"] = plgpu.SMEM((plan.steps, plan.width), jnp.float32)
    scratch["full"] = plgpu.Barrier(num_barriers=SLOTS, num_arrivals=len(timed))
    names = (*inputs, *outputs, *scratch)

    def kernel(*refs):
        body(types.SimpleNamespace(**dict(zip(names, refs, strict=True))), plan, tuple(timed))

    results = plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=(plan.batch, plan.blocks, chunks or plan.chunks),
        grid_names=("b", "block", "chunk"),
        # Tiles are read only after their barrier, and every slot is refilled only after one, so the barriers
        # that would be put around each access are not needed.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))
