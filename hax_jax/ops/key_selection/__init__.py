"""Key selection: scores to lifetimes, and the ranking loss that trains the scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hax_jax.ops import devices, dispatch
from hax_jax.ops.key_selection import mosaic_gpu, reference, xla
from hax_jax.ops.numerics import wide

IMPLEMENTATIONS = {
    "xla": xla.key_lifetimes,
    "reference": reference.key_lifetimes,
    "mosaic_gpu": mosaic_gpu.key_lifetimes,
}


@jax.named_scope("key_lifetimes")
def key_lifetimes(
    scores: Float[Array, "b t"],
    num_keys: int,
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: str | None = None,
) -> Int[Array, "b t"]:
    """Tells until when each key stays in the running top-k.

    Key j is visible to query i exactly when j <= i < expiry_j. A score never changes and a prefix only grows,
    so a key that has left the `num_keys` best of the prefix never comes back: expiry_j is the position at
    which the num_keys-th better key has come (that position itself included; t where it never comes), and j
    itself for a key that is never visible. Of equal scores the earlier position is the better.

    Args:
      scores: (b, t) any float dtype, no NaN.
      num_keys: k, at least 1.
      segment_ids: (b, t) int32; each segment has a running top-k of its own.
      implementation: None, 'reference' (compares all pairs), 'xla' (a sort, then log2(t) linear passes) or
        'mosaic_gpu' (kernels for Hopper GPUs: one that compares pairs for rows up to 4,096, beyond, the best
        keys of each chunk's prefix; more than 64 keys in long rows, and float64, as 'xla'). None means it on
        such GPUs where it has kernels for the call, and 'xla' elsewhere.

    Returns:
      (b, t) int32 expiries, at least j.

    Raises:
      ValueError: `num_keys` below 1, shapes that do not fit, or an implementation this op does not have.

    Source: HAX (arXiv 2507.00449), section 4, restated; the README beside this file derives it. Memory grows
    as b t ('xla').
    """
    preferred = dispatch.best(mosaic_gpu.why_not(scores, num_keys))
    function = dispatch.resolve("key_lifetimes", implementation, IMPLEMENTATIONS, preferred, batched=(0, 2))
    if num_keys < 1:
        raise ValueError(f"`num_keys` of key_lifetimes must be at least 1, got {num_keys}")
    if segment_ids is not None:
        dispatch.check_shape("key_lifetimes", "segment_ids", segment_ids.shape, scores.shape, "b, t")
    return function(scores, num_keys, segment_ids)


def key_lifetimes_and_alive(
    scores: Float[Array, "b t"],
    num_keys: int,
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: str | None = None,
) -> tuple[Int[Array, "b t"], Int[Array, "c k"] | None]:
    """As `key_lifetimes`, and what its kernels find on the way: the keys alive where each chunk begins.

    Args:
      As for `key_lifetimes`.

    Returns:
      (b, t) int32 expiries; and for `Lifetimes`, of the batch as one list of b t positions in chunks of 64,
      the keys alive at each chunk's first position, (chunks, num_keys) int32, b t or more where there are no
      more. None where the form does not find them, or where a mesh divides the batch.

    Raises:
      ValueError: as `key_lifetimes`.
    """
    preferred = dispatch.best(mosaic_gpu.why_not(scores, num_keys))
    chosen = preferred if implementation is None else implementation
    if chosen == "mosaic_gpu" and mosaic_gpu.finds_alive(scores, num_keys) and not devices.divides_batches():
        with jax.named_scope("key_lifetimes"):
            return mosaic_gpu.key_lifetimes_and_alive(scores, num_keys, segment_ids)
    return key_lifetimes(scores, num_keys, segment_ids=segment_ids, implementation=implementation), None


def ranking_loss(
    scores: Float[Array, "b k"], targets: Float[Array, "b k"], valid: Bool[Array, "b k"] | None = None
) -> Float[Array, ""]:
    """Asks scores to stand in the order of their targets.

    loss = mean over ordered pairs (a, c), a = c included, of BCE(sigmoid(score_a - score_c), label) with
    label 1, 0.5 or 0 where target_a is above, equal to or below target_c.

    Args:
      scores: (b, k), the gradient's only way.
      targets: (b, k), held constant.
      valid: (b, k) bool; pairs with an invalid member are left out of the mean.

    Returns:
      A scalar, at least float32; 0 where no pair is valid.

    Source: HAX (arXiv 2507.00449), section 4. Memory grows as b k^2.
    """
    dtype = wide(scores.dtype)
    scores, targets = scores.astype(dtype), jax.lax.stop_gradient(targets)
    logit = scores[:, :, None] - scores[:, None, :]
    label = 0.5 * (1 + jnp.sign(targets[:, :, None] - targets[:, None, :]).astype(dtype))
    loss = jax.nn.softplus(logit) - label * logit
    if valid is None:
        return loss.mean()
    pair = valid[:, :, None] & valid[:, None, :]
    return jnp.where(pair, loss, 0).sum() / jnp.maximum(pair.sum(), 1)
