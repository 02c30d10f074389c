"""The result of a comparison as JSON can hold it, and its checks when it is read back."""

import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import results
from hax_jax.config import ConfigError

if TYPE_CHECKING:
    # Figures and tables are made without JAX.
    from experiments.comparison.exchange import Arrays, Exchange
    from experiments.comparison.ours import Run

FOLDER = pathlib.Path("results") / "pytorch"
TASK = "pytorch"
QUANTITIES = ("loss", "gate_loss", "acc")
_FIELDS = ("name", "origin", "command", "commit", "device", "versions", "model", "curves", "timing")


def curves(exchange: "Exchange", theirs: "Arrays", ours: "Run") -> dict[str, Any]:
    """Both frameworks' curves, the largest difference of each, and the first decision that differs."""
    first = ours.first_difference
    # Numbers of the step itself follow from the decision already.
    same = exchange.num_steps if first is None else first["step"]
    both = {
        "torch": {name: [float(x) for x in theirs[name]] for name in QUANTITIES},
        "jax": ours.curves,
    }
    return {
        "steps": exchange.num_steps,
        "precision": exchange.model.precision,
        "routing": exchange.model.routing,
        "torch_ran": json.loads(str(theirs["info_json"])),
        "largest_difference": {name: _largest(both, name, exchange.num_steps) for name in QUANTITIES},
        "steps_with_other_decisions": ours.differing_steps,
        "first_difference": first,
        "steps_before_first_difference": same,
        "largest_difference_before": {name: _largest(both, name, same) for name in QUANTITIES},
        "torch": {name: _rounded(both["torch"][name]) for name in QUANTITIES},
        "jax": {name: _rounded(both["jax"][name]) for name in QUANTITIES},
    }


def _largest(both: Mapping[str, Any], name: str, num_steps: int) -> float:
    a, b = (np.asarray(both[key][name][:num_steps]) for key in ("torch", "jax"))
    return float(f"{np.abs(a - b).max(initial=0.0):.3g}")


def _rounded(values: list[float]) -> list[float]:
    # Nine digits give a float32 back exactly.
    return [float(f"{value:.9g}") for value in values]


def differences(result: Mapping[str, Any], name: str) -> list[float]:
    """|JAX - PyTorch| of a quantity, step by step."""
    a, b = (np.asarray(result["curves"][key][name]) for key in ("torch", "jax"))
    return [float(x) for x in np.abs(a - b)]


def read(path: pathlib.Path) -> dict[str, Any]:
    """A result that `compare_pytorch.py` wrote; raises ConfigError if it is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unusable(path, " ".join(str(error).split())) from error
    if not isinstance(content, dict) or content.get("format_version") != results.FORMAT_VERSION:
        raise _unusable(path, "it is of another format version")
    missing = [name for name in _FIELDS if name not in content]
    if missing or content.get("task") != TASK:
        raise _unusable(path, f"it lacks {', '.join(missing) or 'the task pytorch'}")
    return content


def _unusable(path: pathlib.Path, fault: str) -> ConfigError:
    return ConfigError(
        "result", "a whole comparison", str(path), f"{fault}; make it anew with compare_pytorch.py"
    )


def speed_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The modes that were timed without an error."""
    return [row for row in result["timing"] or () if "error" not in row]


def summary(result: Mapping[str, Any]) -> str:
    """What a comparison found, in lines for a terminal."""
    found = result["curves"]
    largest = ", ".join(f"{name} {value:.1e}" for name, value in found["largest_difference"].items())
    lines = [
        f"{result['name']}: {found['steps']} steps from {result['origin']}, largest differences: {largest}"
    ]
    first, same = found["first_difference"], found["largest_difference_before"]
    if first is None:
        lines.append("every decision was the same on both sides")
    else:
        near = "" if first["margin"] is None else f", {first['margin']:.1e} from its boundary"
        lines.append(
            f"first decision that differs: step {first['step']}, layer {first['layer']}, {first['kind']} of "
            f"row {first['row']} position {first['position']}: {first['jax']} in JAX, {first['torch']} in "
            f"PyTorch{near}; before it the losses differ by at most {same['loss']:.1e}"
        )
    for row in result["timing"] or ():
        told = row.get("error") or (
            f"{row['step_ms']:.2f} ms a step, {row['peak_gib']:.2f} GiB, {row['tokens_per_s']:,} tokens/s"
        )
        lines.append(f"{row['label']}: {told}")
    return "\n".join(lines)
