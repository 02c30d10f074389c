"""Source recall: how many scored queries see the place where their answer was told, and through which source.

A query is a key token after the separator; its answer is the value that followed the same key under the same
context before it. `recall` asks for that value's own position. `reach` asks for any of the `conv_kernel`
positions from there on, in whose values the layer's convolution still holds the answer. Neither says that the
attention does look there.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hax_jax.data.batch import Batch
from hax_jax.models import LanguageModel
from hax_jax.ops import KeySet

# Larger than any token id.
_LAST = jnp.iinfo(jnp.int32).max
# The two questions, in the order of the last axis of `visible_shares`.
KINDS = ("recall", "reach")
ANY = "any"


def measured(model: nnx.Module) -> tuple[int, tuple[str, ...]] | None:
    """Layers and sources of a model whose recall can be measured; None where there is nothing to measure."""
    if not isinstance(model, LanguageModel) or not model.config.sources:
        return None
    return model.config.num_layers, model.config.sources


def shape(layers: int, sources: tuple[str, ...]) -> tuple[int, int, int]:
    """The shape of what `visible_shares` sums: one more layer for all layers, one more source for all."""
    return layers + 1, len(sources) + 1, len(KINDS)


def named(shares: Any, sources: tuple[str, ...]) -> dict[str, float]:
    """Mean shares by name: 'recall/1/key_selection' is that source's in the first layer, 'any' joins them."""
    layers = [*map(str, range(1, len(shares))), ANY]
    return {
        f"{kind}/{layer}/{source}": float(shares[row][column][index])
        for index, kind in enumerate(KINDS)
        for row, layer in enumerate(layers)
        for column, source in enumerate((*sources, ANY))
    }


@jax.named_scope("recall")
def visible_shares(model: nnx.Module, output: Any, batch: Batch) -> Float[Array, "layers sources kinds"]:
    """The share of an item's scored queries that see their answer, summed over the items of a batch.

    Args:
      model: gives the width of the convolution.
      output: what it computed for `batch`.
      batch: items with `scored` positions; those of weight 0 add nothing.

    Returns:
      See `shape`. Memory grows as layers sources conv_kernel m s; no matrix of queries and keys is made.
    """
    assert isinstance(model, LanguageModel) and batch.scored is not None
    asked = batch.scored.position
    told = answer_positions(batch)
    used = batch.scored.used & (batch.item_weight > 0)[:, None]
    # The answer's position and those whose convolution window reaches back to it.
    keys = told[..., None] + jnp.arange(model.config.conv_kernel)
    shape = keys.shape
    queries = jnp.broadcast_to(asked[..., None], shape)
    row, first = _rows(batch)
    by_layer = []
    for layer in output.layers:
        sources = layer.branch.key_set.sources
        by_layer.append(jnp.stack([_visible(source, row, first, queries, keys) for source in sources]))
    seen = jnp.stack(by_layer)
    seen = jnp.concatenate([seen, seen.any(0, keepdims=True)])
    seen = jnp.concatenate([seen, seen.any(1, keepdims=True)], axis=1)
    kinds = jnp.stack([seen[..., 0], seen.any(-1)], axis=-1) & used[..., None]
    counts = jnp.maximum(used.sum(-1, dtype=jnp.float32), 1.0)
    return (kinds.sum(-2, dtype=jnp.float32) / counts[:, None]).sum(-2)


def answer_positions(batch: Batch) -> Int[Array, "m s"]:
    """The position in its item of the value that answers each question of `batch.scored`; any if unused.

    Every pair of a context and a key is told once and asked once, so that both halves, each sorted by
    (context, key), name the same pairs in the same order.
    """
    assert batch.scored is not None
    tokens = batch.tokens if batch.packing is None else batch.packing.to_items(batch.tokens)
    place = jnp.arange(batch.scored.position.shape[1], dtype=jnp.int32)
    c, k = batch.n_context[:, None], batch.n_key[:, None]
    width, used = 2 * k + 1, place < c * k

    def by_pair(begin):
        """Places and positions of a half's keys in the order of their pairs."""
        context = begin + place // k * width
        key = context + 1 + 2 * (place % k)
        token = lambda at: jnp.where(  # noqa: E731
            used, jnp.take_along_axis(tokens, at, axis=1, mode="clip"), _LAST
        )
        places = jnp.broadcast_to(place, key.shape)
        return jax.lax.sort((token(context), token(key), places, key), dimension=1, num_keys=2)

    *_, told = by_pair(1)
    *_, asked, _ = by_pair(c * width + 2)
    _, told = jax.lax.sort((asked, told), dimension=1, num_keys=1)
    return told + 1


def _rows(batch: Batch) -> tuple[Int[Array, "m 1 1"], Int[Array, "m 1 1"]]:
    """The row of each item and the position in it of the item's first token."""
    if batch.packing is None:
        row = jnp.arange(batch.n_context.shape[0], dtype=jnp.int32)
        first = jnp.zeros_like(row)
    else:
        row, first = jnp.divmod(batch.packing.first, batch.packing.segment_ids.shape[1])
    return row[:, None, None], first[:, None, None]


def _visible(source, row, first, queries, keys) -> Bool[Array, "m s w"]:
    """Whether queries see keys through one source; both are positions in their items."""
    return KeySet((source,)).places(row, first + queries, first + keys)
