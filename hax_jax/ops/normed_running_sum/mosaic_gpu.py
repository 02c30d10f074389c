"""Both running sums and the division as one Mosaic GPU kernel, for NVIDIA GPUs of the Hopper generation.

A program has a few features of a row, and a lane one of them in one stretch of time. It walks over its
stretch three times: for the sum that the stretch adds, for the squares that it adds once the sum before it is
known, and for the result. Between walks each lane adds up what the stretches before its own hand on. A
segment begins with nothing of what was before it, not even its rounding.

What takes the time is waiting for memory: short stretches are read once, all positions at a time.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops import dispatch, segments
from hax_jax.ops import lanes_mosaic_gpu as lanes
from hax_jax.ops.normed_running_sum import xla

LANES = lanes.LANES
# Features of a program; its lanes are so many times fewer stretches of time.
_SHIFT = 2
FEATURES = 1 << _SHIFT
STRETCHES = LANES // FEATURES
# Rows up to this length: a lane's walk grows with them.
MAX_LENGTH = 4096
# Positions whose loads do not wait for one another.
UNROLL = 8
# Positions that a lane can keep in registers from one walk to the next.
MOST_HELD = 48
_DTYPES = ("float32", "bfloat16")


def normed_running_sum(x, segment_ids, dtype):
    """`ops.normed_running_sum` on a Hopper GPU."""
    if x.shape[1] > MAX_LENGTH:
        return xla.normed_running_sum(x, segment_ids, dtype)
    interpreted = lanes.interpret is not None
    dispatch.check_mosaic_gpu("normed_running_sum", why_not(x, dtype), interpreted=interpreted)
    return _in_stretches(x, segments.as_array(segment_ids, x.shape[:2]), dtype)


def why_not(x, dtype) -> str | None:
    """Why the kernel cannot run this call, or None if it can."""
    got = {x.dtype.name, jnp.dtype(dtype).name}
    if not got <= set(_DTYPES):
        return f"`x` and `dtype` must be float32 or bfloat16, got {', '.join(sorted(got))}"
    if x.shape[1] > MAX_LENGTH:
        return f"rows must be at most {MAX_LENGTH} long, got {x.shape[1]}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _in_stretches(x, segment_ids, dtype):
    return _kernel(x.reshape(x.shape[0], -1), segment_ids, dtype).reshape(x.shape)


def _forward(x, segment_ids, dtype):
    return _in_stretches(x, segment_ids, dtype), (x, segment_ids)


def _backward(dtype, residuals, dy):
    x, segment_ids = residuals
    _, transpose = jax.vjp(lambda x: xla.normed_running_sum(x, segment_ids, dtype), x)
    return *transpose(dy), None


_in_stretches.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Stretches:
    """Where the lanes of a program walk.

    Attributes:
      x, ids: what they read, (t n,) and (t,).
      first, feature: each lane's first position and its feature, of n.
      steps: positions of a stretch; of the last stretches some or all lie beyond the row's end.
    """

    x: Any
    ids: Any
    first: Any
    feature: Any
    n: int
    steps: int

    def read(self, number, before):
        """Some positions from `number` on, `before` the segment of the one before.

        Returns what `walk` says of each, and the segment of the last.
        """
        length, read = self.ids.shape[0], []
        for offset in range(UNROLL):
            position = self.first + (number + offset)
            # Beyond the row's end a lane looks at the last position again, and adds nothing.
            here = jnp.minimum(position, length - 1)
            place = here * self.n + self.feature
            value = lanes.gather(self.x, place).astype(jnp.float32)
            read.append((place, position < length, value, lanes.gather(self.ids, here)))
        found = []
        for place, is_inside, value, segment in read:
            found.append((place, is_inside, jnp.where(is_inside, value, 0.0), segment == before))
            before = segment
        return found, before

    @functools.cached_property
    def held(self):
        """All positions, read once; of long stretches None."""
        if self.steps > MOST_HELD:
            return None
        held, before = [], self._before()
        for number in range(0, self.steps, UNROLL):
            found, before = self.read(number, before)
            held += found
        return held

    def _before(self):
        return lanes.gather(self.ids, jnp.clip(self.first - 1, 0, self.ids.shape[0] - 1))

    def walk(self, visit, state):
        """Calls visit(place, is_inside, value, goes_on, state) -> state for each position in turn.

        `place` is that in x, and `goes_on` says whether the segment had begun before.
        """
        if self.held is not None:
            for position in self.held:
                state = visit(*position, state)
            return state

        def some(number, carry):
            before, state = carry
            found, before = self.read(number * UNROLL, before)
            for position in found:
                state = visit(*position, state)
            return before, state

        return lax.fori_loop(0, self.steps // UNROLL, some, (self._before(), state))[1]


def _arriving(sums_sm, goes_through_sm, sums, lane):
    """What earlier stretches hand on, of the sums that every stretch ends with."""
    sums_sm[...] = sums
    plgpu.commit_smem()
    stretch, feature = lane >> _SHIFT, lane & (FEATURES - 1)

    def add_some(number, total):
        some = [number * UNROLL + offset for offset in range(UNROLL)]
        there = [earlier * FEATURES + feature for earlier in some]
        read = [[lanes.gather(sm, place) for sm in (goes_through_sm, sums_sm)] for place in there]
        for earlier, (goes_through, added) in zip(some, read, strict=True):
            kept = jnp.where(goes_through == 1, total, 0.0) + added
            total = jnp.where(earlier < stretch, kept, total)
        return total

    return lax.fori_loop(0, STRETCHES // UNROLL, add_some, _zero())


def _add_up(place, is_inside, value, goes_on, state):
    del place, is_inside
    total, goes_through = state
    return jnp.where(goes_on, total, 0.0) + value, jnp.where(goes_on, goes_through, 0)


def _add_squares(place, is_inside, value, goes_on, state):
    del place, is_inside
    total, squares = (jnp.where(goes_on, x, 0.0) for x in state)
    total = total + value
    return total, squares + total * total


def _kernel(x, ids, dtype):
    """x (b, t n), what the op returns likewise, and ids (b, t)."""
    (batch, length), n = ids.shape, x.shape[1] // ids.shape[1]
    steps = -(-length // (STRETCHES * UNROLL)) * UNROLL

    def running_sums(x_ref, ids_ref, out_ref, goes_through_sm, totals_sm, squares_sm):
        row, block = lax.axis_index("row"), lax.axis_index("block")
        lane, out = lanes.iota(LANES), out_ref.at[row]
        feature = block * FEATURES + (lane & (FEATURES - 1))
        # Lanes beyond the features repeat the last one, and write nothing.
        own = jnp.minimum(feature, n - 1)
        stretches = _Stretches(x_ref.at[row], ids_ref.at[row], (lane >> _SHIFT) * steps, own, n, steps)

        def divide(place, is_inside, value, goes_on, state):
            total, squares = state = _add_squares(place, is_inside, value, goes_on, state)
            y = total / jnp.maximum(jnp.sqrt(squares), xla.TINY)
            lanes.put(out, jnp.where(is_inside & (feature < n), place, length * n), y.astype(dtype))
            return state

        total, goes_through = stretches.walk(_add_up, (_zero(), lanes.full(LANES, 1)))
        goes_through_sm[...] = goes_through
        total = _arriving(totals_sm, goes_through_sm, total, lane)
        squares = stretches.walk(_add_squares, (total, _zero()))[1]
        stretches.walk(divide, (total, _arriving(squares_sm, goes_through_sm, squares, lane)))

    return plgpu.kernel(
        running_sums,
        out_type=jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)),
        scratch_types=[plgpu.SMEM((LANES,), of) for of in (jnp.int32, jnp.float32, jnp.float32)],
        grid=(batch, -(-n // FEATURES)),
        grid_names=("row", "block"),
        # Every layout is written down: inferring them takes ten seconds where loops are unrolled.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({} if lanes.interpret is None else {"interpret": lanes.interpret}),
    )(x, ids)


def _zero():
    return lanes.full(LANES, 0.0, jnp.float32)
