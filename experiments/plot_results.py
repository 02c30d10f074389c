"""Draws a committed result: validation accuracy against steps, test accuracy by table size, source recall.

    python experiments/plot_results.py results/joint_recall/mamba2_hax.json [--out=FILE.svg]

Two lines are there to compare with: the paper's test accuracy of the same row, and for a model with key
selection what the selected keys alone would give, were they always the right ones and all else guessed.
Drawn from the JSON file alone, the same bytes each time. Needs matplotlib: pip install -e ".[plot]".

Exit status: 0 done, 2 bad input, said in one line.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments import figures, results

TRAIN, VALID, REFERENCE = "#9db4c8", "#b03a2e", "#444444"
SOURCES = ("#b03a2e", "#2e6f9e", "#5b8c5a")


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    return figures.run(argv, __doc__, "RESULT", lambda source, out: draw(results.read(source), out))


def draw(result: dict[str, Any], out: pathlib.Path) -> None:
    """Writes the figure of a result; raises ConfigError without matplotlib or if `out` cannot be written."""
    widths, inches = ((1.15, 1, 1), 14.6) if "recall" in result["test"] else ((1.15, 1), 10)
    layout = {"figsize": (inches, 4.2), "layout": "constrained", "width_ratios": widths}
    with figures.drawing(out, 1, len(widths), **layout) as (figure, axes):
        _draw_curve(axes[0], result)
        _draw_table(figure, axes[1], result)
        if len(widths) == 3:
            _draw_recall(axes[2], result)
        figure.suptitle(title(result))


def reference_lines(result: dict[str, Any]) -> list[tuple[float, str]]:
    """Accuracies in percent to compare with, and what they are."""
    lines = []
    paper = results.paper_accuracy(result)
    if paper is not None:
        lines.append((paper, f"paper: {paper:.1f}%\nafter 400,000 steps"))
    selected = results.selected_keys(result)
    if selected is not None:
        accuracy = 100 * results.accuracy_of_memory(results.experiment(result).data, selected)
        lines.append((accuracy, f"{accuracy:.1f}%: ceiling of\n{selected} selected keys alone"))
    return lines


def title(result: dict[str, Any]) -> str:
    """What stands above the figure."""
    device, experiment = result["device"], results.experiment(result)
    return (
        f"{result['name']}: {100 * result['test']['accuracy']:.2f}% on the test split, "
        f"{result['steps']:,} steps of {experiment.training.batch_size} sequences, "
        f"{device['count']} {device['kind']}"
    )


def _draw_curve(axes, result: dict[str, Any]) -> None:
    train, valid = result["curve"]["train"], result["curve"]["valid"]
    for curve, label, style in (
        (train, "training", {"color": TRAIN, "linewidth": 1.0}),
        (valid, "validation", {"color": VALID, "linewidth": 1.6}),
    ):
        axes.plot(curve["step"], [100 * value for value in curve["accuracy"]], label=label, **style)
    for value, text in reference_lines(result):
        axes.axhline(value, color=REFERENCE, linewidth=0.9, linestyle=(0, (4, 3)))
        # At the right end a curve has mostly risen past its line, or is far below it.
        axes.annotate(
            text,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=REFERENCE,
        )
    _steps(axes, result)
    axes.set_ylim(0, 103)
    axes.set_ylabel("accuracy (%)")
    axes.legend(frameon=False, loc="best")


def _steps(axes, result: dict[str, Any]) -> None:
    axes.set_xlim(0, result["steps"])
    unit, name = (1000, "steps (thousands)") if result["steps"] >= 5000 else (1, "steps")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / unit:g}")
    axes.set_xlabel(name)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_recall(axes, result: dict[str, Any]) -> None:
    valid = result["curve"]["valid"]
    for source, color in zip(results.experiment(result).model.sources, SOURCES, strict=False):
        for kind, dashes in (("recall", (None, None)), ("reach", (3, 2))):
            values = [100 * value for value in valid[f"{kind}/any/{source}"]]
            axes.plot(valid["step"], values, color=color, dashes=dashes, label=f"{kind}, {source}")
    _steps(axes, result)
    axes.set_ylim(0, 103)
    axes.set_ylabel("scored queries that see their answer (%)")
    axes.legend(frameon=False, loc="best", fontsize=8)


def _draw_table(figure, axes, result: dict[str, Any]) -> None:
    table = result["test"]["by_size"]
    accuracy = [[100 * value for value in row] for row in table["accuracy"]]
    lowest = min(map(min, accuracy))
    # A scale of its own: a good model's differences would not show from 0 to 100.
    low = min(10 * (lowest // 10), 90) if lowest < 100 else 99
    mesh = axes.pcolormesh(accuracy, vmin=low, vmax=100, cmap="viridis", edgecolors="white", linewidth=0.3)
    for i, row in enumerate(accuracy):
        for j, value in enumerate(row):
            text = f"{value:.1f}" if value < 99.95 else "100"
            color = "white" if value < (low + 100) / 2 else "black"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=6.5, color=color)
    for axis, name, what in ((axes.xaxis, "n_key", "keys"), (axes.yaxis, "n_context", "contexts")):
        axis.set_ticks([index + 0.5 for index in range(len(table[name]))], table[name])
        axis.set_label_text(what)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=axes, label="test accuracy (%)", pad=0.02)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
