"""What the programs of `mosaic_gpu` share: their sizes, and how values come to them.

A program is one warpgroup. It works on `groups` groups of channels. In a group a channel belongs to `lanes`
lanes (1, 2 or 4), which share its states, so the sum over states crosses few lanes or none, and the sum over
channels is left to shared memory. Time goes by in tiles of `steps` positions, which the copy engine brings
in while the tile before is worked on; beyond the end it brings zeros, and a position with dt = 0 changes
nothing.
"""

import dataclasses
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP = 128
LOG2_E = math.log2(math.e)
# The exponent at the first position of a segment: exp2 of it is 0, and it is far from the infinities.
RESET = -1e30
# Chunks joined at a time.
JOINED = 4
# Tiles in flight or in use at a time.
SLOTS = 2
# Resets are copied 128 bytes at a time, the fewest that Pallas copies; those of a tile are among them.
RESET_ROW = 32


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call: (batch, length, channels, states) cut into tiles, groups of channels and chunks.

    `length` is without the pads that were put behind a row, `tiles` are those of the row with them.
    """

    batch: int
    length: int
    channels: int
    states: int
    steps: int
    lanes: int
    groups: int
    tiles: int
    chunks: int
    softplus: bool

    @property
    def group(self) -> int:
        """Channels of a group."""
        return WARPGROUP // self.lanes

    @property
    def width(self) -> int:
        """Channels of a program."""
        return self.group * self.groups

    @property
    def blocks(self) -> int:
        return self.channels // self.width

    @property
    def tiles_per_chunk(self) -> int:
        return -(-self.tiles // self.chunks)

    @property
    def tile_states(self) -> int:
        """Values of B or C in a tile."""
        return self.steps * self.states

    @property
    def parts_row(self) -> int:
        """A channel's parts of dB and dC, padded so that neighbouring rows begin in different banks."""
        return 2 * self.tile_states + (16 if self.lanes == 4 else 4)

    def state_layout(self) -> Any:
        """Layout of a (group, n) array: warps and most lanes along channels, `lanes` lanes along states."""
        n, per_warp, mine = self.states, self.group // 4, self.states // self.lanes
        # A lane's states move four at a time, the widest access there is.
        tiles: list[tuple[int, ...]] = [(self.group, n), (per_warp, n), (mine,), (min(mine, 4),)]
        warps: tuple[int, ...] = (-6,)
        lanes: tuple[int, ...] = (-4, -3)
        if mine <= 4:
            tiles, warps, lanes = tiles[:3], (-5,), (-3, -2)
        elif self.lanes == 1:
            del tiles[2]
            warps, lanes = (-5,), (-3,)
        tiling = plgpu.Tiling(tuple(tiles))
        return plgpu.Layout.TILED(tiling, warp_dims=warps, lane_dims=lanes, vector_dim=-1)


