"""Scoring a model on a split: loss, accuracy, and accuracy by table size."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hax_jax.config import DataConfig
from hax_jax.training.sharding import put_batch, put_replicated
from hax_jax.training.state import ModelStructure, Purpose
from hax_jax.training.step import make_eval_step

# Raw batches of a split stay on the devices between evaluations if they take no more than this many bytes.
_MAX_RESIDENT_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Scores on a whole split.

    Attributes:
      loss: cross-entropy averaged over all scored positions, in nats.
      accuracy: mean over sequences of the share of scored positions predicted right, in [0, 1].
      num_items: sequences scored.
      by_size: (max_n_context + 1, max_n_key + 1) accuracy of the sequences of each table size, NaN where
        there are none.
      items_by_size: the number of those sequences.
    """

    loss: float
    accuracy: float
    num_items: int
    by_size: np.ndarray
    items_by_size: np.ndarray

    def table(self) -> dict[str, Any]:
        """The scores by table size as plain lists, sizes without sequences left out."""
        rows, columns = _used(self.items_by_size)
        cells = np.ix_(rows, columns)
        return {
            "n_context": rows,
            "n_key": columns,
            "accuracy": [[float(x) for x in row] for row in self.by_size[cells]],
            "num_items": [[int(x) for x in row] for row in self.items_by_size[cells]],
        }

    def text(self) -> str:
        """The scores by table size for a terminal, in percent, a line a context count."""
        table = self.table()
        lines = [f"{'n_context':>9}  n_key " + " ".join(f"{n:5d}" for n in table["n_key"])]
        for n_context, row in zip(table["n_context"], table["accuracy"], strict=True):
            cells = ("    -" if np.isnan(x) else f"{100 * x:5.1f}" for x in row)
            lines.append(f"{n_context:9d}        " + " ".join(cells))
        return "\n".join(lines)


class Evaluator:
    """Scores one split with one compiled function, the sums staying on the devices to the end.

    Two calls with the same arrays give the same bits: the split is walked from its beginning, and what is
    random in the model depends on the run's seed, the split and the batch alone.

    Args:
      structure: the module without its arrays.
      split: what `hax_jax.data.make_split` returns, with `num_items` not None.
      purpose: `Purpose.VALID` or `Purpose.TEST`.
      data: the settings whose table sizes the split has.
      batch_size: sequences scored at once.
      mesh: the devices.
      eval_step: a compiled `make_eval_step(structure)` to share; one is compiled if None.
    """

    def __init__(
        self,
        structure: ModelStructure,
        split: Any,
        purpose: Purpose,
        data: DataConfig,
        batch_size: int,
        mesh: jax.sharding.Mesh,
        eval_step: Callable[..., Any] | None = None,
    ):
        self._split, self._purpose, self._batch_size, self._mesh = split, purpose, batch_size, mesh
        self._shape = (data.max_n_context + 1, data.max_n_key + 1)
        self._eval_step = eval_step or compiled_eval_step(structure)

        # Apart from the model's function, so that all splits share that one: its compilation is the long one.
        def prepare(raw, key, index):
            key = jax.random.fold_in(jax.random.fold_in(key, purpose), index)
            return split.materialize(raw), key

        self._prepare = jax.jit(prepare)
        self._resident: list[Any] | None = None

    def __call__(
        self,
        params: dict[str, Any],
        buffers: dict[str, Any],
        key: jax.Array,
        stop: Callable[[], bool] = lambda: False,
    ) -> EvalResult | None:
        """Scores the split with these arrays; None if `stop` became true on the way."""
        table = np.zeros(self._shape, np.float32)
        zero = np.zeros((), np.float32)
        zeros = {"loss": zero, "num_scored": zero, "accuracy": table, "num_items": table}
        # Every entry needs its own memory, because the totals are donated to each step.
        totals = put_replicated(self._mesh, {name: x.copy() for name, x in zeros.items()})
        for raw, index in self._batches():
            batch, batch_key = self._prepare(raw, key, index)
            totals = self._eval_step(params, buffers, batch_key, batch, totals)
            if self._mesh.devices.flat[0].platform == "cpu":
                # Several programs at once on simulated devices can wait for each other for ever.
                jax.block_until_ready(totals)
            if stop():
                return None
        sums = {name: np.asarray(x, np.float64) for name, x in jax.device_get(totals).items()}
        return _result(sums)

    def _batches(self):
        """Pairs of a raw batch and its index, both on the devices."""
        if self._resident is not None:
            yield from self._resident
            return
        batches, size = [], 0
        raws = self._split.iterator(self._batch_size, repeat=False)
        for index, raw in enumerate(raws):
            pair = put_batch(self._mesh, raw), put_replicated(self._mesh, np.int32(index))
            size += sum(x.nbytes for x in jax.tree.leaves(raw))
            if size <= _MAX_RESIDENT_BYTES:
                batches.append(pair)
            yield pair
        if size <= _MAX_RESIDENT_BYTES:
            self._resident = batches


def compiled_eval_step(structure: ModelStructure) -> Callable[..., Any]:
    """`make_eval_step` compiled, with its totals donated."""
    return jax.jit(make_eval_step(structure), donate_argnums=4)


def _result(sums: dict[str, np.ndarray]) -> EvalResult:
    accuracy, items = sums["accuracy"], sums["num_items"]
    by_size = np.divide(accuracy, items, out=np.full(items.shape, np.nan), where=items > 0)
    return EvalResult(
        loss=float(sums["loss"] / max(sums["num_scored"], 1.0)),
        accuracy=float(accuracy.sum() / max(items.sum(), 1.0)),
        num_items=int(items.sum()),
        by_size=by_size,
        items_by_size=items.astype(int),
    )


def _used(items: np.ndarray) -> tuple[list[int], list[int]]:
    return [int(i) for i in np.flatnonzero(items.sum(1))], [int(i) for i in np.flatnonzero(items.sum(0))]
