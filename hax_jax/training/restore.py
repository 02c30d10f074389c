"""A trained model out of a run's folder, and its scores on any split."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from hax_jax.config import ConfigError, DataConfig, Experiment
from hax_jax.data import make_split
from hax_jax.training.checkpoints import Checkpoints, Restored, check_matches, fill
from hax_jax.training.errors import CheckpointError
from hax_jax.training.evaluate import EvalResult, Evaluator
from hax_jax.training.initialise import build
from hax_jax.training.relabel import RelabeledSplit, check_fits
from hax_jax.training.sharding import make_mesh, put_replicated
from hax_jax.training.state import ModelStructure, Purpose, split_model
from hax_jax.training.workdir import read_config

FOLDERS = {"best": "best", "latest": "checkpoints"}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint's model in parts: `model` puts it together."""

    experiment: Experiment
    step: int
    structure: ModelStructure
    params: dict[str, Any]
    buffers: dict[str, Any]

    @property
    def model(self) -> nnx.Module:
        """The module with the checkpoint's arrays."""
        return self.structure.merge(self.params, self.buffers)


def load(
    workdir: pathlib.Path,
    *,
    checkpoint: str = "best",
    model: nnx.Module | None = None,
    say: Callable[[str], None] = print,
) -> Trained:
    """Reads a trained model; nothing in the folder is changed.

    Args:
      workdir: the folder of a run.
      checkpoint: 'best' by validation accuracy, or 'latest'.
      model: a module of the architecture that `train` was given, if it was given one. It stays as it is.
      say: prints a line where a damaged checkpoint is passed over.

    Raises:
      ConfigError: it is no folder of a run, or the checkpoint is of another architecture.
      CheckpointError: it has no whole checkpoint.
    """
    if checkpoint not in FOLDERS:
        raise ConfigError("checkpoint", f"one of {', '.join(FOLDERS)}", checkpoint, "name one of these")
    config = read_config(workdir)
    experiment = Experiment.from_dict(config["experiment"])
    if config.get("module") and model is None:
        raise ConfigError(
            "workdir",
            "the folder of a run whose model its settings describe",
            str(workdir),
            f"its model is a module {config['module']} of its own: "
            "use hax_jax.training.load(workdir, model=...) and score",
        )
    check_single(experiment, workdir)
    folder = (workdir / FOLDERS[checkpoint]).absolute()
    checkpoints = Checkpoints(folder, keep=1, say=say)
    restored = checkpoints.newest()
    checkpoints.close()
    if restored is None:
        raise CheckpointError(f"No whole checkpoint lies in {folder}; train the run for longer, or again.")
    abstract = nnx.eval_shape(lambda: build(experiment)) if model is None else model
    structure, params, buffers = split_model(abstract)
    like = {"params": params, "buffers": buffers}
    check_matches(restored, experiment.to_dict(), like, folder)
    arrays = fill(like, restored.arrays, lambda arrays: put_replicated(make_mesh(), arrays))
    return Trained(experiment, restored.step, structure, arrays["params"], arrays["buffers"])


def check_single(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Raises ConfigError where a folder is that of a population, whose members have folders of their own."""
    if experiment.members:
        raise ConfigError(
            "workdir",
            "the folder of a run of one model",
            str(workdir),
            f"it is a population: name one of the folders in {workdir / 'members'}",
        )


def score(trained: Trained, split: str, data: DataConfig, batch_size: int | None = None) -> EvalResult:
    """Scores a trained model on a split of the task, in tables of any sizes.

    The largest tables of `data` decide how long the padded sequences are; the token ids stay those of the
    training, and what is new in larger tables gets unused ids of the vocabulary (see `relabel`).

    Args:
      trained: from `load`.
      split: 'valid' or 'test'.
      data: the task, the run's own or one of other tables.
      batch_size: sequences at once; the run's `eval_batch_size` if None. Rounded up to a multiple of the
        number of devices.

    Raises:
      ConfigError: the vocabulary has too few token ids for `data`, or its source cannot be read.
    """
    mesh = make_mesh()
    experiment = trained.experiment
    check_fits(data, experiment.data, experiment.model.vocab_size)
    size = batch_size or experiment.training.eval_batch_size
    size = -(-size // mesh.size) * mesh.size
    items = RelabeledSplit(make_split(data, split, mesh.size), data, experiment.data)
    evaluator = Evaluator(trained.structure, items, Purpose[split.upper()], data, size, mesh)
    key = put_replicated(mesh, jax.random.key(experiment.seed))
    results = evaluator(trained.params, trained.buffers, key)
    assert results is not None
    return results[0]


def read_best(
    checkpoints: Checkpoints, step: int, latest: pathlib.Path, say: Callable[[str], None]
) -> Restored:
    """The best checkpoint of a run, or the next best if that one is damaged.

    Args:
      checkpoints: those of the best.
      step: of the best one.
      latest: the folder of the other checkpoints, for the message.
      say: prints a line where the best one is passed over.

    Raises:
      CheckpointError: none is whole.
    """
    try:
        checkpoints.wait()
        return checkpoints.read(step)
    except CheckpointError as error:
        say(f"{error}; testing the one before it")
        restored = checkpoints.newest(at_most=step - 1)
        if restored is None:
            raise CheckpointError(
                f"No checkpoint in {checkpoints.folder} is whole, so there is nothing to test. "
                f"The last state of the training is in {latest}: "
                "`experiments/evaluate.py WORKDIR --checkpoint=latest` scores it."
            ) from error
        return restored
