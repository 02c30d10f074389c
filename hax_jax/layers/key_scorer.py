"""The network that scores keys for key selection, and its loss."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hax_jax.layers.linear import Linear
from hax_jax.layers.precision import Precision
from hax_jax.ops import key_scores, ranking_loss, segments
from hax_jax.ops.numerics import einsum, wide


class KeyScorer(nnx.Module):
    """score_j = MLP([k_j, summary_j]), an MLP 2n -> 2n -> 2n -> 1 with ReLU; its inputs are held constant."""

    def __init__(self, state_size: int, *, scale: float, precision: Precision, rngs: nnx.Rngs):
        width = 2 * state_size
        settings: dict[str, Any] = {"scale": scale, "use_bias": True, "precision": precision, "rngs": rngs}
        hidden = (Linear(width, width, inner=True, **settings) for _ in range(2))
        self.layers = nnx.List([*hidden, Linear(width, 1, **settings)])
        self.precision = precision

    @jax.named_scope("key_scorer")
    def __call__(self, k: Float[Array, "b t n"], summary: Float[Array, "b t n"]) -> Float[Array, "b t"]:
        x = lax.stop_gradient(jnp.concatenate([k, summary], axis=-1))
        first, second, last = self.layers
        return last(jax.nn.relu(second(jax.nn.relu(first(x)))))[..., 0]

    @jax.named_scope("key_scorer")
    def held_constant(
        self, k: Float[Array, "b t n"], summary: Float[Array, "b t n"], *, implementation: str | None = None
    ) -> Float[Array, "b t"]:
        """The scores of many keys by one operation (`ops.key_scores`), through which no gradient passes."""
        k, summary = (x.astype(self.precision.matmul) for x in (k, summary))
        weights = (x[...] for layer in self.layers for x in (layer.kernel, layer.bias) if x is not None)
        scores = key_scores(*lax.stop_gradient((k, summary, *weights)), implementation=implementation)
        return scores.astype(self.precision.activation)


def sample_keys(
    noise: Float[Array, "b t"], num_samples: int, padding_mask: Bool[Array, "b t"] | None
) -> Int[Array, "b k"]:
    """Positions of the keys that the gate loss looks at, those of the largest noise first and pads last.

    Args:
      noise: (b, t) uniform numbers in [0, 1).
      num_samples: keys sampled a row; all of them where the row is shorter.
      padding_mask: (b, t) True at real tokens; None where all are.
    """
    if padding_mask is not None:
        noise = jnp.where(padding_mask, noise, -1)
    return lax.top_k(noise, min(num_samples, noise.shape[1]))[1]


@jax.named_scope("gate_loss")
def gate_loss(
    scores: Float[Array, "b k"],
    sampled: Int[Array, "b k"],
    q: Float[Array, "b t n"],
    sampled_keys: Float[Array, "b k n"],
    *,
    counts: Bool[Array, "b t"] | None,
    segment_ids: Int[Array, "b t"] | None,
) -> tuple[Float[Array, ""], Float[Array, "b k"]]:
    """The ranking loss of a sample of keys against how much the queries want them.

    target_j = sum over queries i >= j of sigmoid(q_i . k_j).

    Args:
      scores: (b, k), the sampled keys' scores, the only input that a gradient reaches.
      sampled: (b, k), their positions.
      q: (b, t, n).
      sampled_keys: (b, k, n).
      counts: (b, t) True where a position counts, as query and as sampled key; None where all do.
      segment_ids: (b, t) int32; a key is wanted by queries of its own segment only.

    Returns:
      The loss, and the targets of the sampled keys.

    Source: HAX (arXiv 2507.00449), section 4. Memory grows as b t k.
    """
    batch, length, _ = q.shape
    take = lambda array: jnp.take_along_axis(array, sampled, axis=1)  # noqa: E731
    wants = jax.nn.sigmoid(einsum("btn,bkn->btk", q, sampled_keys))
    ids = segments.as_array(segment_ids, (batch, length))
    asks = (jnp.arange(length)[None, :, None] >= sampled[:, None]) & (ids[..., None] == take(ids)[:, None])
    if counts is not None:
        asks = asks & counts[..., None]
    targets = lax.stop_gradient(jnp.where(asks, wants, 0).sum(axis=1))
    scores = scores.astype(wide(scores.dtype))
    return ranking_loss(scores, targets, None if counts is None else take(counts)), targets
