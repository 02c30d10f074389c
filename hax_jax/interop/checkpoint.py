"""Weights under the original's names, out of the folder of a run and into a new one."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import hax_jax
from hax_jax.config import ConfigError, Experiment
from hax_jax.data import make_split
from hax_jax.interop.state_dict import StateDictError, entries, load_state_dict, state_dict
from hax_jax.models import LanguageModel
from hax_jax.training.checkpoints import Checkpoints, writer_thread
from hax_jax.training.initialise import build, prepare
from hax_jax.training.optimizer import make_optimizer
from hax_jax.training.restore import FOLDERS, load
from hax_jax.training.sharding import make_mesh
from hax_jax.training.workdir import RunFolder

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Exported:
    """A checkpoint in the original's terms.

    Attributes:
      experiment: the settings of the run.
      step: the checkpoint's step.
      weights: the trainable arrays by the original's names, with the dtype that they have in the run.
      left_out: names of what the original has no place for: the fixed hash projections of causal routing.
    """

    experiment: Experiment
    step: int
    weights: dict[str, np.ndarray]
    left_out: tuple[str, ...]


def export_weights(workdir: pathlib.Path, checkpoint: str = "best") -> Exported:
    """Reads a run's checkpoint; nothing in the folder is changed.

    Args:
      workdir: the folder of a run.
      checkpoint: 'best' by validation accuracy, or 'latest'.

    Raises:
      ConfigError: it is no folder of a run, or of a run of a module of its own.
      CheckpointError: it has no whole checkpoint.
    """
    trained = load(workdir, checkpoint=checkpoint)
    model: Any = trained.model
    return Exported(trained.experiment, trained.step, state_dict(model), tuple(sorted(trained.buffers)))


def import_weights(
    weights: Arrays, experiment: Experiment, workdir: pathlib.Path, *, rounding: bool = False
) -> None:
    """Makes `workdir` the folder of a run that is about to take its first step from these weights.

    Training goes on from there, and the weights can be scored as they are: they are the best checkpoint too.
    Hash projections are those of the experiment's seed.

    Args:
      weights: by the original's names.
      experiment: the settings of the run.
      workdir: a folder that is empty or not there.
      rounding: allow weights that change when they get the dtype of the model's parameters.

    Raises:
      StateDictError: weights are missing, extra, misshapen, not finite, or would be rounded.
      ConfigError: the folder is not new, or a setting cannot be used. Nothing has been written then.
    """
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError("workdir", "a folder that is empty or not there", str(workdir), "choose another")
    model: Any = build(experiment)
    if not rounding:
        check_lossless(model, weights)
    load_state_dict(model, weights)
    training = experiment.training
    batches = make_split(experiment.data, "train").iterator(
        training.batch_size * training.grad_accumulation_steps, repeat=True
    )
    state = prepare(experiment, model, make_optimizer(training), make_mesh()).make()
    meta = {
        "experiment": experiment.to_dict(),
        "best": {"step": None, "accuracy": None},
        "last_valid": 0,
        "versions": {"hax_jax": hax_jax.__version__, "jax": jax.__version__},
    }
    with RunFolder(workdir.absolute(), experiment) as folder, writer_thread() as writer:
        folder.claim()
        model_arrays = {"params": state.params, "buffers": state.buffers}
        for name, tree, more in (
            (FOLDERS["best"], model_arrays, {}),
            (FOLDERS["latest"], state, {"data": batches.get_state()}),
        ):
            checkpoints = Checkpoints(folder.path / name, 1, print, writer)
            checkpoints.save(0, tree, {**meta, **more})
            checkpoints.wait()
            checkpoints.close()


def check_lossless(model: LanguageModel, weights: Arrays) -> None:
    """Raises StateDictError if a weight is not finite, or would change in the model's parameter dtype."""
    dtypes = {entry.original_name: entry.dtype for entry in entries(model)}
    for name, array in weights.items():
        array = np.asarray(array)
        # ml_dtypes' kinds are no floats to NumPy.
        if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            raise StateDictError(f"{name} must be of floating point, got {array.dtype}; check the file")
        if not np.isfinite(array.astype(np.float64)).all():
            raise StateDictError(f"{name} must be finite, got NaN or infinity; take another checkpoint")
        if name in dtypes and not np.array_equal(array.astype(dtypes[name]).astype(np.float64), array):
            raise StateDictError(
                f"{name} is {array.dtype} and would be rounded to {dtypes[name]}; set "
                "model.precision='float32', or allow rounding"
            )
