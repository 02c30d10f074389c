"""The forms of training that are put to the test: each trains a tiny run and returns how it ended.

A form is a line of `FORMS`. Runs take a second or two with warm compilation caches, and pass through many
log steps, evaluations and checkpoints on the way.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from hax_jax.config import Experiment
from hax_jax.training import RunResult, train
from tests.training.tiny import TinyModel, tiny_experiment, tiny_hax_model

# Checkpoints, evaluations and log steps fall together in some steps and apart in others.
_OFTEN = {"num_steps": 60, "log_every_steps": 4, "eval_every_steps": 10, "checkpoint_every_steps": 6}


@dataclasses.dataclass(frozen=True)
class Form:
    """How a form trains.

    Attributes:
      train: from the folder of the run to its result; called in a process of its own.
      devices: simulated devices of that process.
      members: subfolders that hold what a run of one model leaves; '' is the folder itself.
    """

    train: Callable[[pathlib.Path], RunResult]
    devices: int = 1
    members: tuple[str, ...] = ("",)


def _experiment(**training: Any) -> Experiment:
    return tiny_experiment(**{**_OFTEN, **training})


def _plain(workdir: pathlib.Path) -> RunResult:
    return train(_experiment(tensorboard=True), workdir, model=TinyModel())


def _accumulated(workdir: pathlib.Path) -> RunResult:
    return train(_experiment(batch_size=4, grad_accumulation_steps=2), workdir, model=TinyModel())


def _dispatched(workdir: pathlib.Path) -> RunResult:
    return train(_experiment(steps_per_dispatch=3), workdir, model=TinyModel())


def _population(workdir: pathlib.Path) -> RunResult:
    population = {"population_seeds": "3,0", "population_learning_rates": "0.02,0.005"}
    return train(_experiment(**population), workdir, model=TinyModel())


def _hax(workdir: pathlib.Path, packing: int = 0) -> RunResult:
    experiment = _experiment()
    data = dataclasses.replace(experiment.data, packing=packing)
    return train(dataclasses.replace(experiment, model=tiny_hax_model(), data=data), workdir)


def _packed(workdir: pathlib.Path) -> RunResult:
    return _hax(workdir, packing=30)


_MEMBERS = [f"members/tiny_lr{rate}_seed{seed}" for rate in ("0.02", "0.005") for seed in (3, 0)]

FORMS: dict[str, Form] = {
    "plain": Form(_plain),
    "accumulated": Form(_accumulated),
    "hax": Form(_hax),
    "devices": Form(_plain, devices=8),
    "dispatched": Form(_dispatched),
    "packed": Form(_packed),
    "population": Form(_population, members=("", *_MEMBERS)),
}