class Program:
    """One program: where this program is, and how values come into registers."""

    def __init__(
        self,
        plan: Plan,
        refs: types.SimpleNamespace,
        timed: tuple[str, ...],
        reverse: bool,
        chunk: jax.Array | None = None,
    ):
        self.plan, self.refs, self.timed, self.reverse = plan, refs, timed, reverse
        self.layout = plan.state_layout()
        self.row, self.column = self.layout.reduce(1), self.layout.reduce(0)
        self.batch, self.block = lax.axis_index("b"), lax.axis_index("block")
        self.chunk = lax.axis_index("chunk") if chunk is None else chunk
        self.first = self.chunk * plan.tiles_per_chunk
        self.count = jnp.minimum(plan.tiles_per_chunk, plan.tiles - self.first)
        self.lanes = pl.ds(self.block * plan.width, plan.width)
        # Of those that are copied with a tile; known once it is (`over_tiles`).
        self.resets_before = jnp.int32(0)

    def tile_of(self, index: jax.Array) -> jax.Array:
        """The tile that comes `index`-th in this program's order."""
        return self.first + (self.count - 1 - index if self.reverse else index)

    def fetch(self, index: jax.Array, slot: jax.Array) -> None:
        """Starts the copies of one tile into a slot."""
        tile, full = self.tile_of(index), self.refs.full.at[slot]
        time = pl.ds(tile * self.plan.steps, self.plan.steps)
        for name in self.timed:
            source, target = getattr(self.refs, name), getattr(self.refs, f"{name}_tile").at[slot]
            match name:
                case "entry":
                    source = source.at[self.batch, tile, self.lanes]
                case "reset":
                    start = lax.div(tile * self.plan.steps, jnp.int32(RESET_ROW)) * RESET_ROW
                    source = source.at[self.batch, pl.ds(start, RESET_ROW)]
                case "B" | "C":
                    source = source.at[self.batch, time]
                case _:
                    source = source.at[self.batch, time, self.lanes]
            plgpu.copy_gmem_to_smem(source, target, full)

    def over_tiles(self, body, carry):
        """Runs body(tile, slot, carry) over this program's tiles, the next ones on their way."""
        for slot in range(SLOTS):

            @pl.when(slot < self.count)
            def _(slot=slot):
                self.fetch(jnp.int32(slot), jnp.int32(slot))

        def step(index, carry):
            slot = lax.rem(index, jnp.int32(SLOTS))
            plgpu.barrier_wait(self.refs.full.at[slot])
            self.resets_before = lax.rem(self.tile_of(index) * self.plan.steps, jnp.int32(RESET_ROW))
            self.prepare(self.tile_of(index), slot)
            carry = body(self.tile_of(index), slot, carry)
            # Every body ends with a barrier of its warpgroup after its last look at the slot.

            @pl.when(index + SLOTS < self.count)
            def _():
                self.fetch(index + SLOTS, slot)

            return carry

        return lax.fori_loop(jnp.int32(0), self.count, step, carry)

    def prepare(self, tile: jax.Array, slot: jax.Array) -> None:
        """Does once for a whole tile what every lane would have to do for itself at every position."""
        for name in ("B", "C"):
            if hasattr(self.refs, f"wide_{name}"):
                source = getattr(self.refs, f"{name}_tile").at[slot]
                layout = plgpu.Layout.WG_STRIDED(source.shape, vec_size=max(1, source.size // WARPGROUP))
                value = plgpu.load(source, layout=layout, optimized=False)
                getattr(self.refs, f"wide_{name}")[...] = value.astype(jnp.float32)
        if self.plan.softplus:
            self.make_time_steps(tile, slot)
        if self.plan.softplus or hasattr(self.refs, "wide_B") or hasattr(self.refs, "wide_C"):
            plgpu.commit_smem()

    def make_time_steps(self, tile: jax.Array, slot: jax.Array) -> None:
        """Softplus of a whole tile at once, and its slope for the backward pass; dt = 0 beyond the end."""
        plan = self.plan
        shape = (plan.steps, plan.width)
        layout = plgpu.Layout.WG_STRIDED(shape, vec_size=min(4, math.prod(shape) // WARPGROUP))
        raw = plgpu.load(self.refs.dt_tile.at[slot], layout=layout, optimized=False).astype(jnp.float32)
        inside = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) < plan.length - tile * plan.steps
        small = jnp.exp2(-LOG2_E * jnp.abs(raw))
        # log(1 + small) = 2 artanh(small / (2 + small)), whose series keeps its relative accuracy near 0.
        ratio = small / (2 + small)
        square = ratio * ratio
        series = jnp.full_like(square, 1 / 15)
        for odd in range(13, 0, -2):
            series = series * square + 1 / odd
        self.refs.time_steps[...] = jnp.where(inside, jnp.maximum(raw, 0) + 2 * ratio * series, 0)
        if hasattr(self.refs, "slopes"):
            self.refs.slopes[...] = jnp.where(raw > 0, 1.0, small) / (1 + small)

    def group(self, j: int):
        """The j-th group's place among all channels."""
        return pl.ds(self.block * self.plan.width + j * self.plan.group, self.plan.group)

    def in_tile(self, j: int):
        """The j-th group's place among this program's channels."""
        return pl.ds(j * self.plan.group, self.plan.group)

    def load_states(self, ref) -> tuple[jax.Array, ...]:
        """A (channels, n) array of this program's channels, one (group, n) array a group."""
        return tuple(
            plgpu.load(ref.at[self.group(j)], layout=self.layout, optimized=False)
            for j in range(self.plan.groups)
        )

    def load_channels(self, ref) -> tuple[jax.Array, ...]:
        """A (channels,) array of this program's channels, one (group,) array a group."""
        return tuple(
            plgpu.load(ref.at[self.group(j)], layout=self.row, optimized=False)
            for j in range(self.plan.groups)
        )

    def no_channels(self) -> tuple[jax.Array, ...]:
        zero = plgpu.layout_cast(jnp.zeros((self.plan.group,), jnp.float32), self.row)
        return (zero,) * self.plan.groups

    def zeros(self) -> tuple[jax.Array, ...]:
        zero = plgpu.layout_cast(jnp.zeros((self.plan.group, self.plan.states), jnp.float32), self.layout)
        return (zero,) * self.plan.groups

    def store_states(self, ref, values) -> None:
        for j, value in enumerate(values):
            ref[self.group(j), :] = value

    def channels_at(self, name: str, slot, t: int, j: int) -> jax.Array:
        """Values of the j-th group's channels at position t of the tile, (group,) float32."""
        if name == "slope" or (name == "dt" and self.plan.softplus):
            ref = (self.refs.slopes if name == "slope" else self.refs.time_steps).at[t, self.in_tile(j)]
        else:
            ref = getattr(self.refs, f"{name}_tile").at[slot, t, self.in_tile(j)]
        return plgpu.load(ref, layout=self.row, optimized=False).astype(jnp.float32)

    def states_at(self, name: str, slot, t: int) -> jax.Array:
        """B or C at position t, as a (group, n) array that is the same for every channel."""
        wide = getattr(self.refs, f"wide_{name}", None)
        ref = getattr(self.refs, f"{name}_tile").at[slot, t] if wide is None else wide.at[t]
        return self.along_channels(plgpu.load(ref, layout=self.column, optimized=False).astype(jnp.float32))

    def ahead(self, order, slot, channels: tuple[str, ...], distance: int):
        """Yields (t, B, C, values of the channels by group) in the given order of positions.

        The loads of the next `distance` positions come before whatever the caller stores for one: the
        compiler cannot know that a store does not change what a later load finds, and would wait for it.
        """

        def load(t):
            rows = [
                [self.channels_at(name, slot, t, j) for name in channels] for j in range(self.plan.groups)
            ]
            return t, self.states_at("B", slot, t), self.states_at("C", slot, t), rows

        order = list(order)
        loaded = [load(t) for t in order[:distance]]
        for t in order[distance:] + [None] * distance:
            current = loaded.pop(0)
            if t is not None:
                loaded.append(load(t))
            yield current

    def along_states(self, x: jax.Array) -> jax.Array:
        shape = (self.plan.group, self.plan.states)
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [0]), self.layout)

    def along_channels(self, x: jax.Array) -> jax.Array:
        shape = (self.plan.group, self.plan.states)
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [1]), self.layout)

    def decay(self, dt: jax.Array, rate: jax.Array, slot, t: int) -> jax.Array:
        """exp(dt A), and 0 where a segment begins; `rate` is A log2(e)."""
        exponent = self.along_states(dt) * rate
        if "reset" in self.timed:
            exponent = exponent + self.reset(slot, t)
        return jnp.exp2(exponent)

    def reset(self, slot, t: int) -> jax.Array:
        """RESET where a segment begins at position t of the tile, else 0."""
        return self.refs.reset_tile[slot, self.resets_before + t]

    def joined(self, start, chunks):
        """The state that reaches this chunk, from `start` through what other chunks do to it."""

        # There are numbers of all chunks but one, the last in this order.
        known = self.plan.chunks - 1

        def through(step, carry):
            # Several at a time, so that their loads are under way together; past the last nothing changes.
            for index in (step * JOINED + offset for offset in range(JOINED)):
                valid = (index < chunks).astype(jnp.float32)
                chunk = jnp.minimum(index, known - 1)
                chunk = known - 1 - chunk if self.reverse else chunk
                decay = self.load_states(self.refs.chunk_decay.at[self.batch, chunk])
                local = self.load_states(self.refs.chunk_state.at[self.batch, chunk])
                carry = tuple(
                    (d * valid + (1 - valid)) * c + s * valid
                    for d, c, s in zip(decay, carry, local, strict=True)
                )
            return carry

        rounds = lax.div(chunks + (JOINED - 1), jnp.int32(JOINED))
        return lax.fori_loop(jnp.int32(0), rounds, through, start)
