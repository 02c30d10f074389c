"""Routing as the original has it, its faults reproduced on purpose: for comparison only.

1. Hashing and the scorer divide by norms over the whole padded sequence, pads and future included.
2. The hash projection is drawn anew at every call, evaluation included.
3. A query that sees no key attends uniformly to all positions, later ones and pads too.
4. mamba2 leaves out all masking of pads where the batch has one row.
5. The gate loss counts pads: as queries (each adds 0.5), and as sampled keys where real ones run out.
6. mamba2 rounds the residual stream to float32 before each addition, also where all else is float64; in
   bfloat16 the stream is therefore wider than what is added to it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hax_jax.layers.sequence import Sequence
from hax_jax.ops import Dilated, HashBuckets, KeySet
from hax_jax.ops.numerics import einsum, wide
from hax_jax.packing import Packing

FRESH_PROJECTION = True
EMPTY_ROWS = "uniform"
PADS_COUNT = True

_TINY = 1e-12


def make_sequence(
    padding_mask: Bool[Array, "b t"] | None,
    segment_ids: Int[Array, "b t"] | None,
    packing: Packing | None,
    arch: str,
) -> Sequence:
    """Keeps pads as positions like all others; their inner states are zeroed by the mixers alone."""
    if packing is not None:
        if packing.num_items == 1 and arch == "mamba2":
            raise ValueError(
                "`packing` must hold at least 2 items with routing='parity' and mamba2, which treats pads of "
                "a single row as tokens, got 1; use a padded row"
            )
        return Sequence(packing.is_item, packing.segment_ids, packing)
    if segment_ids is not None:
        raise ValueError(
            "`segment_ids` must be None with routing='parity', whose statistics run over the whole padded "
            "row, got an array; use `packing`, which knows the padded length, or routing='causal'"
        )
    if padding_mask is not None and arch == "mamba2" and padding_mask.shape[0] == 1:
        padding_mask = None
    return Sequence(padding_mask, None)


def _divide_by_norm_over_time(x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
    norm = jnp.sqrt((x * x).sum(axis=1, keepdims=True))
    return x / jnp.maximum(norm, _TINY)


def hash_features(x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
    """x minus its mean over the row, each feature divided by its norm over the row."""
    return _divide_by_norm_over_time(x - x.mean(axis=1, keepdims=True))


@jax.named_scope("query_summary")
def query_summary(
    q: Float[Array, "b t n"], sequence: Sequence, dtype: Any, implementation: str | None
) -> Float[Array, "b t n"]:
    """The running sum of queries, each feature divided by that sum's norm over the row."""
    del sequence, implementation
    return _divide_by_norm_over_time(jnp.cumsum(q, axis=1)).astype(dtype)


def counts_for_gate_loss(sequence: Sequence, shape: tuple[int, int]) -> Bool[Array, "b t"] | None:
    """All positions count, pads included."""
    del sequence, shape
    return None


def sees_a_key(key_set: KeySet) -> Bool[Array, "b t"] | None:
    """Which queries see a key of their segment at all; None where the sources leave none without one."""
    seen = []
    for source in key_set.sources:
        if isinstance(source, HashBuckets):
            seen.append(source.query_count > 0)
        elif isinstance(source, Dilated):
            seen.append(source.key_position >= source.stride - 1)
        else:
            # The query's own position, the segment's first one, or the best of those so far.
            return None
    return functools.reduce(jnp.logical_or, seen)


def uniform_attention(
    q: Float[Array, "m t n"], k: Float[Array, "m t n"], v: Float[Array, "m t e"]
) -> Float[Array, "m t e"]:
    """What a query that sees no key gets, fault 3: the mean of all values of its padded item.

    The original hides keys by adding a huge negative number to their scores. In a row of nothing else the
    scores s_ij drown in it, so that all weights are 1/t, but their gradient is that of a softmax which hides
    nothing: d out_i / d s_ij = (v_j - mean v) / t. That is the gradient of sum_j s_ij (v_j - mean v) / t,
    v held constant, which equals q_i [sum_j k_j (v_j - mean v)^T] / t: one n x e matrix for all queries of an
    item. Its value is taken off again.

    Args:
      q, k, v: padded items, zeros at pads; the scores are q_i . k_j.

    Returns:
      (m, t, e), at least float32. Memory grows as m t e.
    """
    dtype = wide(q.dtype, v.dtype)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    mean = v.mean(axis=1, keepdims=True)
    slope = einsum("mtn,mte->mne", k, lax.stop_gradient(v - mean)) / v.shape[1]
    linear = einsum("mtn,mne->mte", q, slope)
    return mean + (linear - lax.stop_gradient(linear))


def residual(x: Float[Array, "b t d"], arch: str) -> Float[Array, "b t d"]:
    """The residual stream as a block adds to it: in mamba2 always float32."""
    return x.astype(jnp.float32) if arch == "mamba2" else x
