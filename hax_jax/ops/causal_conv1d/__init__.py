"""Depthwise causal convolution along time, then SiLU."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

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
    mask: Bool[Array, "b t"] | None = None,
    sizes: Sequence[int] | None = None,
    implementation: str | None = None,
) -> Any:
    """Convolves every channel with its own causal filter and applies SiLU.

    y_t = SiLU(sum_{i < w} weight_i x_{t - w + 1 + i} + bias), with zeros before a segment's start. Where
    `mask` is False x counts as zero, and y is.

    Args:
      x: (b, t, c), any float dtype.
      weight: (w, c); the last tap multiplies the current position.
      bias: (c,) or None.
      segment_ids: (b, t) int32; the filter never reaches across a boundary.
      mask: (b, t) bool, False at pads: nothing comes from there, and the result there is zero. The kernels
        multiply by it: x must be finite at pads too.
      sizes: of blocks of channels that are wanted as arrays of their own, c in all.
      implementation: None ('mosaic_gpu' where it can run, else 'xla'), 'reference', 'xla' or 'mosaic_gpu'
        (kernels for Hopper GPUs).

    Returns:
      (b, t, c) in the dtype of x, or with `sizes` a tuple of (b, t, size); products and sums are at least
      float32.

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
    if mask is not None:
        dispatch.check_shape("causal_conv1d", "mask", mask.shape, x.shape[:2], "b, t")
    blocks = (channels,) if sizes is None else tuple(sizes)
    if sum(blocks) != channels or min(blocks) < 1:
        raise ValueError(f"`sizes` of causal_conv1d must be positive and add up to {channels}, got {blocks}")
    preferred = dispatch.best(mosaic_gpu.why_not(x, weight, blocks))
    function = dispatch.resolve(
        "causal_conv1d", implementation, IMPLEMENTATIONS, preferred, batched=(0, 3, 4)
    )
    ys = function(x, weight, bias, segment_ids, mask, blocks)
    return ys[0] if sizes is None else ys
