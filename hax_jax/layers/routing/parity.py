"""Routing as the original has it, its faults reproduced on purpose: for comparison only.

1. Hashing and the scorer divide by norms over the whole padded sequence, pads and future included.
2. The hash projection is drawn anew at every call, evaluation included.
3. A query that sees no key attends uniformly to all positions, later ones and pads too.
4. mamba2 leaves out all masking of pads where the batch has one row.
5. The gate loss counts pads: as queries (each adds 0.5), and as sampled keys where real ones run out.
6. mamba2 rounds the residual stream to float32 before each addition, also where all else is float64; in
   bfloat16 the stream is therefore wider than what is added to it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hax_jax.layers.sequence import Sequence

FRESH_PROJECTION = True
EMPTY_ROWS = "uniform"

_TINY = 1e-12


def make_sequence(
    padding_mask: Bool[Array, "b t"] | None, segment_ids: Int[Array, "b t"] | None, arch: str
) -> Sequence:
    """Keeps pads as positions like all others; their inner states are zeroed by the mixers alone."""
    if segment_ids is not None:
        raise ValueError(
            "`segment_ids` must be None with routing='parity', whose statistics run over the whole row, "
            "got an array; use routing='causal' for packed rows"
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
def query_summary(q: Float[Array, "b t n"], sequence: Sequence) -> Float[Array, "b t n"]:
    """The running sum of queries, each feature divided by that sum's norm over the row."""
    del sequence
    return _divide_by_norm_over_time(jnp.cumsum(q, axis=1))


def counts_for_gate_loss(sequence: Sequence, shape: tuple[int, int]) -> Bool[Array, "b t"] | None:
    """All positions count, pads included."""
    del sequence, shape
    return None


def residual(x: Float[Array, "b t d"], arch: str) -> Float[Array, "b t d"]:
    """The residual stream as a block adds to it: in mamba2 always float32."""
    return x.astype(jnp.float32) if arch == "mamba2" else x
