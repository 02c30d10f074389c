"""Selective scan: the recurrence of Mamba-1."""

import jax
from jaxtyping import Array, Float, Int

from hax_jax.ops import dispatch
from hax_jax.ops.selective_scan import mosaic_gpu, reference, xla

IMPLEMENTATIONS = {
    "xla": xla.selective_scan,
    "reference": reference.selective_scan,
    "mosaic_gpu": mosaic_gpu.selective_scan,
}


@jax.named_scope("selective_scan")
def selective_scan(
    x: Float[Array, "b t e"],
    dt: Float[Array, "b t e"],
    A: Float[Array, "e n"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    *,
    D: Float[Array, " e"] | None = None,
    initial_state: Float[Array, "b e n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    softplus: bool = False,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """Runs one linear recurrence per channel and state, with a decay that depends on the input.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,   y_t = sum_n C_t h_t + D x_t.

    Args:
      x: (b, t, e) inputs.
      dt: (b, t, e) time steps, positive; or any numbers, with `softplus`.
      A: (e, n), negative.
      B, C: (b, t, n).
      D: (e,), weight of the skip; none where None.
      initial_state: (b, e, n), the state before the first position; zeros where None.
      segment_ids: (b, t) int32; the state is dropped at each boundary inside a row.
      softplus: take softplus(dt) for dt, which the kernels do without writing it to memory.
      chunk_size: positions held in memory at once by 'xla'.
      implementation: None, 'reference' (a step at a time), 'xla' (chunks of `lax.associative_scan`) or
        'mosaic_gpu' (kernels for Hopper GPUs, which None means on such GPUs where they can run the call).

    Returns:
      y (b, t, e) and the state after the last position (b, e, n), both at least float32.

    Raises:
      ValueError: shapes that do not fit, an implementation this op does not have, or one that cannot run
        this call on this device.

    Source: Mamba (arXiv 2312.00752), section 3.2. Memory grows as b t e, plus b chunk_size e n while a chunk
    is worked on and b (t / chunk_size) e n for the backward pass ('mosaic_gpu': b (t / 8) e n only).
    """
    (b, t, e), n = x.shape, A.shape[1]
    dispatch.check_shape("selective_scan", "dt", dt.shape, (b, t, e), "b, t, e")
    dispatch.check_shape("selective_scan", "A", A.shape, (e, n), "e, n")
    dispatch.check_shape("selective_scan", "B", B.shape, (b, t, n), "b, t, n")
    dispatch.check_shape("selective_scan", "C", C.shape, (b, t, n), "b, t, n")
    if D is not None:
        dispatch.check_shape("selective_scan", "D", D.shape, (e,), "e")
    if initial_state is not None:
        dispatch.check_shape("selective_scan", "initial_state", initial_state.shape, (b, e, n), "b, e, n")
    if segment_ids is not None:
        dispatch.check_shape("selective_scan", "segment_ids", segment_ids.shape, (b, t), "b, t")
    preferred = dispatch.best(mosaic_gpu.why_not(x, dt, A, B, C))
    function = dispatch.resolve(
        "selective_scan", implementation, IMPLEMENTATIONS, preferred, batched=(0, 1, 3, 4, 6, 7)
    )
    return function(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size, softplus)
