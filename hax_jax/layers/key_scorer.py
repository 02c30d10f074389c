"""The network that scores keys for key selection, and its loss."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hax_jax.layers.linear import Linear
from hax_jax.layers.precision import Precision
from hax_jax.ops import ranking_loss, segments
from hax_jax.ops.numerics import einsum, wide


class KeyScorer(nnx.Module):
    """score_j = MLP([k_j, summary_j]), an MLP 2n -> 2n -> 2n -> 1 with ReLU; its inputs are held constant."""

    def __init__(self, state_size: int, *, scale: float, precision: Precision, rngs: nnx.Rngs):
        width = 2 * state_size
        settings: dict[str, Any] = {"scale": scale, "use_bias": True, "precision": precision, "rngs": rngs}
        self.layers = nnx.List([Linear(width, out, **settings) for out in (width, width, 1)])

    @jax.named_scope("key_scorer")
    def __call__(self, k: Float[Array, "b t n"], summary: Float[Array, "b t n"]) -> Float[Array, "b t"]:
        x = lax.stop_gradient(jnp.concatenate([k, summary], axis=-1))
        first, second, last = self.layers
        return last(jax.nn.relu(second(jax.nn.relu(first(x)))))[..., 0]


@jax.named_scope("gate_loss")
def gate_loss(
    scores: Float[Array, "b t"],
    q: Float[Array, "b t n"],
    k: Float[Array, "b t n"],
    noise: Float[Array, "b t"],
    num_samples: int,
    *,
    padding_mask: Bool[Array, "b t"] | None,
    counts: Bool[Array, "b t"] | None,
    segment_ids: Int[Array, "b t"] | None,
) -> tuple[Float[Array, ""], Float[Array, "b k"], Float[Array, "b k"]]:
    """The ranking loss of a sample of keys against how much the queries want them.

    target_j = sum over queries i >= j of sigmoid(q_i . k_j).

    Args:
      scores: (b, t), the only input that a gradient reaches.
      q, k: (b, t, n).
      noise: (b, t) uniform numbers in [0, 1); the positions of the largest are sampled, pads last.
      num_samples: keys sampled a row (all of them where the row is shorter).
      padding_mask: (b, t) True at real tokens; None where all are.
      counts: (b, t) True where a position counts, as query and as sampled key; None where all do.
      segment_ids: (b, t) int32; a key is wanted by queries of its own segment only.

    Returns:
      The loss, and the scores and targets of the sampled keys, best noise first.

    Source: HAX (arXiv 2507.00449), section 4. Memory grows as b t num_samples.
    """
    batch, length = scores.shape
    if padding_mask is not None:
        noise = jnp.where(padding_mask, noise, -1)
    _, sampled = lax.top_k(noise, min(num_samples, length))
    take = lambda array: jnp.take_along_axis(array, sampled, axis=1)  # noqa: E731

    sampled_keys = jnp.take_along_axis(k, sampled[..., None], axis=1)
    wants = jax.nn.sigmoid(einsum("btn,bkn->btk", q, sampled_keys))
    ids = segments.as_array(segment_ids, (batch, length))
    asks = (jnp.arange(length)[None, :, None] >= sampled[:, None]) & (ids[..., None] == take(ids)[:, None])
    if counts is not None:
        asks = asks & counts[..., None]
    targets = lax.stop_gradient(jnp.where(asks, wants, 0).sum(axis=1))
    sampled_scores = take(scores).astype(wide(scores.dtype))
    loss = ranking_loss(sampled_scores, targets, None if counts is None else take(counts))
    return loss, sampled_scores, targets
