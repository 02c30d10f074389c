"""What a model is trained and scored on: one batch of joint recall, as a pytree of arrays."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of items, split into model input and next tokens.

    An item of `padded_length` tokens gives `t = padded_length - 1` positions: position i sees token i and
    predicts token i + 1. Memory is linear in b * t.

    Attributes:
      tokens: (b, t) int32, the model's input.
      targets: (b, t) int32, the token that follows each input token.
      score_mask: (b, t) bool, True where the prediction counts: at key tokens after the separator.
      padding_mask: (b, t) bool, True where `tokens` is not a pad.
      n_context: (b,) int32, contexts in the item's table.
      n_key: (b,) int32, keys in the item's table.
      item_weight: (b,) float32, 1, or 0 for a filler row that only completes the last batch of an
        evaluation and is never scored.
    """

    # Not annotated as arrays: `jax.tree.map` also builds batches of shapes, shardings and the like.
    tokens: Any
    targets: Any
    score_mask: Any
    padding_mask: Any
    n_context: Any
    n_key: Any
    item_weight: Any
