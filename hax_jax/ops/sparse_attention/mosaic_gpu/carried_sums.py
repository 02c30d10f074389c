"""Adds up the gradients of carried keys, in one order: two kernels, and a gather.

A key's carried slots are neighbours in the plan's list of pairs: a *run*. The list is cut into blocks. The
first kernel reads the rows of a block where they lie and sums its runs, from the end of the block to its
beginning. A run that goes on behind its block still lacks later blocks' sums: the second kernel adds those,
one after the other.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops.sparse_attention.chunks import own_rows
from hax_jax.ops.sparse_attention.mosaic_gpu import building_blocks as bb
from hax_jax.ops.sparse_attention.plan import PAIRS_OF_BLOCK, Plan

# A lane is a feature.
LANES = 128
# Rows whose loads are under way at the same time.
TOGETHER = 8

_LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)


def sum_of_slots(plan: Plan, rows: jax.Array) -> jax.Array:
    """The sum of each key's rows over its own slot and its carried ones.

    Args:
      plan: for (c, k) slots.
      rows: (h, c, k, f) float32, f a multiple of 128.

    Returns:
      (h, N, f).
    """
    own = own_rows(plan, rows)
    rows = rows.reshape(rows.shape[0], -1, rows.shape[-1])
    num_pairs = plan.carried_slot.shape[0]
    if num_pairs == 0:
        return own
    within = _sum_in_blocks(rows, plan)
    across = _add_later_blocks(within, plan)
    first = jnp.minimum(plan.first_carried, num_pairs - 1)
    crosses = first // PAIRS_OF_BLOCK < (plan.end_carried - 1) // PAIRS_OF_BLOCK
    carried = jnp.where(
        crosses[:, None], across[:, jnp.where(crosses, first // PAIRS_OF_BLOCK, 0)], within[:, first]
    )
    return own + jnp.where((plan.first_carried < num_pairs)[:, None], carried, 0)


def _in_blocks(x, fill):
    """(p,) as (blocks, PAIRS_OF_BLOCK)."""
    return jnp.pad(x, (0, -x.shape[0] % PAIRS_OF_BLOCK), constant_values=fill).reshape(-1, PAIRS_OF_BLOCK)


def _sum_in_blocks(rows, plan):
    """(h, p, f): at the first pair of a run or a block the sum of the run's rows from there in its block."""
    heads, num_slots, width = rows.shape
    slots = jnp.minimum(_in_blocks(plan.carried_slot, 0), num_slots - 1)
    keys = _in_blocks(plan.carried_key, -1)
    integers = jnp.stack([slots, keys], axis=1)
    num_blocks = integers.shape[0]

    def body(rows_ref, integers_ref, out_ref, integers_sm, arrived):
        head, block, part = (lax.axis_index(name) for name in ("head", "chunk", "block"))
        plgpu.copy_gmem_to_smem(integers_ref.at[block], integers_sm, arrived)
        plgpu.barrier_wait(arrived)
        features = pl.ds(part * LANES, LANES)

        def add(number, total):
            last = PAIRS_OF_BLOCK - 1 - number * TOGETHER
            loaded = [
                _load(rows_ref.at[head, integers_sm[0, last - offset], features])
                for offset in range(TOGETHER)
            ]
            for offset, row in enumerate(loaded):
                pair = last - offset
                key = integers_sm[1, pair]
                after = integers_sm[1, jnp.minimum(pair + 1, PAIRS_OF_BLOCK - 1)]
                total = row + jnp.where(_everywhere(key) == after, total, 0.0)
                before = integers_sm[1, jnp.maximum(pair - 1, 0)]

                @pl.when((pair == 0) | (before != key))
                def _(pair=pair, total=total):
                    out_ref[head, block * PAIRS_OF_BLOCK + pair, features] = total

            return total

        lax.fori_loop(0, PAIRS_OF_BLOCK // TOGETHER, add, _zeros())

    return bb.kernel(
        body,
        out_type=bb.array((heads, num_blocks * PAIRS_OF_BLOCK, width)),
        scratch_types=[plgpu.SMEM((2, PAIRS_OF_BLOCK), jnp.int32), plgpu.Barrier()],
        grid=(heads, num_blocks, width // LANES),
    )(rows, integers)


def _add_later_blocks(within, plan):
    """(h, blocks, f): the sum of the run that begins in a block and goes on behind it; else anything."""
    heads, _, width = within.shape
    num_blocks = plan.last_runs.shape[0]

    def body(within_ref, runs_ref, out_ref):
        head, block, part = (lax.axis_index(name) for name in ("head", "chunk", "block"))
        features = pl.ds(part * LANES, LANES)
        first, end = runs_ref[block, 0], runs_ref[block, 1]
        last_block = lax.div(end - 1, PAIRS_OF_BLOCK)

        # Not a run that an earlier block has begun: that block sums it.
        @pl.when((first >= block * PAIRS_OF_BLOCK) & (last_block > block))
        def _():
            def add(number, total):
                index = block + 1 + number * TOGETHER
                loaded = [
                    _load(
                        within_ref.at[
                            head, jnp.minimum(index + offset, num_blocks - 1) * PAIRS_OF_BLOCK, features
                        ]
                    )
                    for offset in range(TOGETHER)
                ]
                for offset, row in enumerate(loaded):
                    total = total + jnp.where(_everywhere(index + offset) <= last_block, row, 0.0)
                return total

            turns = lax.div(last_block - block + (TOGETHER - 1), TOGETHER)
            begun = _load(within_ref.at[head, first, features])
            out_ref[head, block, features] = lax.fori_loop(0, turns, add, begun)

    return bb.kernel(
        body,
        out_type=bb.array((heads, num_blocks, width)),
        grid=(heads, num_blocks, width // LANES),
    )(within, plan.last_runs)


def _load(ref):
    return plgpu.load(ref, layout=_LAYOUT, optimized=False)


def _zeros():
    return plgpu.layout_cast(jnp.zeros((LANES,), jnp.float32), _LAYOUT)


def _everywhere(integer):
    """A vector of it: what selects a vector has to be one."""
    return plgpu.layout_cast(jnp.full((LANES,), integer, jnp.int32), _LAYOUT)
