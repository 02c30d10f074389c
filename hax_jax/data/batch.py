"""What a model is trained and scored on: one batch of joint recall, as a pytree of arrays."""

import dataclasses
from typing import Any

import jax

from hax_jax.packing import Packing, ScoredPositions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of m items, split into model input and next tokens.

    An item of `padded_length` tokens gives `padded_length - 1` positions: position i sees token i and
    predicts token i + 1. Each item has a padded row of its own (b = m), or `packing` tells where in which row
    it lies. Memory is linear in b * t.

    Attributes:
      tokens: (b, t) int32, the model's input.
      targets: (b, t) int32, the token that follows each input token.
      score_mask: (b, t) bool, True where the prediction counts: at key tokens after the separator.
      padding_mask: (b, t) bool, True where `tokens` is not a pad.
      n_context: (m,) int32, contexts in the item's table.
      n_key: (m,) int32, keys in the item's table.
      item_weight: (m,) float32, 1, or 0 for a filler item that only completes the last batch of an
        evaluation and is never scored.
      num_scored: () float32, how many predictions count; None to find it from the others.
      scored: the positions of `score_mask` item by item; None where they are not known that way.
      packing: where the items lie in the rows; None where each has a row of its own.
    """

    # Not annotated as arrays: `jax.tree.map` also builds batches of shapes, shardings and the like.
    tokens: Any
    targets: Any
    score_mask: Any
    padding_mask: Any
    n_context: Any
    n_key: Any
    item_weight: Any
    num_scored: Any = None
    scored: ScoredPositions | None = None
    packing: Packing | None = None
