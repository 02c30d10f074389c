"""Draws what experiments/explain.py found: attention on one item, hash buckets, ablations, larger tables.

    python experiments/plot_explained.py results/explained/mamba2_hax.json [--out=FILE.svg]

Drawn from the JSON file alone. Needs matplotlib: pip install -e ".[plot]".

Exit status: 0 done, 2 bad input, said in one line.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from experiments import explain, figures, results

HASHED, SELECTED, ANSWER, BAR = "#b03a2e", (0.62, 0.71, 0.78, 1.0), "#111111", "#9db4c8"


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    read = lambda source: results.read(source, explain.FIELDS)  # noqa: E731
    return figures.run(argv, __doc__, "EXPLAINED", lambda source, out: draw(read(source), out))


def draw(result: dict[str, Any], out: pathlib.Path) -> None:
    """Writes the figure; raises ConfigError without matplotlib or if `out` cannot be written."""
    layers = len(result["item"]["visible"])
    shape = [
        [f"layer {i}" for i in range(layers) for _ in range(6 // layers)],
        ["buckets"] * 2 + ["parts"] * 2 + ["larger"] * 2,
    ]
    with figures.drawing(out, figsize=(12, 8.5), layout="constrained") as (figure, axes):
        axes.remove()
        places = figure.subplot_mosaic(shape, height_ratios=(1.6, 1))
        for index in range(layers):
            _draw_item(places[f"layer {index}"], result, index)
        _draw_buckets(places["buckets"], result)
        _draw_parts(places["parts"], result)
        _draw_larger(places["larger"], result)
        figure.suptitle(f"{result['name']} after {result['step']:,} steps")


def _draw_item(axes: Any, result: dict[str, Any], layer: int) -> None:
    item, sources = result["item"], result["sources"]
    length = item["query"][-1] + 1
    for name, shown in zip(sources, item["visible"][layer], strict=True):
        if name == "key_selection":
            image = np.zeros((len(shown), length, 4))
            for row, keys in enumerate(shown):
                image[row, keys] = SELECTED
            axes.imshow(image, aspect="auto", interpolation="nearest")
        else:
            points = [(key, row) for row, keys in enumerate(shown) for key in keys]
            axes.plot(*zip(*points, strict=True), "o", ms=2, color=HASHED) if points else None
    axes.plot(item["answer"], range(len(item["answer"])), "s", ms=4, mfc="none", mew=0.7, color=ANSWER)
    axes.set_xlim(-1, length)
    axes.set_ylim(len(item["answer"]) - 0.5, -0.5)
    axes.set_title(f"layer {layer + 1}: hashing (red), key selection (blue), answer (square)", fontsize=9)
    axes.set_xlabel("position of the key")
    axes.set_ylabel(f"scored query of a table of {item['n_context']} x {item['n_key']}")


def _draw_buckets(axes: Any, result: dict[str, Any]) -> None:
    for index, layer in enumerate(result["buckets"]):
        occupancy = [max(x, 1e-2) for x in layer["occupancy"]]
        axes.plot(
            range(1, len(occupancy) + 1),
            occupancy,
            label=f"layer {index + 1}: {100 * layer['empty']:.0f}% empty",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("hash buckets, fullest first")
    axes.set_ylabel("keys in the bucket")
    axes.set_title("buckets, and queries that find theirs empty", fontsize=9)
    axes.legend(frameon=False)


def _draw_parts(axes: Any, result: dict[str, Any]) -> None:
    accuracy = result["ablations"]["accuracy"]
    values = [100 * value for value in accuracy.values()]
    axes.barh(range(len(values)), values, color=BAR)
    for row, (name, value) in enumerate(zip(accuracy, values, strict=True)):
        axes.text(1, row, f"{name}: {value:.1f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy (%)")
    axes.set_title(f"parts, {result['ablations']['num_items']} items of all sizes", fontsize=9)


def _draw_larger(axes: Any, result: dict[str, Any]) -> None:
    found = result["larger"]
    axes.barh(range(len(found)), [100 * x["accuracy"] for x in found], color=BAR)
    for row, x in enumerate(found):
        size, accuracy = f"{x['n_context']} x {x['n_key']}", f"{100 * x['accuracy']:.1f}"
        text = f"{size}: {accuracy}, {x['never_trained']} ids never trained"
        axes.text(1, row, text, va="center", fontsize=8)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy (%)")
    axes.set_title(f"larger tables, {found[0]['num_items']} items each", fontsize=9)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
