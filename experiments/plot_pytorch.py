"""Draws a comparison with PyTorch: both curves and their difference, and what a training step takes.

    python experiments/plot_pytorch.py results/pytorch/mamba2_hax.json [--out=FILE.svg]

Drawn from the JSON file alone, the same bytes each time. Where nothing was timed the second panel shows the
largest differences. Needs matplotlib: pip install -e ".[plot]".

Exit status: 0 done, 2 bad input, said in one line.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments import figures
from experiments.comparison import report

TORCH, JAX, DIFFERENCE = "#d98c5f", "#2f6f8f", "#8a8a8a"
# Below this a difference is drawn as this: a logarithm has no zero.
SMALLEST = 1e-9


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    return figures.run(argv, __doc__, "RESULT", lambda source, out: draw(report.read(source), out))


def draw(result: dict[str, Any], out: pathlib.Path) -> None:
    """Writes the figure of a comparison; raises ConfigError without matplotlib or if it cannot be written."""
    layout = {"figsize": (10, 4), "layout": "constrained", "width_ratios": (1.2, 1)}
    with figures.drawing(out, 1, 2, **layout) as (figure, (left, right)):
        _draw_curves(left, result)
        if report.speed_rows(result):
            _draw_speed(right, result)
        else:
            _draw_largest(right, result)
        figure.suptitle(title(result))


def title(result: dict[str, Any]) -> str:
    """What stands above the figure."""
    device = result["device"]
    return f"{result['name']}: {result['curves']['steps']} steps from {result['origin']}, {device['kind']}"


def _draw_curves(axes, result: dict[str, Any]) -> None:
    found = result["curves"]
    steps = range(found["steps"])
    axes.plot(steps, found["torch"]["loss"], color=TORCH, linewidth=2.4, label="PyTorch")
    axes.plot(steps, found["jax"]["loss"], color=JAX, linewidth=1.1, linestyle=(0, (4, 2)), label="JAX")
    axes.set_xlabel("step")
    axes.set_ylabel(f"cross-entropy (nats), {found['precision']}, {found['routing']} routing")
    axes.spines[["top"]].set_visible(False)
    other = axes.twinx()
    gaps = [max(x, SMALLEST) for x in report.differences(result, "loss")]
    other.plot(steps, gaps, color=DIFFERENCE, linewidth=0.9, label="|difference|")
    other.set_yscale("log")
    other.set_ylim(SMALLEST, 1)
    other.set_ylabel("|JAX - PyTorch| of the loss", color=DIFFERENCE)
    other.spines[["top"]].set_visible(False)
    first = found["first_difference"]
    if first is not None:
        axes.axvline(first["step"], color=DIFFERENCE, linewidth=0.9, linestyle=":")
        axes.annotate(
            f"first other decision:\n{first['kind']}, layer {first['layer']}",
            (first["step"], 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
        )
    handles = [line for one in (axes, other) for line in one.get_legend_handles_labels()[0]]
    # Above the curves, one of which goes up where the other goes down.
    axes.legend(handles=handles, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)


def _draw_speed(axes, result: dict[str, Any]) -> None:
    rows = report.speed_rows(result)
    colors = [TORCH if row["framework"] == "torch" else JAX for row in rows]
    places = range(len(rows))
    axes.barh(places, [row["step_ms"] for row in rows], color=colors, height=0.6)
    for place, row in zip(places, rows, strict=True):
        rate = f"{row['tokens_per_s'] / 1e6:.2f}M tokens/s"
        text = f" {row['step_ms']:.2f} ms, {row['peak_gib']:.2f} GiB,\n {rate}"
        axes.text(row["step_ms"], place, text, va="center", fontsize=8.5)
    axes.set_yticks(places, [row["label"].replace(", ", "\n", 1) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.55 * max(row["step_ms"] for row in rows))
    batch = result["batch"]
    axes.set_xlabel(f"ms for a training step of {batch['size']} x {batch['length']} positions")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_largest(axes, result: dict[str, Any]) -> None:
    largest = result["curves"]["largest_difference"]
    names = {"loss": "loss", "gate_loss": "gate loss", "acc": "accuracy"}
    places = range(len(names))
    values = [max(largest[name], SMALLEST) for name in names]
    axes.barh(places, values, color=JAX, height=0.6, left=SMALLEST)
    for place, name in zip(places, names, strict=True):
        text = f" {largest[name]:.1e}" if largest[name] else " 0"
        axes.text(max(largest[name], SMALLEST), place, text, va="center", fontsize=9)
    axes.set_yticks(places, names.values())
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(SMALLEST, 1)
    axes.set_xlabel("largest |JAX - PyTorch| of any step")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
