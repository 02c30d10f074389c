"""The kernels of `mosaic_gpu`: what one program does with its channels and its part of the time."""

import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops.selective_scan.mosaic_gpu_program import LOG2_E, RESET, SLOTS, WARPGROUP, Plan, Program

# Positions whose values are loaded before the results of one are stored.
FORWARD_AHEAD = 3
BACKWARD_AHEAD = 2


def chunk_body(refs: types.SimpleNamespace, plan: Plan, timed: tuple[str, ...], reverse: bool) -> None:
    """What a chunk does to any state: its decay, and the state it leaves behind when it begins with zero.

    In reverse the state is the gradient that leaves the chunk at its beginning. Nothing follows the last
    chunk of this order, so it has no program.
    """
    index = lax.axis_index("chunk")
    program = Program(plan, refs, timed, reverse, chunk=index + 1 if reverse else index)
    rates = tuple(a * LOG2_E for a in program.load_states(refs.A))

    def tile(_, slot, carry):
        states, exponents = (list(part) for part in carry)
        for t in reversed(range(plan.steps)) if reverse else range(plan.steps):
            vector = program.states_at("C" if reverse else "B", slot, t)
            for j in range(plan.groups):
                dt = program.channels_at("dt", slot, t, j)
                decay = program.decay(dt, rates[j], slot, t)
                if reverse:
                    drive = program.along_states(program.channels_at("dy", slot, t, j)) * vector
                    states[j] = decay * (states[j] + drive)
                else:
                    drive = program.along_states(dt * program.channels_at("x", slot, t, j)) * vector
                    states[j] = decay * states[j] + drive
                exponents[j] = exponents[j] + dt
                if "reset" in timed:
                    exponents[j] = exponents[j] + program.reset(slot, t)
        plgpu.commit_smem()
        return tuple(states), tuple(exponents)

    states, exponents = program.over_tiles(tile, (program.zeros(), program.no_channels()))
    decays = [jnp.exp2(_passed(program, total, rate)) for total, rate in zip(exponents, rates, strict=True)]
    program.store_states(refs.chunk_state.at[program.batch, index], states)
    program.store_states(refs.chunk_decay.at[program.batch, index], decays)


def _passed(program: Program, total: jax.Array, rate: jax.Array) -> jax.Array:
    """Exponent of a whole chunk; a total with a reset in it stands for 'nothing passes'."""
    total = program.along_states(total)
    return jnp.where(total < RESET / 2, RESET, total * rate)


