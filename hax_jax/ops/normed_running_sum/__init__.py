"""The sum of what a segment has had so far, over the norm of those sums."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hax_jax.ops import dispatch
from hax_jax.ops.normed_running_sum import mosaic_gpu, reference, xla
from hax_jax.ops.numerics import wide

IMPLEMENTATIONS = {
    "xla": xla.normed_running_sum,
    "reference": reference.normed_running_sum,
    "mosaic_gpu": mosaic_gpu.normed_running_sum,
}


@jax.named_scope("normed_running_sum")
def normed_running_sum(
    x: Float[Array, "b t n"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    dtype: Any = None,
    implementation: str | None = None,
) -> Float[Array, "b t n"]:
    """Sums over time, each feature divided by the norm of its sums so far.

    y_t = s_t / sqrt(sum_{i <= t} s_i^2), s_t = sum_{i <= t} x_i, both within the segment; 0 where all is 0.

    Args:
      x: (b, t, n).
      segment_ids: (b, t) int32; None for one segment a row.
      dtype: of the result; None for at least float32, as which all is summed.
      implementation: None, 'reference' (quadratic), 'xla' or 'mosaic_gpu' (one kernel for Hopper GPUs, which
        None means on such GPUs where it can run the call; rows beyond 4,096 are left to 'xla' under either
        name; the gradient is that of 'xla').

    Returns:
      (b, t, n).

    Raises:
      ValueError: shapes that do not fit, an implementation this op does not have or that cannot run the
        call.

    Source: the key scorer's view of the queries in HAX (arXiv 2507.00449), section 4, without its future.
    Memory grows as the input.
    """
    # By its name: a dtype has dimensions, as what is divided over devices has.
    dtype = jnp.dtype(wide(x.dtype) if dtype is None else dtype).name
    preferred = dispatch.best(mosaic_gpu.why_not(x, dtype))
    function = dispatch.resolve(
        "normed_running_sum", implementation, IMPLEMENTATIONS, preferred, batched=(0, 1)
    )
    if segment_ids is not None:
        dispatch.check_shape("normed_running_sum", "segment_ids", segment_ids.shape, x.shape[:2], "b, t")
    return function(x, segment_ids, dtype)
