"""Sizes and small tools that the kernels share."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Positions per chunk: the rows of one warpgroup's matrix product.
CHUNK = 64
LOG2E = math.log2(math.e)
# Features of a program's heads: the rows of two tiles of states.
_WIDEST = 128
# What a program can have on Hopper, less a little for barriers and alignment.
_SHARED_BYTES = 227 * 1024 - 2048
_PLANES = {"bfloat16": 1, "float32": 3}
# One value per row, one per column, of an accumulator.
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What one program holds.

    Attributes:
      head_dim, state_size: p and n.
      heads: heads of one program; all share one group.
      heads_per_group: heads that share B and C.
      planes: bfloat16 terms that stand for a matmul input: 1 for bfloat16, 3 for float32.
      length: positions of a row that are written. The hardware leaves out the rest of the last chunk, unless
        a tile is as wide as the array: that is copied as one piece, over the next row's beginning. So y and
        dx are copied a head at a time; with a single head, or in the interpreter, whole chunks are written.
      unroll: heads whose instructions are written one after the other.
    """

    head_dim: int
    state_size: int
    heads: int
    heads_per_group: int
    planes: int
    length: int
    unroll: int = 1

    @property
    def swizzle(self) -> int:
        """Bytes of a swizzled row: one value for every tile, since both operands of a product must agree."""
        return 2 * math.gcd(64, self.head_dim, self.state_size)

    @property
    def has_many_heads(self) -> bool:
        """Whether heads are so narrow that a program has many: then what they need is brought at once.

        Wide heads have enough to do while one vector is read, and shared memory for it would leave room for
        one program less where the state is wide too, or inputs are three planes.
        """
        return self.head_dim < 32 and self.planes == 1

    @property
    def plane_pairs(self) -> tuple[tuple[int, int], ...]:
        """Products of planes, the smallest first, that are above the rounding of the sum."""
        return self._pairs(self.planes)

    @property
    def weight_planes(self) -> int:
        """Planes of the weights inside a chunk, which exist in registers only.

        The gradient of a decay is a sum of differences that nearly cancel, y dy - x dx: rounding the weights
        to 8 bits on the way to y and, differently, on the way to dx would leave more than the sum.
        """
        return max(self.planes, 2)

    @property
    def weight_pairs(self) -> tuple[tuple[int, int], ...]:
        """Products of planes of the weights with planes of an input."""
        return self._pairs(self.weight_planes)

    def halved(self) -> "Tiles":
        """Half the heads a program, where narrow heads fill it: more programs, which wait side by side."""
        half = self.heads // 2
        narrow = self.heads % 2 == 0 and half >= 4 and half * self.head_dim % 64 == 0
        return dataclasses.replace(self, heads=half) if narrow else self

    def _pairs(self, left: int) -> tuple[tuple[int, int], ...]:
        pairs = itertools.product(range(left), range(self.planes))
        return tuple(sorted((pair for pair in pairs if sum(pair) < left), key=sum, reverse=True))


def why_not(x, A, B, C) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    if x.dtype.name not in _PLANES or {B.dtype, C.dtype} != {x.dtype} or A.dtype == jnp.float64:
        got = ", ".join(array.dtype.name for array in (x, B, C, A))
        return f"`x`, `B` and `C` must be all bfloat16 or all float32, `A` no wider than float32, got {got}"
    head_dim, state_size = x.shape[3], B.shape[3]
    if head_dim % 16 or state_size % 16 or state_size > 128:
        return (
            "`head_dim` and `state_size` must be multiples of 16, the latter at most 128, got "
            f"{head_dim} and {state_size}"
        )
    if not _blocks(x, B):
        heads = x.shape[2] // B.shape[2]
        return (
            f"a group's heads must divide into blocks of 64 or {_WIDEST} features that fit into shared memory"
            f" with their states, got {heads} heads of {head_dim}, state {state_size}, {x.dtype}"
        )
    return None


