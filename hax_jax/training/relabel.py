"""Tables of other sizes in the token ids that a model was trained with.

The ids of keys and contexts follow from the largest tables of a task (`DataConfig`): a task of other tables
numbers its contexts differently, and its items mean nothing to the model until they are renamed. In tables
larger than those of the training, the keys and contexts beyond get ids that the training never used.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from hax_jax.config import ConfigError, DataConfig
from hax_jax.data.joint_recall import FIRST_VALUE, first_context, first_key

# Where each kind of token begins, by the field that counts them.
_FIRST: dict[str, Callable[[DataConfig], int]] = {
    "n_value": lambda config: FIRST_VALUE,
    "max_n_key": first_key,
    "max_n_context": first_context,
}


class RelabeledSplit:
    """A split whose tokens are renamed from its own layout to that of another task.

    Args:
      split: what `hax_jax.data.make_split` made of `data`.
      data: the split's own task.
      trained: the task whose token ids are wanted.
    """

    def __init__(self, split: Any, data: DataConfig, trained: DataConfig):
        self.num_items, self.iterator = split.num_items, split.iterator
        self._split = split
        self._names = new_names(data, trained)

    def materialize(self, raw: Any) -> Any:
        """The split's batch with its tokens renamed; a pure function of `raw`."""
        batch = self._split.materialize(raw)
        names = jnp.asarray(self._names)
        return dataclasses.replace(batch, tokens=names[batch.tokens], targets=names[batch.targets])


def check_fits(data: DataConfig, trained: DataConfig, vocab_size: int) -> int:
    """The number of token ids of `data` that the training never used.

    Raises:
      ConfigError: the vocabulary has no room for them.
    """
    needed = trained.min_vocab_size + sum(
        max(0, getattr(data, name) - getattr(trained, name)) for name in _FIRST
    )
    if needed > vocab_size:
        raise ConfigError(
            "data.max_n_context",
            f"such that {vocab_size} token ids, the run's vocabulary, are enough",
            data.max_n_context,
            f"{data.max_n_context} contexts, {data.max_n_key} keys and {data.n_value} values beside "
            f"those of the training need {needed}; lower one of them",
        )
    return needed - trained.min_vocab_size


def new_names(data: DataConfig, trained: DataConfig) -> np.ndarray:
    """The id in the layout of `trained` of every token of `data`, (data.min_vocab_size,) int32.

    Values, keys and contexts beyond those of the training get ids that it never used, in this order.
    """
    names = np.arange(data.min_vocab_size, dtype=np.int32)
    unused = trained.min_vocab_size
    for name, first in _FIRST.items():
        count, known = getattr(data, name), getattr(trained, name)
        common, begin = min(count, known), first(data)
        names[begin : begin + common] = first(trained) + np.arange(common)
        names[begin + common : begin + count] = unused + np.arange(count - common)
        unused += count - common
    return names
