"""Attention over the keys that a key set shows."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hax_jax.ops import dispatch
from hax_jax.ops.numerics import wide
from hax_jax.ops.sparse_attention import mosaic_gpu, reference, xla
from hax_jax.ops.sparse_attention.key_set import (
    Dilated,
    Full,
    HashBuckets,
    KeySet,
    Lifetimes,
    Sink,
    SlidingWindow,
)

__all__ = [
    "Dilated",
    "Full",
    "HashBuckets",
    "KeySet",
    "Lifetimes",
    "Sink",
    "SlidingWindow",
    "sparse_attention",
]

IMPLEMENTATIONS = {
    "xla": xla.sparse_attention,
    "reference": reference.sparse_attention,
    "mosaic_gpu": mosaic_gpu.sparse_attention,
}
EMPTY_ROWS = ("zero", "uniform")


@jax.named_scope("sparse_attention")
def sparse_attention(
    q: Float[Array, "b t h n"],
    k: Float[Array, "b t h n"],
    v: Float[Array, "b t h e"],
    key_set: KeySet,
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    empty_rows: str = "zero",
    dtype: Any = None,
    implementation: str | None = None,
) -> Float[Array, "b t h e"]:
    """Attends to the keys that `key_set` shows, each once, with one softmax over their union.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j over the j visible to i.

    Args:
      q, k: (b, t, h, n) queries and keys.
      v: (b, t, h, e) values.
      key_set: which keys each query sees; the same for all heads.
      segment_ids: (b, t) int32; a query sees its own segment only.
      scale: factor of the scores; None is 1 / sqrt(n).
      empty_rows: what a query without visible keys gets: 'zero', or 'uniform', the mean of v over all t
        positions (a fault of the original, for parity).
      dtype: of the result, and of what its gradient keeps of it; None is float32, or that of v if wider.
      implementation: None, 'reference' (one t x t mask), 'xla' (any device) or 'mosaic_gpu' (kernels for
        Hopper GPUs, bfloat16 or float32, n up to 128; None means them on such GPUs where they can run the
        call).
        Matmul inputs keep the dtypes of q, k and v; scores, softmax and sums are at least float32.

    Returns:
      (b, t, h, e) of `dtype`.

    Raises:
      ValueError: shapes that do not fit, an unknown `empty_rows`, or an implementation that this op does not
        have or that cannot run this call.

    Source: HAX (arXiv 2507.00449), section 4. Memory grows as b t h (n + e), and so does the time of hash
    buckets, lifetimes, sliding windows and sinks; with other sources, and in short rows, time grows as
    t^2.
    """
    preferred = dispatch.best(mosaic_gpu.why_not(q, k, v))
    function = dispatch.resolve(
        "sparse_attention", implementation, IMPLEMENTATIONS, preferred, batched=(0, 1, 2, 3, 4)
    )
    b, t, h, n = q.shape
    dispatch.check_shape("sparse_attention", "k", k.shape, (b, t, h, n), "b, t, h, n")
    dispatch.check_shape("sparse_attention", "v", v.shape, (b, t, h, v.shape[-1]), "b, t, h, e")
    if segment_ids is not None:
        dispatch.check_shape("sparse_attention", "segment_ids", segment_ids.shape, (b, t), "b, t")
    if empty_rows not in EMPTY_ROWS:
        raise ValueError(f"`empty_rows` of sparse_attention must be one of {EMPTY_ROWS}, got {empty_rows!r}")
    scale = n**-0.5 if scale is None else scale
    # By name: `devices.divided` would take a dtype, which has a number of axes, for an array.
    dtype = jnp.dtype(wide(q.dtype, v.dtype) if dtype is None else dtype).name
    return function(q, k, v, key_set, segment_ids, scale, empty_rows == "uniform", dtype)
