"""Depthwise causal convolution along time, then SiLU."""

import jax
from jaxtyping import Array, Float, Int

from hax_jax.ops import dispatch
from hax_jax.ops.causal_conv1d import mosaic_gpu, reference, xla

IMPLEMENTATIONS = {
    "xla": xla.causal_conv1d,
    "reference": reference.causal_conv1d,
    "mosaic_gpu": mosaic_gpu.causal_conv1d,
}


@jax.named_scope("causal_conv1d")
def causal_conv1d(
    x: Float[Array, "b t c"],
    weight: Float[Array, "w c"],
    bias: Float[Array, " c"] | None = None,
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t c"]:
    """Convolves every channel with its own causal filter and applies SiLU.

    y_t = SiLU(sum_{i < w} weight_i x_{t - w + 1 + i} + bias), with zeros before a segment's start.

    Args:
      x: (b, t, c), any float dtype.
      weight: (w, c); the last tap multiplies the current position.
      bias: (c,) or None.
      segment_ids: (b, t) int32; the filter never reaches across a boundary.
      implementation: None ('mosaic_gpu' where it can run, else 'xla'), 'reference', 'xla' or 'mosaic_gpu'
        (the gradient as a kernel for Hopper GPUs).

    Returns:
      (b, t, c) in the dtype of x; products and sums are at least float32.

    Raises:
      ValueError: shapes that do not fit, an implementation this op does not have or that cannot run the
        call.

    Source: Mamba (arXiv 2312.00752), figure 3. Memory grows as b t c.
    """
    width, channels = weight.shape
    dispatch.check_shape("causal_conv1d", "weight", weight.shape, (width, x.shape[2]), "w, c")
    if bias is not None:
        dispatch.check_shape("causal_conv1d", "bias", bias.shape, (channels,), "c")
    if segment_ids is not None:
        dispatch.check_shape("causal_conv1d", "segment_ids", segment_ids.shape, x.shape[:2], "b, t")
    preferred = dispatch.best(mosaic_gpu.why_not(x, weight))
    function = dispatch.resolve("causal_conv1d", implementation, IMPLEMENTATIONS, preferred, batched=(0, 3))
    return function(x, weight, bias, segment_ids)
