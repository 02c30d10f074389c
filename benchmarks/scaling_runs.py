"""Runs on chosen numbers of devices, each in a process of its own, and how far apart they are."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np

from benchmarks.step_program import TINY
from experiments.comparison.ours import KINDS
from hax_jax.training.checkpoints import Checkpoints
from hax_jax.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
_PATIENCE = 570.0
# Biases of the scorer's last layers: their gradients are zero but for rounding, nothing depends on them, and
# AdamW makes steps of full size out of noise.
_WITHOUT_EFFECT = ("scorer.layers.1.bias", "scorer.layers.2.bias")


class Machine:
    """Starts processes that see a number of this host's devices.

    Args:
      simulated: of a CPU, so many devices; 0 for the GPUs that this process was shown.
      cache: a folder of compiled programs, None for none.
    """

    def __init__(self, simulated: int, cache: pathlib.Path | None):
        self.simulated, self.cache = simulated, cache

    def describe(self) -> dict[str, Any]:
        """What a process sees that is shown all devices."""
        return self.tell(self.simulated or None, "describe")

    def measure(self, count: int, config: str, changes: tuple[str, ...], tiny: bool) -> dict[str, Any]:
        """Seconds and tokens of updates on so many devices."""
        return self.tell(count, "time", *_told(config, changes, tiny))

    def tell(self, count: int | None, *arguments: str) -> dict[str, Any]:
        """The last line of JSON that `scaling_process.py` prints."""
        return json.loads(self.run(count, "benchmarks/scaling_process.py", *arguments).splitlines()[-1])

    def run(self, count: int | None, script: str, *arguments: str) -> str:
        """What a script prints on the first `count` devices, all of them for None; raises if it fails."""
        done = subprocess.run(
            [sys.executable, script, *arguments],
            env=self._environment(count),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
        if done.returncode:
            raise RuntimeError(f"{script} ended with status {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def _environment(self, count: int | None) -> dict[str, str]:
        paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if self.cache is not None:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(self.cache.absolute())
        if self.simulated:
            flags = environment.get("XLA_FLAGS", "")
            environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}"
            environment["JAX_PLATFORMS"] = "cpu"
        elif count is not None:
            shown = environment.get("CUDA_VISIBLE_DEVICES")
            numbers = shown.split(",") if shown else [str(number) for number in range(count)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(numbers[:count])
        return environment


class Runs:
    """The training command on numbers of devices at one global batch, each trained once.

    Args:
      machine: where.
      folder: for the runs.
      config: a name under configs/, with its argument.
      changes: settings FIELD=VALUE.
      steps: updates, a multiple of 4.
      tiny: few layers and rows, for tests.
    """

    def __init__(
        self,
        machine: Machine,
        folder: pathlib.Path,
        config: str,
        changes: tuple[str, ...],
        steps: int,
        tiny: bool,
    ):
        self.machine, self.folder, self.config, self.steps, self.tiny = machine, folder, config, steps, tiny
        self.settings = run_settings(changes, steps)

    def on(self, count: int) -> pathlib.Path:
        """The finished run on so many devices."""
        folder = self.folder / f"on_{count}"
        if not (folder / "result.json").exists():
            self._train(count, folder)
        return folder

    def moved(self, first: int, then: int) -> pathlib.Path:
        """The finished run whose first half was made on `first` devices and the rest on `then`."""
        folder = self.folder / f"{first}_to_{then}"
        shutil.copytree(self.on(first), folder)
        (folder / "result.json").unlink()
        for kept in [*(folder / "checkpoints").iterdir(), *(folder / "best").iterdir()]:
            if not kept.name.isdigit() or int(kept.name) > self.steps // 2:
                shutil.rmtree(kept)
        self._train(then, folder)
        return folder

    def difference(self, base: pathlib.Path, folder: pathlib.Path, tolerance: float) -> dict[str, Any]:
        """How far a run is from another.

        Returns:
          the largest difference of a `loss`, the `first_step_beyond` the tolerance (None: never) and the
          largest `before` it; the largest difference of a `parameter` at the end, and of one `without_effect`
          on any loss.
        """
        losses = [
            {line["step"]: line["loss"] for line in read_metrics(run) if line["kind"] == "train"}
            for run in (base, folder)
        ]
        if not losses[0].keys() == losses[1].keys() == set(range(1, self.steps + 1)):
            raise RuntimeError(f"losses of {len(losses[0])} and {len(losses[1])} steps, not of {self.steps}")
        apart = {step: abs(loss - losses[1][step]) for step, loss in losses[0].items()}
        one, other = (_parameters(run, self.steps) for run in (base, folder))
        far = {
            name: float(np.abs(x.astype(float) - other[name].astype(float)).max()) for name, x in one.items()
        }
        noise = [far.pop(name) for name in one if name.endswith(_WITHOUT_EFFECT)]
        beyond = next((step for step, x in apart.items() if x > tolerance), None)
        return {
            "loss": max(apart.values()),
            "first_step_beyond": beyond,
            "before": max((x for step, x in apart.items() if beyond is None or step < beyond), default=0.0),
            "parameter": max(far.values()),
            "without_effect": max(noise, default=0.0),
        }

    def decisions(self, count: int, steps: int) -> dict[str, np.ndarray]:
        """Every discrete decision of the first updates on so many devices, (steps, b, t) each."""
        path = self.folder / f"decisions_on_{count}_{steps}.npz"
        if not path.exists():
            told = _told(self.config, self.settings, self.tiny)
            self.machine.tell(count, "decide", *told, f"--steps={steps}", f"--out={path}")
        with np.load(path) as arrays:
            return dict(arrays)

    def _train(self, count: int, folder: pathlib.Path) -> None:
        """The command that a user gives, with a log line at every step."""
        file, colon, argument = self.config.partition(":")
        if self.tiny and not colon:
            colon, argument = ":", "cpu"
        self.machine.run(
            count,
            "experiments/joint_recall.py",
            f"--config=configs/{file}.py{colon}{argument}",
            f"--workdir={folder}",
            *(f"--config.{setting}" for setting in (*(TINY if self.tiny else ()), *self.settings)),
        )


def run_settings(changes: tuple[str, ...], steps: int) -> tuple[str, ...]:
    """What a compared run sets otherwise than its config file, FIELD=VALUE each."""
    return (
        *changes,
        f"training.num_steps={steps}",
        "training.log_every_steps=1",
        f"training.eval_every_steps={steps}",
        f"training.checkpoint_every_steps={steps // 4}",
        "training.tensorboard=False",
        "training.eval_batch_size=48",
        "data.n_eval_per_pair=1",
    )


def first_other_decision(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """The first decision that two runs made otherwise, by step, layer, kind, row, position; None if none."""
    layers = sorted({int(name.split("/")[0].removeprefix("layer")) for name in one})
    steps = min((len(arrays) for arrays in one.values()), default=0)
    for step in range(steps):
        for name in [f"layer{layer}/{kind}" for layer in layers for kind in KINDS]:
            if name not in one:
                continue
            places = np.argwhere(one[name][step] != other[name][step])
            if len(places):
                row, position = (int(x) for x in places[0])
                layer, kind = name.split("/")
                return {
                    "step": step + 1,
                    "layer": int(layer.removeprefix("layer")),
                    "kind": kind,
                    "row": row,
                    "position": position,
                    "on_one_device": int(one[name][step, row, position]),
                    "here": int(other[name][step, row, position]),
                    "count_in_step": len(places),
                }
    return None


def _parameters(folder: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    checkpoints = Checkpoints(folder / "checkpoints", 1, lambda _: None)
    restored = checkpoints.newest()
    checkpoints.close()
    if restored is None or restored.step != step:
        raise RuntimeError(f"no checkpoint of step {step} in {folder}")
    return {name: x for name, x in restored.arrays.items() if name.startswith("params/")}


def _told(config: str, changes: tuple[str, ...], tiny: bool) -> list[str]:
    return [f"--config={config}", *(f"--set={change}" for change in changes), *(["--tiny"] if tiny else [])]
