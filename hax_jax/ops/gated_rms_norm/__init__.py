"""The root-mean-square norm of a gated input: what Mamba-2 ends with."""

import jax
from jaxtyping import Array, Float

from hax_jax.ops import devices, dispatch
from hax_jax.ops.gated_rms_norm import mosaic_gpu, reference, xla

IMPLEMENTATIONS = {
    "xla": xla.gated_rms_norm,
    "reference": reference.gated_rms_norm,
    "mosaic_gpu": mosaic_gpu.gated_rms_norm,
}


@jax.named_scope("norm")
def gated_rms_norm(
    x: Float[Array, "*b d"],
    gate: Float[Array, "*b d"],
    weight: Float[Array, " d"],
    eps: float,
    *,
    implementation: str | None = None,
) -> Float[Array, "*b d"]:
    """Normalises x SiLU(gate) over its last axis: the gate comes first.

    y = weight u / sqrt(mean(u^2) + eps), u = x SiLU(gate).

    Args:
      x, gate: (..., d).
      weight: (d,).
      eps: added to the mean of the squares.
      implementation: None, 'reference', 'xla' or 'mosaic_gpu' (the gradient as a kernel for Hopper GPUs,
        which None means on such GPUs where it can run the call and rows come in 64s).

    Returns:
      (..., d), at least float32.

    Raises:
      ValueError: shapes that do not fit, an implementation this op does not have or that cannot run the
        call.

    Source: Mamba-2 (arXiv 2405.21060), section 7. Memory grows as the input.
    """
    batched = (0, 1) if x.ndim > 1 else ()
    own = devices.share if batched else lambda array: array
    why_not = mosaic_gpu.why_not(own(x), own(gate), weight) or mosaic_gpu.why_rather_not(own(x))
    preferred = dispatch.best(why_not)
    function = dispatch.resolve("gated_rms_norm", implementation, IMPLEMENTATIONS, preferred, batched=batched)
    dispatch.check_shape("gated_rms_norm", "gate", gate.shape, x.shape, "..., d")
    dispatch.check_shape("gated_rms_norm", "weight", weight.shape, x.shape[-1:], "d")
    return function(x, gate, weight, eps)
