"""One run, from an experiment to its result: the loop that every model of the project is trained by."""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import time
from typing import Any

import flax
import jax
import numpy as np
from flax import nnx

import hax_jax
from hax_jax.config import Experiment
from hax_jax.data import make_split
from hax_jax.training import initialise
from hax_jax.training.adapter import check_takes_packed_rows
from hax_jax.training.checkpoints import Checkpoints, Restored, check_matches, fill, writer_thread
from hax_jax.training.dispatch import dispatches_ahead, steps_until_due
from hax_jax.training.errors import CheckpointError, TrainingError
from hax_jax.training.evaluate import EvalResult, make_evaluators
from hax_jax.training.metrics import open_metrics
from hax_jax.training.optimizer import make_optimizer
from hax_jax.training.processes import SharedStop
from hax_jax.training.progress import Console, Progress, duration
from hax_jax.training.refused import Refusals
from hax_jax.training.restore import read_best
from hax_jax.training.sharding import make_mesh, put_replicated
from hax_jax.training.signals import StopRequest
from hax_jax.training.state import Purpose
from hax_jax.training.updates import Updates
from hax_jax.training.workdir import RunFolder, RunResult

# Checkpoints kept in each folder: the newest, and older ones to go back to if it is damaged.
_KEEP_NEWEST = 3
_KEEP_BEST = 2
# On a CPU the first steps are timed to say what the run will take, if that is longer than this many seconds.
_STEPS_TIMED = 4
_LONG = 3600.0


def train(experiment: Experiment, workdir: pathlib.Path, *, model: nnx.Module | None = None) -> RunResult:
    """Trains a model, or goes on with its training, and tests the best of it once at the end.

    The run lives in `workdir`: `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` (the newest),
    `best/` (best by validation accuracy) and `result.json`. Called again after an interruption of any kind
    it goes on from the newest whole checkpoint and ends with the same bits as a run never interrupted;
    called again after its end it returns the result.

    Args:
      experiment: the run.
      workdir: its folder, new or of this same run.
      model: any module from tokens (b, t) int32 to logits (b, t, vocab) to train instead of the one that
        `experiment.model` describes, called as `model(tokens, padding_mask=, key=, train=)`, with
        `packing` and `scored` too if it takes them; see `TokenFunction` for plain functions. It stays as it
        is; `load` returns the trained one.

    Returns:
      How it ended. A signal (SIGTERM, SIGINT) ends it after the dispatch it is in, saved, as 'interrupted'.

    Raises:
      ConfigError: a setting cannot be used, or `workdir` holds another run. Nothing has been changed.
      NonFiniteError: more than `max_refused_updates` updates were refused because they were not finite.
      CheckpointError: the state could not be saved at the end.
      TrainingError: the base of these; by itself, a file could not be read or written.
    """
    console = Console()
    with contextlib.ExitStack() as stack:
        stop = SharedStop(stack.enter_context(StopRequest()))
        module = None if model is None else type(model).__qualname__
        folder = stack.enter_context(RunFolder(pathlib.Path(workdir).absolute(), experiment, module))
        if (result := folder.result()) is not None:
            console.line(f"this run has finished before; its result is in {folder.path / 'result.json'}")
            return result
        # Imported here, because a population is a kind of run.
        from hax_jax.training.population import PopulationRun

        run = (PopulationRun if experiment.members else Run)(experiment, folder, model, console, stop)
        stack.callback(run.close)
        run.resume()
        # From here on nothing is fetched from a device but what the loop fetches itself.
        stack.enter_context(jax.transfer_guard_device_to_host("disallow"))
        stack.enter_context(jax.transfer_guard_device_to_device("disallow"))
        try:
            run.train()
            return run.result()
        except OSError as error:
            raise TrainingError(
                f"A file could not be read or written ({error}). What {folder.path} holds is whole up to the "
                "last checkpoint: remove the cause, then run the same command again to go on."
            ) from error


