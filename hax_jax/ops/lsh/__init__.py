"""Locality-sensitive hashing: vectors to codes, codes to the integers that describe visible keys."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hax_jax.ops import dispatch, pairs_mosaic_gpu
from hax_jax.ops.lsh import mosaic_gpu, reference, xla
from hax_jax.ops.numerics import einsum

IMPLEMENTATIONS = {
    "xla": xla.bucket_orders,
    "reference": reference.bucket_orders,
    "mosaic_gpu": mosaic_gpu.bucket_orders,
}

MAX_BITS = 31


@jax.named_scope("hash")
def sign_hash(x: Float[Array, "b t n"], projection: Float[Array, "n r"]) -> Int[Array, "b t"]:
    """Codes vectors by the signs of r projections.

    code = sum_r 2^r [x . projection_r > 0].

    Args:
      x: (b, t, n).
      projection: (n, r), r in 1..31; shared by queries, keys and the batch.

    Returns:
      (b, t) int32 codes in 0..2^r - 1.

    Raises:
      ValueError: more bits than an int32 holds.

    Source: HAX (arXiv 2507.00449), section 4; sign random projections, Charikar 2002. Memory grows as b t r.
    """
    bits = projection.shape[1]
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(
            f"`projection` of sign_hash must have 1..{MAX_BITS} columns, got {bits}; lower num_hash"
        )
    positive = einsum("btn,nr->btr", x, projection) > 0
    return jnp.sum(positive * (1 << jnp.arange(bits, dtype=jnp.int32)), axis=-1, dtype=jnp.int32)


@jax.named_scope("hash")
def argmax_hash(x: Float[Array, "b t n"], projection: Float[Array, "n r"]) -> Int[Array, "b t"]:
    """Codes vectors by which of r projections is largest; of equal ones, the first.

    Args:
      x: (b, t, n).
      projection: (n, r).

    Returns:
      (b, t) int32 codes in 0..r - 1.

    Source: the original's code (`argmax_lsh`; reference only, no configuration of the paper uses it).
    Memory grows as b t r.
    """
    return jnp.argmax(einsum("btn,nr->btr", x, projection), axis=-1).astype(jnp.int32)


@jax.named_scope("bucket_orders")
def bucket_orders(
    query_code: Int[Array, "b t"],
    key_code: Int[Array, "b t"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    num_codes: int | None = None,
    implementation: str | None = None,
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """Numbers the keys of each bucket, so that 'the w most recent keys of my bucket' is integer arithmetic.

    count_i = #{j <= i : key_code_j = query_code_i},   order_j = #{i < j : key_code_i = key_code_j},
    both within one segment. For equal codes, j <= i holds exactly when order_j <= count_i - 1, so key j is
    among the w most recent that query i may see exactly when 0 <= count_i - 1 - order_j < w.

    Args:
      query_code, key_code: (b, t) int32, of the same positions.
      segment_ids: (b, t) int32; buckets are counted anew in each segment.
      num_codes: where it is known that codes are in 0..num_codes - 1; the fewer bits, the fewer passes of a
        sort.
      implementation: None, 'reference' (compares all pairs), 'xla' (one sort) or 'mosaic_gpu' (a kernel for
        Hopper GPUs, which compares pairs; rows beyond 4,096 as 'xla'). None means it for rows up to 4,096 on
        such GPUs, and 'xla' elsewhere.

    Returns:
      count (b, t) and order (b, t), int32.

    Raises:
      ValueError: shapes that do not fit, or an implementation this op does not have.

    Source: design of this project, after HAX (arXiv 2507.00449), section 4. Memory grows as b t ('xla').
    """
    preferred = dispatch.best(pairs_mosaic_gpu.why_not(query_code.shape))
    function = dispatch.resolve(
        "bucket_orders", implementation, IMPLEMENTATIONS, preferred, batched=(0, 1, 2)
    )
    dispatch.check_shape("bucket_orders", "key_code", key_code.shape, query_code.shape, "b, t")
    if segment_ids is not None:
        dispatch.check_shape("bucket_orders", "segment_ids", segment_ids.shape, query_code.shape, "b, t")
    return function(query_code, key_code, segment_ids, num_codes)