def choose_tiles(x, B) -> Tiles:
    """Sizes for a call that the kernels can run."""
    # The fewest bytes are moved when all heads that share B and C are in one program, if they fit.
    heads_per_group = x.shape[2] // B.shape[2]
    length = x.shape[1] if x.shape[2] > 1 else -(-x.shape[1] // CHUNK) * CHUNK
    return Tiles(x.shape[3], B.shape[3], max(_blocks(x, B)), heads_per_group, _PLANES[x.dtype.name], length)


def _blocks(x, B) -> list[int]:
    """Numbers of heads that a program can hold."""
    heads_per_group, head_dim = x.shape[2] // B.shape[2], x.shape[3]
    counts = (count for count in range(1, heads_per_group + 1) if heads_per_group % count == 0)
    return [count for count in counts if count * head_dim % 64 == 0 and _fits(x, B, count * head_dim)]


def _fits(x, B, width: int) -> bool:
    """Whether a program of the backward pass, which holds the most, can have heads of `width` features."""
    planes, n = _PLANES[x.dtype.name], B.shape[3]
    # B, C, x, dy, the scores' gradient, and the states on both sides; then dx as it is written.
    of_planes = CHUNK * (2 * n + 2 * width + CHUNK) + 2 * width * n
    held = 2 * planes * of_planes + CHUNK * width * x.dtype.itemsize
    # cum, dt, enter and leave of its heads, where they are narrow.
    held += 4 * 4 * CHUNK * (width // x.shape[3])
    # In float32 the widest would fit, but registers would not.
    return width <= _WIDEST // (1 if planes == 1 else 2) and held <= _SHARED_BYTES


def tile(tiles: Tiles, rows: int, columns: int):
    """Shared memory for bfloat16 planes of a (rows, columns) matrix, laid out for the tensor cores."""
    return swizzled((tiles.planes, rows, columns), jnp.bfloat16, tiles.swizzle)


def vectors(tiles: Tiles, count: int) -> list:
    """What `fetch_vectors` copies `count` vectors to, an arrival each; nothing where it copies none."""
    return [plgpu.SMEM((tiles.heads, CHUNK), jnp.float32)] * (count if tiles.has_many_heads else 0)


def fetch_vectors(refs, shared, barrier, tiles: Tiles, b, c, k) -> list:
    """Where a program finds vectors (b, c, h, 64) of its heads, (heads, 64) each.

    Where it has many heads they are copied to shared memory: read head by head from global memory, each would
    be waited for.
    """
    own = [ref.at[b, c, pl.ds(k * tiles.heads, tiles.heads)] for ref in refs]
    if not tiles.has_many_heads:
        return own
    for ref, sm in zip(own, shared, strict=True):
        plgpu.copy_gmem_to_smem(ref, sm, barrier)
    return list(shared)


def swizzled(shape: tuple[int, ...], dtype, swizzle: int):
    """Shared memory in tiles of 8 rows of `swizzle` bytes, which no two rows of a warp hit at once."""
    width = swizzle // jnp.dtype(dtype).itemsize
    # mypy takes methods without a body for abstract ones.
    tiling = plgpu.TilingTransform((8, width))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))  # type: ignore[abstract]


def load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)


def load_planes(sm, columns):
    """The float32 sum of the planes of some columns."""
    planes = [load(sm.at[plane, :, columns], plgpu.Layout.WGMMA) for plane in range(sm.shape[0])]
    return sum(plane.astype(jnp.float32) for plane in planes)


def down(vector, shape):
    """One value per row, repeated along the columns."""
    return lax.broadcast_in_dim(vector, shape, [0])


def across(vector, shape):
    """One value per column, repeated along the rows."""
    return lax.broadcast_in_dim(vector, shape, [1])


def visible(run_ref, *, transposed: bool = False):
    """Which earlier positions of the chunk a position sees: those of its own segment.

    Positions are rows and what they see columns, or with `transposed` the other way round.
    """
    shape = (CHUNK, CHUNK)
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )
    causal = row <= column if transposed else column <= row
    return causal & (down(load(run_ref, ROW), shape) == across(load(run_ref, COLUMN), shape))


def params():
    return plgpu.CompilerParams(
        approx_math=True,
        # What threads write they do not read again, and what tensor cores or copies read of it is committed
        # first: nothing needs a barrier around each store, of which a head has four.
        unsafe_no_auto_barriers=True,
        # Every layout is written down: inferring them takes unbounded time with this many products.
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )
