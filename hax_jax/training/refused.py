"""Updates refused because a loss or gradient was not finite: said, counted, and too many of them reported."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from hax_jax.config import Experiment
from hax_jax.training.errors import NonFiniteError
from hax_jax.training.files import write_json
from hax_jax.training.processes import is_primary
from hax_jax.training.state import BAD_PARTS, TrainState

REPORT = "non_finite.json"


@dataclasses.dataclass
class Refusals:
    """Follows the count that the state carries.

    Args:
      experiment: the run.
      workdir: its folder, where the report of too many refusals goes.
      say: prints a line.
      count: those said already.
    """

    experiment: Experiment
    workdir: pathlib.Path
    say: Callable[[str], None]
    count: int = 0

    def note(self, count: int, bad_step: int) -> bool:
        """Says what is new; returns True where the run has to end."""
        most = self.experiment.training.max_refused_updates
        if count > self.count:
            self.say(
                f"step {bad_step}: the loss or a gradient was infinite or not a number; the update was "
                f"refused and its batch skipped ({count} so far, at most {most})"
            )
        self.count = count
        return count > most

    def report(self, state: TrainState, kept: str) -> NonFiniteError:
        """Writes `non_finite.json` and returns the error that ends the run.

        Args:
          state: the state of the run, the last good one.
          kept: which checkpoint there is to go back to, in words.
        """
        refused, bad_step, parts = jax.device_get((state.refused, state.bad_step, state.bad_parts))
        refused, bad_step = int(refused), int(bad_step)
        values = {name: float(parts[name]) for name in BAD_PARTS}
        training, model = self.experiment.training, self.experiment.model
        items = training.batch_size * training.grad_accumulation_steps
        content: dict[str, Any] = {
            "refused_updates": refused,
            "max_refused_updates": training.max_refused_updates,
            "last_refused_step": bad_step,
            # JSON has no NaN, so these are words.
            "computed_there": {name: str(value) for name, value in values.items()},
            "items_there": {"split": "train", "first": bad_step * items, "count": items},
            "kept": kept,
        }
        if is_primary():
            write_json(self.workdir / REPORT, content)
        computed = ", ".join(f"{name} {value:g}" for name, value in values.items())
        return NonFiniteError(
            f"The loss or its gradient was infinite or not a number at step {bad_step} ({computed}), which "
            f"makes {refused} refused updates, more than training.max_refused_updates="
            f"{training.max_refused_updates}. The state stays the last good one; {kept}. "
            f"{self.workdir / REPORT} tells more. Things to try, in a new workdir: a lower "
            f"training.learning_rate (now {training.learning_rate:g}), a longer training.warmup_steps (now "
            f"{training.warmup_steps}), model.precision='float32' (now {model.precision!r})."
        )
