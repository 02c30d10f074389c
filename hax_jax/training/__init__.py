"""Training: one loop for every model, its optimiser, checkpoints, metrics and evaluation."""

from hax_jax.training.adapter import TokenFunction
from hax_jax.training.errors import CheckpointError, NonFiniteError, TrainingError
from hax_jax.training.loop import train
from hax_jax.training.optimizer import learning_rate_schedule, make_optimizer
from hax_jax.training.restore import Trained, load, score
from hax_jax.training.workdir import RunResult

__all__ = [
    "CheckpointError",
    "NonFiniteError",
    "RunResult",
    "TokenFunction",
    "Trained",
    "TrainingError",
    "learning_rate_schedule",
    "load",
    "make_optimizer",
    "score",
    "train",
]
