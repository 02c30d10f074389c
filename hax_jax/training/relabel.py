"""Tables of other sizes in the token ids that a model was trained with.

The ids of keys and contexts follow from the largest tables of a task (`DataConfig`): a task of smaller
tables numbers its contexts differently, and its items mean nothing to the model until they are renamed.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from hax_jax.config import ConfigError, DataConfig
from hax_jax.data.joint_recall import first_context, first_key


class RelabeledSplit:
    """A split whose tokens are renamed from its own layout to that of another task.

    Args:
      split: what `hax_jax.data.make_split` made of `data`.
      data: the split's own task.
      trained: the task whose token ids are wanted.

    Raises:
      ConfigError: the split has keys, contexts or values for which that task has no ids.
    """

    def __init__(self, split: Any, data: DataConfig, trained: DataConfig):
        check_fits(data, trained)
        self.num_items, self.iterator = split.num_items, split.iterator
        self._split = split
        self._names = new_names(data, trained)

    def materialize(self, raw: Any) -> Any:
        """The split's batch with its tokens renamed; a pure function of `raw`."""
        batch = self._split.materialize(raw)
        names = jnp.asarray(self._names)
        return dataclasses.replace(batch, tokens=names[batch.tokens], targets=names[batch.targets])


def check_fits(data: DataConfig, trained: DataConfig) -> None:
    """Raises ConfigError unless every token of `data` has an id in the layout of `trained`."""
    for name in ("n_value", "max_n_key", "max_n_context"):
        if getattr(data, name) > getattr(trained, name):
            raise ConfigError(
                f"data.{name}", f"at most {getattr(trained, name)}, as in the run's training",
                getattr(data, name),
                "the model has never seen the token ids of larger ones; train a run with larger tables",
            )


def new_names(data: DataConfig, trained: DataConfig) -> np.ndarray:
    """The id in the layout of `trained` of every token of `data`, (data.min_vocab_size,) int32."""
    names = np.arange(data.min_vocab_size, dtype=np.int32)
    names[first_key(data) : first_context(data)] += first_key(trained) - first_key(data)
    names[first_context(data) :] += first_context(trained) - first_context(data)
    return names
