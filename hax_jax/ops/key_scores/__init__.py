"""Scores of keys by a small network that sees a key and a summary of the queries so far."""

import jax
from jaxtyping import Array, Float

from hax_jax.ops import dispatch
from hax_jax.ops.key_scores import mosaic_gpu, reference, xla

IMPLEMENTATIONS = {
    "xla": xla.key_scores,
    "reference": reference.key_scores,
    "mosaic_gpu": mosaic_gpu.key_scores,
}


@jax.named_scope("key_scores")
def key_scores(
    k: Float[Array, "b t n"],
    summary: Float[Array, "b t n"],
    w1: Float[Array, "i f"],
    b1: Float[Array, " f"],
    w2: Float[Array, "f f"],
    b2: Float[Array, " f"],
    w3: Float[Array, "f 1"],
    b3: Float[Array, " 1"],
    *,
    implementation: str | None = None,
) -> Float[Array, "b t"]:
    """Scores every key of a batch by a network with two hidden layers.

    score_j = w3^T relu(w2^T relu(w1^T [k_j, summary_j] + b1) + b2) + b3.

    Args:
      k, summary: (b, t, n). The dtype of k is that of every factor: summary and weights are rounded to it,
        and so is each hidden layer; sums are at least float32.
      w1, w2, w3: (2n, 2n), (2n, 2n), (2n, 1).
      b1, b2, b3: (2n,), (2n,), (1,).
      implementation: None, 'reference' (which rounds nothing), 'xla' or 'mosaic_gpu' (one kernel for Hopper
        GPUs, which None means on such GPUs where it can run the call; the gradient is that of 'xla').

    Returns:
      (b, t), at least float32.

    Raises:
      ValueError: shapes that do not fit, an implementation this op does not have or that cannot run the
        call.

    Source: HAX (arXiv 2507.00449), section 4. Memory grows as the input, and with 'xla' as b t times the
    width of the hidden layers.
    """
    arguments = (k, summary, w1, b1, w2, b2, w3, b3)
    preferred = dispatch.best(mosaic_gpu.why_not(*arguments))
    function = dispatch.resolve("key_scores", implementation, IMPLEMENTATIONS, preferred, batched=(0, 1))
    dispatch.check_shape("key_scores", "summary", summary.shape, k.shape, "b, t, n")
    width = 2 * k.shape[-1]
    for name, array, shape, legend in (
        ("w1", w1, (width, width), "2n, 2n"),
        ("b1", b1, (width,), "2n"),
        ("w2", w2, (width, width), "2n, 2n"),
        ("b2", b2, (width,), "2n"),
        ("w3", w3, (width, 1), "2n, 1"),
        ("b3", b3, (1,), "1"),
    ):
        dispatch.check_shape("key_scores", name, array.shape, shape, legend)
    return function(*arguments)
