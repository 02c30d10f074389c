"""Routing that sees no future: the default.

What a position's keys are depends on what came before it in its segment, and on nothing else. Pads are
segments of their own, so neither their number nor their place matters.
"""

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from hax_jax.layers.sequence import Sequence
from hax_jax.ops import normed_running_sum, segments
from hax_jax.packing import Packing

# The hash projection is drawn once and is part of the model's state.
FRESH_PROJECTION = False
# A query that sees no key gets zeros.
EMPTY_ROWS = "zero"
# Pads have no part in any statistic, so that packed rows need not be laid out as padded ones for them.
PADS_COUNT = False


def make_sequence(
    padding_mask: Bool[Array, "b t"] | None,
    segment_ids: Int[Array, "b t"] | None,
    packing: Packing | None,
    arch: str,
) -> Sequence:
    """Turns pads into segments of their own, so that no op has to know of them."""
    del arch
    if packing is not None:
        return Sequence(packing.is_item, packing.segment_ids, packing)
    if padding_mask is not None:
        ids = segments.as_array(segment_ids, padding_mask.shape)
        segment_ids = segments.apart(padding_mask, ids)
    return Sequence(padding_mask, segment_ids)


def hash_features(x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
    """The vectors whose projections' signs are the code: queries and keys as they are."""
    return x


@jax.named_scope("query_summary")
def query_summary(
    q: Float[Array, "b t n"], sequence: Sequence, dtype: Any, implementation: str | None
) -> Float[Array, "b t n"]:
    """What the key scorer knows of the queries so far, rounded to `dtype`.

    s_t = sum_{i <= t} q_i, divided per feature by sqrt(sum_{i <= t} s_i^2), both within the segment.
    """
    return normed_running_sum(q, segment_ids=sequence.segment_ids, dtype=dtype, implementation=implementation)


def counts_for_gate_loss(sequence: Sequence, shape: tuple[int, int]) -> Bool[Array, "b t"] | None:
    """Positions that the gate loss looks at, as sampled keys and as queries: the real ones."""
    del shape
    return sequence.padding_mask


def residual(x: Float[Array, "b t d"], arch: str) -> Float[Array, "b t d"]:
    """The residual stream as a block adds to it: as it is."""
    del arch
    return x
