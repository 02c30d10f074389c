"""Scoring a model on a split: loss, accuracy, and accuracy by table size."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hax_jax.config import DataConfig, Experiment
from hax_jax.training import recall
from hax_jax.training.compilation import compiler_options
from hax_jax.training.sharding import kernels_over, put_batch, put_replicated, split_rows
from hax_jax.training.state import ModelStructure, Purpose
from hax_jax.training.step import make_eval_step

# Raw batches of a split stay on the devices between evaluations if they take no more than this many bytes,
# and as many batches as this holds, made ready for the model, are scored in one dispatch.
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
      recall: shares of the scored queries that see their answer, by source and layer (see `recall`), means
        over sequences in [0, 1]; empty for a model without a sparse branch.
    """

    loss: float
    accuracy: float
    num_items: int
    by_size: np.ndarray
    items_by_size: np.ndarray
    recall: dict[str, float] = dataclasses.field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Loss, accuracy and recall as a line of metrics holds them."""
        return {"loss": self.loss, "accuracy": self.accuracy, **self.recall}

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
    random in the model depends on the run's seed, the split and the batch alone. On a GPU or TPU a pass over
    the split is one dispatch where memory allows; on a CPU, where a batch takes long, one for each batch.

    Args:
      structure: the module without its arrays.
      split: what `hax_jax.data.make_split` returns, with `num_items` not None.
      purpose: `Purpose.VALID` or `Purpose.TEST`.
      data: the settings whose table sizes the split has.
      batch_size: sequences scored at once.
      mesh: the devices.
      compiled: a `compiled_score(structure, ...)` to share; one is compiled if None.
      num_members: of a population, whose arrays and keys have a leading axis; None for a single model.
    """

    def __init__(
        self,
        structure: ModelStructure,
        split: Any,
        purpose: Purpose,
        data: DataConfig,
        batch_size: int,
        mesh: jax.sharding.Mesh,
        compiled: Callable[..., Any] | None = None,
        num_members: int | None = None,
    ):
        self._split, self._purpose, self._batch_size, self._mesh = split, purpose, batch_size, mesh
        self._structure = structure
        self._shape = (data.max_n_context + 1, data.max_n_key + 1)
        self._members = () if num_members is None else (num_members,)
        self._score = compiled or compiled_score(structure, mesh, population=num_members is not None)
        materialize = split_rows(mesh, split.materialize)
        # Apart from the model's function, so that all splits share that one: its compilation is the long one.
        self._prepare = jax.jit(lambda raws: jax.lax.map(materialize, raws))
        self._resident: list[Any] | None = None
        self._on_cpu = mesh.devices.flat[0].platform == "cpu"

    def __call__(
        self,
        params: dict[str, Any],
        buffers: dict[str, Any],
        key: jax.Array,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[EvalResult] | None:
        """Scores the split with these arrays, a result a member; None if `stop` became true on the way."""
        table = np.zeros((*self._members, *self._shape), np.float32)
        zero = np.zeros(self._members, np.float32)
        zeros = {"loss": zero, "num_scored": zero, "accuracy": table, "num_items": table}
        seen = recall.measured(self._structure.merge(params, buffers))
        if seen is not None:
            zeros["recall"] = np.zeros((*self._members, *recall.shape(*seen)), np.float32)
        sources = seen[1] if seen else ()
        # Every entry needs its own memory, because the totals are donated to each step.
        totals = put_replicated(self._mesh, {name: x.copy() for name, x in zeros.items()})
        purpose = put_replicated(self._mesh, np.int32(self._purpose))
        for raws, first in self._groups():
            totals = self._score(params, buffers, key, purpose, first, self._prepare(raws), totals)
            if self._on_cpu:
                # Several programs at once on simulated devices can wait for each other for ever.
                jax.block_until_ready(totals)
            if stop():
                return None
        sums = {name: np.asarray(x, np.float64) for name, x in jax.device_get(totals).items()}
        if not self._members:
            return [_result(sums, sources)]
        return [_result({name: x[i] for name, x in sums.items()}, sources) for i in range(self._members[0])]

    def _groups(self):
        """Pairs of the raw batches of a dispatch and the number of the first, both on the devices."""
        if self._resident is not None:
            yield from self._resident
            return
        groups, size = [], 0
        iterator = self._split.iterator(self._batch_size, repeat=False)
        first = 0
        while rows := list(itertools.islice(iterator, self._batches_together)):
            raws = jax.tree.map(lambda *x: np.stack(x), *rows)
            group = put_batch(self._mesh, raws, axis=1), put_replicated(self._mesh, np.int32(first))
            first += len(rows)
            size += sum(x.nbytes for x in jax.tree.leaves(raws))
            if size <= _MAX_RESIDENT_BYTES:
                groups.append(group)
            yield group
        if size <= _MAX_RESIDENT_BYTES:
            self._resident = groups

    @functools.cached_property
    def _batches_together(self) -> int:
        if self._on_cpu:
            return 1
        raw = next(self._split.iterator(self._batch_size, repeat=False))
        shapes = jax.eval_shape(self._split.materialize, raw)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        return max(_MAX_RESIDENT_BYTES // size, 1)


def make_evaluators(
    structure: ModelStructure, splits: dict[str, Any], experiment: Experiment, mesh: jax.sharding.Mesh
) -> dict[Purpose, Evaluator]:
    """Those of a run or a population for its splits 'valid' and 'test', which share what is compiled."""
    compiled = compiled_score(structure, mesh, population=bool(experiment.members))
    size, num_members = experiment.training.eval_batch_size, len(experiment.members) or None
    return {
        purpose: Evaluator(
            structure, splits[name], purpose, experiment.data, size, mesh, compiled, num_members
        )
        for name, purpose in (("valid", Purpose.VALID), ("test", Purpose.TEST))
    }


def compiled_score(
    structure: ModelStructure, mesh: jax.sharding.Mesh, *, population: bool = False
) -> Callable[..., Any]:
    """Scores batch after batch in one program, its totals donated.

    score(params, buffers, key, purpose, first, batches, totals) -> totals, where `batches` have a leading
    axis and `first` is the number of the first. With `population` the arrays, keys and totals have a leading
    axis of members, which are scored one after the other: memory is that of one, and so are the bits.
    """
    eval_step = make_eval_step(structure)

    def score(params, buffers, key, purpose, first, batches, totals):
        def add(totals, inputs):
            index, batch = inputs

            def one(member):
                params, buffers, key, totals = member
                key = jax.random.fold_in(jax.random.fold_in(key, purpose), index)
                return eval_step(params, buffers, key, batch, totals)

            members = params, buffers, key, totals
            return (jax.lax.map(one, members) if population else one(members)), None

        count = batches.item_weight.shape[0]
        return jax.lax.scan(add, totals, (first + jnp.arange(count), batches))[0]

    options = compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(kernels_over(mesh, score), donate_argnums=6, compiler_options=options)


def _result(sums: dict[str, np.ndarray], sources: tuple[str, ...]) -> EvalResult:
    accuracy, items = sums["accuracy"], sums["num_items"]
    by_size = np.divide(accuracy, items, out=np.full(items.shape, np.nan), where=items > 0)
    return EvalResult(
        loss=float(sums["loss"] / max(sums["num_scored"], 1.0)),
        accuracy=float(accuracy.sum() / max(items.sum(), 1.0)),
        num_items=int(items.sum()),
        by_size=by_size,
        items_by_size=items.astype(int),
        recall=recall.named(sums["recall"] / max(items.sum(), 1.0), sources) if sources else {},
    )


def _used(items: np.ndarray) -> tuple[list[int], list[int]]:
    return [int(i) for i in np.flatnonzero(items.sum(1))], [int(i) for i in np.flatnonzero(items.sum(0))]
