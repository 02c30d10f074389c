"""SSD, the state-space dual form: the recurrence of Mamba-2."""

import jax
from jaxtyping import Array, Float, Int

from hax_jax.ops import dispatch
from hax_jax.ops.ssd import mosaic_gpu, reference, xla

IMPLEMENTATIONS = {"xla": xla.ssd, "reference": reference.ssd, "mosaic_gpu": mosaic_gpu.ssd}


@jax.named_scope("ssd")
def ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    *,
    D: Float[Array, " h"] | None = None,
    dt_bias: Float[Array, " h"] | None = None,
    initial_state: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """Runs one matrix-valued linear recurrence per head, with one scalar decay a head and step.

    H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T,   y_t = H_t C_t + D x_t;
    head h reads group floor(h g / heads) of B and C.

    Args:
      x: (b, t, h, p) inputs.
      dt: (b, t, h) time steps; positive where `dt_bias` is None.
      A: (h,), negative.
      B, C: (b, t, g, n); g divides h.
      D: (h,), weight of the skip; none where None.
      dt_bias: (h,); if given, the time steps are softplus(dt + dt_bias).
      initial_state: (b, h, p, n), the state before the first position; zeros where None.
      segment_ids: (b, t) int32; the state is dropped at each boundary inside a row.
      chunk_size: positions multiplied as one tile by 'xla'.
      implementation: None ('mosaic_gpu' where it can run, else 'xla'), 'reference' (a step at a time), 'xla'
        (chunked matrix products, with `lax.associative_scan` between chunks) or 'mosaic_gpu' (kernels for
        Hopper GPUs).
        Matmul inputs keep the dtype of x; decays, sums and states are at least float32.

    Returns:
      y (b, t, h, p) and the state after the last position (b, h, p, n), both at least float32.

    Raises:
      ValueError: shapes that do not fit, an implementation this op does not have or that cannot run the
        call.

    Source: Mamba-2 (arXiv 2405.21060), section 6. Memory grows as b t h (p + chunk_size + p n / chunk_size).
    """
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    dispatch.check_shape("ssd", "dt", dt.shape, (b, t, h), "b, t, h")
    dispatch.check_shape("ssd", "A", A.shape, (h,), "h")
    dispatch.check_shape("ssd", "B", B.shape, (b, t, g, n), "b, t, g, n")
    dispatch.check_shape("ssd", "C", C.shape, (b, t, g, n), "b, t, g, n")
    if h % g:
        raise ValueError(f"`B` of ssd must have a number of groups that divides the {h} heads, got {g}")
    for name, vector in (("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            dispatch.check_shape("ssd", name, vector.shape, (h,), "h")
    if initial_state is not None:
        dispatch.check_shape("ssd", "initial_state", initial_state.shape, (b, h, p, n), "b, h, p, n")
    if segment_ids is not None:
        dispatch.check_shape("ssd", "segment_ids", segment_ids.shape, (b, t), "b, t")
    preferred = dispatch.best(mosaic_gpu.why_not(x, A, B, C))
    function = dispatch.resolve("ssd", implementation, IMPLEMENTATIONS, preferred, batched=(0, 1, 3, 4, 6, 7))
    return function(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size, dt_bias)
