"""A population: one architecture with several seeds and learning rates, trained side by side in one program.

Each member computes what it computes when it is trained alone, on the same batches; only the matmuls of all
members are one, which may round differently. The run's folder holds checkpoints of the whole population. At
the end, and by `write_member` at any time, each member becomes the folder of an ordinary run.
"""

import copy
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hax_jax.config import ConfigError, Experiment
from hax_jax.training.errors import NonFiniteError
from hax_jax.training.evaluate import EvalResult
from hax_jax.training.files import make_folders
from hax_jax.training.loop import Best, Run
from hax_jax.training.members import write_member
from hax_jax.training.processes import is_primary
from hax_jax.training.refused import Refusals
from hax_jax.training.sharding import replicated
from hax_jax.training.state import Purpose
from hax_jax.training.workdir import RunResult

MEMBERS = "members"
_MEANS = ("loss", "gate_loss", "accuracy", "learning_rate")


class PopulationRun(Run):
    """A run whose state, metrics and best arrays have a leading axis of members."""

    def __init__(self, experiment: Experiment, *arguments: Any):
        if jax.process_count() > 1:
            raise ConfigError(
                "training.population_seeds",
                "left empty, as the rates, with several processes",
                experiment.training.population_seeds,
                "train a population in one process",
            )
        super().__init__(experiment, *arguments)
        self.members = experiment.members
        self.best = [Best()] * len(self.members)
        # Members that refused too many updates: they stand still, the others go on.
        self.stopped = [False] * len(self.members)
        self.refusals_of = [
            Refusals(member, self.folder.path / MEMBERS / member.name, self._say_of(member))
            for member in self.members
        ]
        self.keep_best = jax.jit(_where, donate_argnums=2, out_shardings=replicated(self.mesh))

    def _say_of(self, member: Experiment):
        return lambda text: self.console.line(f"{member.name}: {text}")

    def _begin(self) -> None:
        super()._begin()
        # Arrays of their own: those of the state are given away to the next step.
        self.best_arrays = jax.tree.map(jnp.copy, self._arrays())

    def _arrays(self) -> dict[str, Any]:
        return {"params": self.state.params, "buffers": self.state.buffers}

    def _shapes(self) -> Any:
        shapes = self.beginning.shapes
        return {"state": shapes, "best": {"params": shapes.params, "buffers": shapes.buffers}}

    def _saved(self) -> Any:
        return {"state": self.state, "best": self.best_arrays}

    def _take_up(self, saved: Any, restored: Any) -> None:
        self.state, self.best_arrays = saved["state"], saved["best"]
        self.best = [Best(**best) for best in restored.meta["best"]]
        counts = restored.arrays["state/refused"].tolist()
        for index, count in enumerate(counts):
            self.refusals_of[index].count = count
            self.stopped[index] = count > self.training.max_refused_updates

    def _best_meta(self) -> Any:
        return [dataclasses.asdict(best) for best in self.best]

    def _running(self) -> list[int]:
        return [index for index, stopped in enumerate(self.stopped) if not stopped]

    def _write_metrics(self) -> None:
        if self.unwritten is None:
            return
        (step, metrics), self.unwritten = self.unwritten, None
        columns = {name: x.tolist() for name, x in jax.device_get(metrics).items()}
        self._check_members(columns["refused"], columns.pop("bad_step"))
        running = self._running()
        means = {name: statistics.fmean(columns[name][i] for i in running) for name in _MEANS}
        means["tokens"] = sum(columns["tokens"][i] for i in running)
        speeds = self.progress.log(step, means)
        for index in running:
            values = {name: x[index] for name, x in columns.items()}
            self.metrics.write(step, "train", {"member": index, **values, **speeds})

    def _check_state(self) -> None:
        refused, bad_step = jax.device_get((self.state.refused, self.state.bad_step))
        self._check_members(refused.tolist(), bad_step.tolist())

    def _check_members(self, refused: list[int], bad_steps: list[int]) -> None:
        """Says what was refused; stops the members that refused too much, and the run when none is left."""
        for index in self._running():
            refusals = self.refusals_of[index]
            if refusals.note(refused[index], bad_steps[index]):
                self.stopped[index] = True
                make_folders(refusals.workdir)
                state = jax.tree.map(lambda x, i=index: x[i], self.state)
                error = refusals.report(state, "the other members go on without it")
                self.console.line(f"{self.members[index].name} stopped: {error}")
        if not self._running():
            self.metrics.flush()
            raise NonFiniteError(
                f"All {len(self.members)} members stopped because of losses or gradients that were infinite "
                f"or not a number; {self.folder.path / MEMBERS} tells more of each."
            )

    def _score_members(self, purpose: Purpose, arrays: dict[str, Any]) -> list[EvalResult] | None:
        return self.evaluators[purpose](
            arrays["params"], arrays["buffers"], self.state.key, stop=lambda: bool(self.stop)
        )

    def _validate(self) -> None:
        begin = time.perf_counter()
        self._write_metrics()
        self._check_state()
        scores = self._score_members(Purpose.VALID, self._arrays())
        if scores is None:
            return
        seconds = time.perf_counter() - begin
        self.last_valid = self.step
        improved = np.zeros(len(self.members), bool)
        running = self._running()
        for index in running:
            accuracy, best = scores[index].accuracy, self.best[index].accuracy
            improved[index] = best is None or accuracy > best
            if improved[index]:
                self.best[index] = Best(self.step, accuracy)
            values = {"member": index, **scores[index].numbers(), "seconds": seconds}
            self.metrics.write(self.step, "valid", values)
        self.best_arrays = self.keep_best(self._put(improved), self._arrays(), self.best_arrays)
        found = [scores[index].accuracy for index in running]
        self.console.line(
            f"step {self.step}/{self.training.num_steps}  validation accuracy "
            f"{_percent(found)} of {len(found)} members  {improved.sum()} best so far  ({seconds:.3g} s)"
        )
        self.progress.pause(time.perf_counter() - begin)

    def result(self) -> RunResult:
        """Tests the best of each member if the run is over, and says how it ended."""
        tests = None
        if not self.stop:
            self.console.line("testing the best in validation of each member")
            tests = self._score_members(Purpose.TEST, self.best_arrays)
        self._wait_until_saved()
        refused = sum(refusals.count for refusals in self.refusals_of)
        if tests is None:
            self._say_stopped()
            return RunResult("interrupted", self.step, refused_updates=refused)
        running = self._running()
        for index in running:
            self.metrics.write(self.step, "test", {"member": index, **tests[index].numbers()})
        self.metrics.flush()
        results = [self._result_of(index, tests[index]) for index in range(len(self.members))]
        for index, (member, ended) in enumerate(zip(self.members, results, strict=True)):
            # Of several processes the first writes, as everywhere.
            if is_primary():
                write_member(self.folder.path, index, self.folder.path / MEMBERS / member.name, ended)
        result = _summary(self.members, results, self.step, refused)
        self.folder.finish(result)
        found = [tests[index].accuracy for index in running]
        stopped = len(results) - len(running)
        self.console.line(
            f"finished: test accuracy {_percent(found)} of {len(found)} members, {self.step} steps"
            + (f"; {stopped} stopped on the way" if stopped else "")
        )
        return result

    def _result_of(self, index: int, test: EvalResult) -> RunResult:
        """The result of a member, as of a run of its own."""
        best, count = self.best[index], self.refusals_of[index].count
        if self.stopped[index]:
            return RunResult("non-finite", self.step, best.step, best.accuracy, refused_updates=count)
        return RunResult(
            "finished", self.step, best.step, best.accuracy, test.accuracy, test.loss, test.table(), count
        )


