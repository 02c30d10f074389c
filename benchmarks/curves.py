"""The curves benchmark: what is fast must learn the same. Losses of the default form beside the plain ones.

Each form starts from the same state and takes the same batches. Rounding differs, decisions fall on the other
side of near-ties, and single losses part; what must stay is the curve. The float32 form is the yardstick: it
differs from the plain form by rounding alone.
"""

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import specs
from benchmarks.record import Record
from benchmarks.step_program import StepProgram, load

# By name: settings beside those asked for.
FORMS: dict[str, tuple[str, ...]] = {
    "default": ("model.implementation=auto",),
    "plain": ("model.implementation=xla",),
    "plain, float32": ("model.implementation=xla", "model.precision=float32"),
}
# Losses are averaged over so many steps before curves are compared.
WINDOW = 200


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run measures.

    Attributes:
      configs: names under configs/.
      changes: settings FIELD=VALUE, the same for all forms.
      steps: updates of each curve.
      tiny: one layer and few rows, for tests.
    """

    configs: tuple[str, ...] = specs.STEP_CONFIGS[:1]
    changes: tuple[str, ...] = ()
    steps: int = 2000
    tiny: bool = False


def run(record: Record, options: Options) -> None:
    """Adds `CONFIG/FORM` with its curve for each form, then `CONFIG` with how far apart they are."""
    for name in options.configs:
        curves = {}
        programs = _compiled(name, options)
        for form, program in programs.items():
            curves[form] = losses(program, options.steps)
            record.add(
                f"{name}/{form}",
                settings=[*options.changes, *FORMS[form]],
                steps=options.steps,
                every=program.steps,
                loss=[float(x) for x in curves[form]],
            )
        every = programs["plain"].steps
        facts = {form: distance(curves[form], curves["plain"], every) for form in curves if form != "plain"}
        measured = record.add(name, window=WINDOW, distance_from_plain=facts)
        print(f"{name}: {measured['distance_from_plain']}", flush=True)


def _compiled(name: str, options: Options) -> dict[str, StepProgram]:
    def compiled(form: str) -> StepProgram:
        # What is logged are means since the last log step: there must be none on the way.
        changes = (*options.changes, *FORMS[form], f"training.log_every_steps={options.steps}")
        program = StepProgram(load(name, changes, options.tiny))
        program.compile()
        return program

    with concurrent.futures.ThreadPoolExecutor(len(FORMS)) as pool:
        return dict(zip(FORMS, pool.map(compiled, FORMS), strict=True))


def losses(program: StepProgram, steps: int) -> np.ndarray:
    """Mean loss of each dispatch, from the third on; what a dispatch returns are means since the start."""
    program.start()
    found: list[Any] = [program.dispatch()["loss"] for _ in range(steps // program.steps - 1)]
    sums = np.asarray(jax.device_get(found), np.float64) * np.arange(2, 2 + len(found))
    return np.diff(sums)


def distance(curve: Sequence[float] | np.ndarray, plain: Sequence[float] | np.ndarray, every: int) -> dict:
    """How far a curve is from the plain one: points, means over windows, and the last window.

    Args:
      curve, plain: mean losses over the same steps.
      every: steps that a point is a mean of.
    """
    got, want = np.asarray(curve), np.asarray(plain)
    size = max(1, min(WINDOW // every, got.size))
    whole = got.size // size * size
    windows = got[:whole].reshape(-1, size).mean(1) - want[:whole].reshape(-1, size).mean(1)
    return {
        "largest_point": float(np.abs(got - want).max()),
        "largest_window": float(np.abs(windows).max()),
        "last_window": float(windows[-1]),
        "last_loss": float(want[whole - size : whole].mean()),
    }