@dataclasses.dataclass(frozen=True)
class Best:
    """The best validation so far."""

    step: int | None = None
    accuracy: float | None = None


class Run:
    """The parts of a run, made in the order in which they build on each other, and what steps change."""

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        model: nnx.Module | None,
        console: Console,
        stop: SharedStop,
    ):
        self.experiment, self.training = experiment, experiment.training
        self.folder, self.console, self.stop = folder, console, stop

        # Devices and data first: what can be refused is refused before anything is compiled.
        training = self.training
        self.mesh = make_mesh(batch_size=training.batch_size, eval_batch_size=training.eval_batch_size)
        if model is not None and experiment.data.packing:
            check_takes_packed_rows(type(model))
        names = ("train", "valid", "test")
        splits = {name: make_split(experiment.data, name, self.mesh.size) for name in names}
        self.kept = self._put(splits["train"].keep())

        # The model, its optimiser, and compiled updates that take over the memory of the state they get.
        self.beginning = initialise.prepare(experiment, model, make_optimizer(training), self.mesh)
        self.updates = Updates(experiment, splits["train"], self.beginning, self.mesh)
        # Arrays that stay where they are: what moves in memory is changed in the CUDA graphs that use it.
        self.count = functools.cache(lambda count: self._put(np.int32(count)))
        self.peak = self._put(self.updates.peak)
        self.evaluators = make_evaluators(self.beginning.structure, splits, experiment, self.mesh)

        # Where things are kept.
        self.writer = writer_thread()
        say = console.line
        self.checkpoints = Checkpoints(folder.path / "checkpoints", _KEEP_NEWEST, say, self.writer)
        self.best_checkpoints = Checkpoints(folder.path / "best", _KEEP_BEST, say, self.writer)
        self.step = self.last_saved = self.last_valid = 0
        self.best: Any = Best()
        self.unwritten: tuple[int, Any] | None = None
        self.refusals = Refusals(experiment, folder.path, say)

    def resume(self) -> None:
        """Takes up the newest whole checkpoint, or begins."""
        restored = self.checkpoints.newest()
        if restored is None:
            if self.checkpoints.steps():
                self.console.line("no checkpoint is whole: beginning anew; the damaged ones go to set_aside/")
            self.checkpoints.set_aside_after(-1)
            self._begin()
        else:
            shapes = self._shapes()
            check_matches(restored, self.experiment.to_dict(), shapes, self.checkpoints.folder)
            self.checkpoints.set_aside_after(restored.step)
            self._take_up(fill(shapes, restored.arrays, self._put), restored)
            self.updates.batches.set_state(restored.meta["data"])
            self.step = self.last_saved = restored.step
            self.last_valid = restored.meta["last_valid"]
            self.console.line(f"going on from step {self.step}, saved in {self.checkpoints.folder}")
        board, say = self.training.tensorboard, self.console.line
        self.metrics = open_metrics(self.folder.path, self.step, self.last_valid, board, say)

    def _begin(self) -> None:
        self.state = self.beginning.make()

    def _shapes(self) -> Any:
        """What a checkpoint holds, as shapes."""
        return self.beginning.shapes

    def _saved(self) -> Any:
        """What a checkpoint holds."""
        return self.state

    def _take_up(self, saved: Any, restored: Restored) -> None:
        """Goes on from what a checkpoint held."""
        self.state, self.best = saved, Best(**restored.meta["best"])
        self.refusals.count = int(restored.arrays["refused"])

    def train(self) -> None:
        """Steps until the last one or a signal; validates and saves on the way."""
        training, begin = self.training, self.step
        self.progress = Progress(self.console, begin, training.num_steps, self.updates.positions)
        ahead: collections.deque[jax.Array] = collections.deque()
        said = False
        while True:
            if self._is_due(training.eval_every_steps) and self.last_valid < self.step and not self.stop:
                self._validate()
            if self._is_due(training.checkpoint_every_steps) or self.stop:
                self._save()
            if self.stop or self.step == training.num_steps:
                break
            is_first = self.step == begin
            metrics = self._take_steps()
            if is_first:
                self._after_first_dispatch()
            ahead.append(metrics["bad_step"])
            while len(ahead) > self._dispatches_ahead():
                ahead.popleft().block_until_ready()
            # Metrics are fetched when the next dispatch is under way: the devices never wait for that.
            self._write_metrics()
            if self._is_due(training.log_every_steps):
                self.unwritten = self.step, metrics
                self.stop.agree()
            if not said and self.step >= begin + _STEPS_TIMED:
                self._say_if_long()
                said = True
            self.progress.draw(self.step)
        self.console.bar("")

    def result(self) -> RunResult:
        """Tests the best checkpoint if the run is over, and says how it ended."""
        test = None
        if not self.stop:
            arrays = self._read_best()
            self.console.line(f"testing the parameters of step {self.best.step}, the best in validation")
            test = self._score(Purpose.TEST, arrays["params"], arrays["buffers"])
        self._wait_until_saved()
        if test is None:
            self._say_stopped()
            return RunResult(
                "interrupted",
                self.step,
                self.best.step,
                self.best.accuracy,
                refused_updates=self.refusals.count,
            )
        self.metrics.write(self.step, "test", test.numbers())
        self.metrics.flush()
        result = RunResult(
            "finished",
            self.step,
            self.best.step,
            self.best.accuracy,
            test.accuracy,
            test.loss,
            test.table(),
            self.refusals.count,
        )
        self.folder.finish(result)
        self.console.line(
            f"finished: test accuracy {100 * test.accuracy:.2f}%, loss {test.loss:.4f}, {self.step} steps"
        )
        return result

    def _wait_until_saved(self) -> None:
        """Returns when metrics and the last checkpoint are on the disk.

        A run that has finished is never opened again, so it says so only then.
        """
        self.metrics.flush()
        self.checkpoints.wait()

    def _say_stopped(self) -> None:
        self.console.line(
            f"stopped by {self.stop.name} at step {self.step}, all saved; the same command goes on"
        )

    def close(self) -> None:
        """Lets what is being written get done, and closes everything."""
        self.writer.shutdown()
        self.checkpoints.close()
        self.best_checkpoints.close()
        if hasattr(self, "metrics"):
            self.metrics.close()

    def _is_due(self, every: int) -> bool:
        return self.step > 0 and (self.step % every == 0 or self.step == self.training.num_steps)

    def _take_steps(self) -> dict[str, jax.Array]:
        """Starts one dispatch; the metrics are those of its last step."""
        updates = self.updates
        count = steps_until_due(self.step, self.training, updates.per_dispatch)
        raws = updates.next_raws(count)
        self.state = updates.program(count)(self.state, raws, self.count(count), self.peak, self.kept)
        self.step += count
        return updates.read(self.state, self.peak)

    def _after_first_dispatch(self) -> None:
        jax.block_until_ready(self.state.step)
        seconds = self.progress.started(self.step)
        # From here on there is something to lose.
        self.folder.claim()
        devices = self.mesh.devices.flat
        self.console.line(
            f"first step done after {duration(seconds)}, compilation included, on {self.mesh.size} "
            f"{devices[0].device_kind} device{'s' if self.mesh.size > 1 else ''}"
        )

    def _dispatches_ahead(self) -> int:
        """How many dispatches may be under way when the host goes on to the next."""
        if self._on_cpu():
            # Several programs at once on simulated devices can wait for each other for ever.
            return 1 if self.mesh.size == 1 else 0
        return dispatches_ahead(self.progress.seconds_per_step, self.updates.per_dispatch)

    def _on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    def _say_if_long(self) -> None:
        seconds = self.progress.seconds_left(self.step)
        if self._on_cpu() and seconds > _LONG:
            self.console.line(
                f"on this CPU the run would take about {duration(seconds)}; the configs have a small form "
                "for machines without a GPU: add :cpu to the name of the file given to --config"
            )

    def _write_metrics(self) -> None:
        """Fetches and writes the metrics of the last log step, if that has not been done."""
        if self.unwritten is None:
            return
        (step, metrics), self.unwritten = self.unwritten, None
        values = {name: x.item() for name, x in jax.device_get(metrics).items()}
        self._check_refused(values["refused"], values.pop("bad_step"))
        self.metrics.write(step, "train", {**values, **self.progress.log(step, values)})

    def _validate(self) -> None:
        begin = time.perf_counter()
        self._write_metrics()
        self._check_state()
        scores = self._score(Purpose.VALID, self.state.params, self.state.buffers)
        if scores is None:
            return
        seconds = time.perf_counter() - begin
        self.last_valid = self.step
        is_best = self.best.accuracy is None or scores.accuracy > self.best.accuracy
        self.metrics.write(self.step, "valid", {**scores.numbers(), "seconds": seconds})
        self.console.line(
            f"step {self.step}/{self.training.num_steps}  validation loss {scores.loss:.4f}  "
            f"accuracy {100 * scores.accuracy:.2f}%{'  best so far' if is_best else ''}  ({seconds:.3g} s)"
        )
        if is_best:
            self.best = Best(self.step, scores.accuracy)
            arrays = {"params": self.state.params, "buffers": self.state.buffers}
            self.best_checkpoints.save(self.step, arrays, self._meta())
        self.progress.pause(time.perf_counter() - begin)

    def _score(self, purpose: Purpose, params: Any, buffers: Any) -> EvalResult | None:
        results = self.evaluators[purpose](params, buffers, self.state.key, stop=lambda: bool(self.stop))
        return results[0] if results else None

    def _save(self) -> None:
        if self.step == self.last_saved:
            return
        begin = time.perf_counter()
        self._write_metrics()
        self._check_state()
        self.metrics.flush()
        meta = self._meta() | {"data": self.updates.batches.get_state()}
        self.checkpoints.save(self.step, self._saved(), meta)
        self.last_saved = self.step
        self.progress.pause(time.perf_counter() - begin)

    def _meta(self) -> dict[str, Any]:
        return {
            "experiment": self.experiment.to_dict(),
            "best": self._best_meta(),
            "last_valid": self.last_valid,
            "versions": {"hax_jax": hax_jax.__version__, "jax": jax.__version__, "flax": flax.__version__},
        }

    def _best_meta(self) -> Any:
        return dataclasses.asdict(self.best)

    def _check_state(self) -> None:
        self._check_refused(*map(int, jax.device_get((self.state.refused, self.state.bad_step))))

    def _check_refused(self, count: int, bad_step: int) -> None:
        """Says which updates were refused, and ends the run where they are too many."""
        if not self.refusals.note(count, bad_step):
            return
        with contextlib.suppress(CheckpointError):
            self.checkpoints.wait()
        steps, folder = self.checkpoints.steps(), self.checkpoints.folder
        kept = f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
        self.metrics.flush()
        raise self.refusals.report(self.state, f"{kept} in {folder}")

    def _read_best(self) -> dict[str, Any]:
        """The arrays of the best checkpoint, or of the next best if that one is damaged."""
        # The last step is always validated, so there is a best one.
        restored = read_best(
            self.best_checkpoints, self.best.step or 0, self.checkpoints.folder, self.console.line
        )
        self.best = Best(**restored.meta["best"])
        like = {"params": self.beginning.shapes.params, "buffers": self.beginning.shapes.buffers}
        check_matches(restored, self.experiment.to_dict(), like, self.best_checkpoints.folder)
        return fill(like, restored.arrays, self._put)

    def _put(self, arrays: Any) -> Any:
        return put_replicated(self.mesh, arrays)