def _where(chosen: jax.Array, new: Any, old: Any) -> Any:
    """`new` for the members that are chosen, `old` for the others."""
    pick = lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
    return jax.tree.map(pick, new, old)


def _summary(
    members: tuple[Experiment, ...], results: list[RunResult], steps: int, refused: int
) -> RunResult:
    """The population's result: means over the members that finished, and each of them."""
    finished = [result for result in results if result.stopped == "finished"]
    accuracies = [result.test_accuracy or 0.0 for result in finished]
    listed = []
    for member, result in zip(members, results, strict=True):
        entry = dataclasses.asdict(result)
        del entry["members"], entry["test_accuracy_std"], entry["test_by_size"]
        listed.append(
            {
                "name": member.name,
                "seed": member.seed,
                "learning_rate": member.training.learning_rate,
                **copy.deepcopy(entry),
            }
        )
    return RunResult(
        "finished",
        steps,
        best_valid_accuracy=statistics.fmean(result.best_valid_accuracy or 0.0 for result in finished),
        test_accuracy=statistics.fmean(accuracies),
        test_loss=statistics.fmean(result.test_loss or 0.0 for result in finished),
        refused_updates=refused,
        test_accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        members=listed,
    )


def _percent(accuracies: list[float]) -> str:
    """Mean and range of accuracies for a line."""
    mean, low, high = (100 * f(accuracies) for f in (statistics.fmean, min, max))
    return f"{mean:.2f}% ({low:.2f}..{high:.2f})"