def forward_body(refs: types.SimpleNamespace, plan: Plan, timed: tuple[str, ...], entry_steps: int) -> None:
    """y of a chunk, the state before every `entry_steps` positions, and in the last chunk the last state."""
    program = Program(plan, refs, timed, reverse=False)
    rates = tuple(a * LOG2_E for a in program.load_states(refs.A))
    skip = program.load_channels(refs.D) if hasattr(refs, "D") else None
    start = program.load_states(refs.start.at[program.batch]) if hasattr(refs, "start") else program.zeros()
    if plan.chunks > 1:
        start = program.joined(start, program.chunk)

    def tile(index, slot, states):
        states = list(states)
        # The copy of y two tiles ago has to have left this slot.
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        for t, B, C, rows in program.ahead(range(plan.steps), slot, ("dt", "x"), FORWARD_AHEAD):
            if hasattr(refs, "entry_out") and t % entry_steps == 0:
                entry = index * (plan.steps // entry_steps) + t // entry_steps
                program.store_states(refs.entry_out.at[program.batch, entry], states)
            for j, (dt, x) in enumerate(rows):
                drive = program.along_states(dt * x) * B
                states[j] = program.decay(dt, rates[j], slot, t) * states[j] + drive
                y = (states[j] * C).sum(axis=1)
                refs.y_tile[slot, t, program.in_tile(j)] = y if skip is None else y + skip[j] * x
        plgpu.commit_smem()
        time = pl.ds(index * plan.steps, plan.steps)
        plgpu.copy_smem_to_gmem(refs.y_tile.at[slot], refs.y.at[program.batch, time, program.lanes])
        return tuple(states)

    states = program.over_tiles(tile, start)

    @pl.when(program.chunk == plan.chunks - 1)
    def _():
        program.store_states(refs.last.at[program.batch], states)

    plgpu.wait_smem_to_gmem(0)


def backward_body(refs: types.SimpleNamespace, plan: Plan, timed: tuple[str, ...], keep_decays: bool) -> None:
    """Gradients of a chunk, tile by tile from its end; states are computed again from each tile's entry.

    q is the gradient with respect to the state before the position at hand, carried towards the beginning.
    """
    program = Program(plan, refs, timed, reverse=True)
    rates = tuple(a * LOG2_E for a in program.load_states(refs.A))
    q = program.load_states(refs.dlast.at[program.batch]) if hasattr(refs, "dlast") else program.zeros()
    skip = program.load_channels(refs.D) if hasattr(refs, "D") else None
    if plan.chunks > 1:
        q = program.joined(q, plan.chunks - 1 - program.chunk)

    def tile(index, slot, carry):
        states, decays = _states_of_tile(program, rates, slot, keep_decays)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        carry = _backward_steps(program, (rates, skip), states, decays, slot, carry)
        plgpu.commit_smem()
        time = pl.ds(index * plan.steps, plan.steps)
        for name in ("dx", "ddt"):
            target = getattr(refs, name).at[program.batch, time, program.lanes]
            # Both copies make one group, so that waiting for all but one group waits for the tile before.
            plgpu.copy_smem_to_gmem(
                getattr(refs, f"{name}_tile").at[slot], target, commit_group=name == "ddt"
            )
        _sum_over_channels(program, index)
        return carry

    q, dA, dD = program.over_tiles(tile, (q, program.zeros(), program.no_channels()))
    program.store_states(refs.dA.at[program.batch, program.chunk], dA)
    if skip is not None:
        for j, value in enumerate(dD):
            refs.dD[program.batch, program.chunk, program.group(j)] = value

    @pl.when(program.chunk == 0)
    def _():
        program.store_states(refs.dstart.at[program.batch], q)

    plgpu.wait_smem_to_gmem(0)


def _states_of_tile(program: Program, rates, slot, keep_decays: bool):
    """States before every position of the tile and after the last, and the decays if they are kept."""
    plan, refs = program.plan, program.refs
    entry = [
        plgpu.load(refs.entry_tile.at[slot, program.in_tile(j)], layout=program.layout, optimized=False)
        for j in range(plan.groups)
    ]
    states, decays = [entry], []
    for t in range(plan.steps):
        B = program.states_at("B", slot, t)
        after, decays_t = [], []
        for j in range(plan.groups):
            dt = program.channels_at("dt", slot, t, j)
            decay = program.decay(dt, rates[j], slot, t)
            drive = program.along_states(dt * program.channels_at("x", slot, t, j)) * B
            after.append(decay * states[-1][j] + drive)
            decays_t.append(decay)
        states.append(after)
        decays.append(decays_t if keep_decays else None)
    return states, decays


def _backward_steps(program: Program, parameters, states, decays, slot, carry):
    """Walks a tile from its end; leaves dx, ddt and the lanes' parts of dB and dC in shared memory."""
    plan, refs = program.plan, program.refs
    rates, skip = parameters
    q, dA, dD = (list(part) for part in carry)
    channels = ("dt", "x", "dy", "slope") if plan.softplus else ("dt", "x", "dy")
    for t, B, C, rows in program.ahead(reversed(range(plan.steps)), slot, channels, BACKWARD_AHEAD):
        dB, dC = None, None
        for j, (dt, x, dy, *slope) in enumerate(rows):
            wide_dt, wide_dy = program.along_states(dt), program.along_states(dy)
            dstate = C * wide_dy + q[j]
            from_B, from_C = program.along_states(dt * x) * dstate, wide_dy * states[t + 1][j]
            dB = from_B if dB is None else dB + from_B
            dC = from_C if dC is None else dC + from_C
            decay = program.decay(dt, rates[j], slot, t) if decays[t] is None else decays[t][j]
            q[j] = decay * dstate
            dexponent = q[j] * states[t][j]
            dA[j] = dA[j] + wide_dt * dexponent
            ddrive = (B * dstate).sum(axis=1)
            ddecay = (rates[j] * dexponent).sum(axis=1) * (1 / LOG2_E)
            lanes = program.in_tile(j)
            dx = dt * ddrive
            if skip is not None:
                dx = dx + skip[j] * dy
                dD[j] = dD[j] + x * dy
            refs.dx_tile[slot, t, lanes] = dx.astype(refs.dx_tile.dtype)
            ddt = x * ddrive + ddecay
            for factor in slope:
                ddt = ddt * factor
            refs.ddt_tile[slot, t, lanes] = ddt.astype(refs.ddt_tile.dtype)
        refs.parts[:, pl.ds(t * plan.states, plan.states)] = dB
        refs.parts[:, pl.ds(plan.tile_states + t * plan.states, plan.states)] = dC
    return tuple(q), tuple(dA), tuple(dD)


def _sum_over_channels(program: Program, tile) -> None:
    """Adds the lanes' parts of dB and dC in a fixed order and writes this program's share of them."""
    plan, refs = program.plan, program.refs
    size = 2 * plan.tile_states
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=max(1, size // WARPGROUP))
    total = None
    for row in range(plan.group):
        part = plgpu.load(refs.parts.at[row, pl.ds(0, size)], layout=layout, optimized=False)
        total = part if total is None else total + part
    refs.dBC[program.batch, program.block, tile, :] = total
