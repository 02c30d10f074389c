"""One run on 1, 2 and 8 simulated devices: how far apart losses and parameters are, step by step.

python tests/faults/devices.py DEVICES FOLDER [STEP]     # trains; with STEP goes on from that checkpoint
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from hax_jax.config import Experiment
from hax_jax.training import train
from hax_jax.training.checkpoints import Checkpoints
from hax_jax.training.metrics import read_metrics
from tests.training.tiny import ROOT, tiny_experiment, tiny_hax_model

COUNTS = (1, 2, 8)
# The checkpoint of 8 devices from which 1 and 2 go on.
RESUMED_AT = 30
TOLERANCE = 1e-6
# Their gradients are zero but for rounding, and nothing depends on them: a constant has no effect on a
# ranking, and AdamW makes steps of full size out of noise.
_WITHOUT_EFFECT = ("scorer.layers.1.bias", "scorer.layers.2.bias")


def experiment() -> Experiment:
    """50 steps of a model with every discrete decision: hash codes and key selection, in two layers."""
    model = tiny_hax_model(num_layers=2, precision="float32")
    training = tiny_experiment(
        num_steps=50,
        log_every_steps=1,
        eval_every_steps=25,
        checkpoint_every_steps=10,
        learning_rate=2e-3,
        batch_size=16,
        warmup_steps=5,
    )
    return dataclasses.replace(training, model=model)


def run_on(
    devices: int, folder: pathlib.Path, cache: pathlib.Path, quickly: bool, step: int | None = None
) -> None:
    """Trains in a process with so many devices; with `step` after taking away what is newer in the folder."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quickly)),
    }
    if step is not None:
        (folder / "result.json").unlink()
        for other in [*(folder / "checkpoints").iterdir(), *(folder / "best").iterdir()]:
            if int(other.name) > step:
                shutil.rmtree(other)
    command = [sys.executable, str(pathlib.Path(__file__)), str(devices), str(folder)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, timeout=280)


def difference(one: pathlib.Path, other: pathlib.Path) -> dict[str, Any]:
    """How far apart two finished runs are.

    Returns:
      the largest difference of a loss and of a parameter, which parameter, the step at which the losses first
      differ by more than `TOLERANCE` (None: never), and the largest difference of what has no effect.
    """
    losses = [[(x["step"], x["loss"]) for x in read_metrics(folder)] for folder in (one, other)]
    apart = [(step, abs(a - b)) for (step, a), (_, b) in zip(*losses, strict=True)]
    arrays = []
    for folder in (one, other):
        checkpoints = Checkpoints(folder / "checkpoints", 1, print)
        restored = checkpoints.newest()
        checkpoints.close()
        assert restored is not None and restored.step == 50
        arrays.append(restored.arrays)
    names = [name for name in arrays[0] if name.startswith("params/")]
    far = {name: float(np.abs(arrays[0][name].astype(float) - arrays[1][name]).max()) for name in names}
    noise = {name: far.pop(name) for name in names if name.endswith(_WITHOUT_EFFECT)}
    return {
        "loss": max(value for _, value in apart),
        "parameter": max(far.values()),
        "which": max(far, key=far.__getitem__),
        "first_step_beyond": next((step for step, value in apart if value > TOLERANCE), None),
        "without_effect": max(noise.values()),
    }


def compare(folder: pathlib.Path, cache: pathlib.Path, quickly: bool = False) -> dict[str, dict[str, Any]]:
    """Trains on each number of devices, and on 1 and 2 from a checkpoint of 8; differences from 1 device.

    `quickly` compiles with few optimisations: the devices' shares of the work are the same.
    """
    for count in COUNTS:
        run_on(count, folder / f"on_{count}", cache, quickly)
    found = {f"{n} devices": difference(folder / "on_1", folder / f"on_{n}") for n in COUNTS[1:]}
    for count in COUNTS[:-1]:
        moved = folder / f"8_to_{count}"
        shutil.copytree(folder / f"on_{COUNTS[-1]}", moved)
        run_on(count, moved, cache, quickly, RESUMED_AT)
        found[f"8 devices until step {RESUMED_AT}, then {count}"] = difference(folder / "on_1", moved)
    return found


if __name__ == "__main__":
    import jax

    assert jax.device_count() == int(sys.argv[1])
    print(json.dumps(dataclasses.asdict(train(experiment(), pathlib.Path(sys.argv[2])))))
