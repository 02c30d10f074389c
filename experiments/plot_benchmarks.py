"""Draws a committed attention benchmark: time of forward and backward against tokens, both logarithmic.

    python experiments/plot_benchmarks.py results/benchmarks/attention.json [--out=FILE.svg]

Only measurements on random inputs; the floor is that of the sparse module at the rates measured in the same
session. Drawn from the JSON file alone, the same bytes each time. Needs matplotlib:
pip install -e ".[plot]".

Exit status: 0 done, 2 bad input, said in one line.
"""

import pathlib
import sys
from collections.abc import Sequence

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments import figures
from experiments.benchmark_tables import CONTENDERS, Measured
from hax_jax.config import ConfigError

_STYLES = {
    "mosaic_gpu": {"color": "#b03a2e", "marker": "o", "linewidth": 1.8},
    "xla": {"color": "#d98880", "marker": "s", "linewidth": 1.4},
    "dense_tiles": {"color": "#9db4c8", "marker": "v", "linewidth": 1.2},
    "reference": {"color": "#c8c8c8", "marker": "^", "linewidth": 1.2},
    "cudnn": {"color": "#1f4e79", "marker": "D", "linewidth": 1.6},
}


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    return figures.run(
        argv, __doc__, "ATTENTION", lambda source, out: draw(Measured(source, "attention"), out)
    )


def curves(measured: Measured) -> dict[str, list[tuple[int, float]]]:
    """(tokens, seconds) by contender, forward and backward on random inputs of one row; and the 'floor'."""
    found: dict[str, list[tuple[int, float]]] = {}
    shapes = measured.shapes()
    for m in measured.by_id.values():
        wanted = m.get("kind") == "random" and m.get("direction") == "forward_backward" and "time" in m
        if not wanted or m["contender"] not in CONTENDERS or shapes[m["shape"]]["batch"] != 1:
            continue
        tokens = shapes[m["shape"]]["length"]
        found.setdefault(m["contender"], []).append((tokens, m["time"]["seconds"]))
        if m["contender"] == "mosaic_gpu" or ("mosaic_gpu" not in found and m["contender"] == "xla"):
            found.setdefault("floor", []).append((tokens, m["floor"]["seconds"]))
    return {name: sorted(set(points)) for name, points in found.items()}


def draw(measured: Measured, out: pathlib.Path) -> None:
    """Writes the figure; raises ConfigError without matplotlib, data, or if `out` cannot be written."""
    with figures.drawing(out, figsize=(7, 4.6), layout="constrained") as (_, axes):
        found = curves(measured)
        if not found:
            raise ConfigError("benchmark", "one with times on random inputs", str(out), "measure some")
        for name, text in CONTENDERS.items():
            if name in found:
                tokens, seconds = zip(*found[name], strict=True)
                axes.plot(tokens, [1e3 * s for s in seconds], label=text, markersize=4.5, **_STYLES[name])
        if "floor" in found:
            tokens, seconds = zip(*found["floor"], strict=True)
            dotted = {"color": "#444444", "linestyle": ":"}
            axes.plot(tokens, [1e3 * s for s in seconds], label="floor of HAX", **dotted)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({tokens for points in found.values() for tokens, _ in points})
        axes.set_xticks(ticks, [_tokens(tick) for tick in ticks])
        axes.set_xlabel("tokens")
        axes.set_ylabel("milliseconds, forward and backward")
        axes.grid(True, which="major", linewidth=0.4, color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        device = measured.content["sessions"][-1]["device"]["kind"]
        axes.set_title(f"Sparse attention with 64 keys, one head of 64, bfloat16, {device}", fontsize=10)


def _tokens(number: int) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if number % size == 0:
            return f"{number // size}{unit}"
    return str(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
