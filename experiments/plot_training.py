"""Draws the accuracy and the loss of a run against its steps.

    python experiments/plot_training.py runs/mamba2_hax [--out=FILE.svg]

The plot goes to WORKDIR/training.svg unless --out says otherwise (.svg, .png or .pdf). The path is printed,
and on the last line the test accuracy, if the run has finished. Needs matplotlib: pip install -e ".[plot]".

Exit status: 0 done, 2 bad input, said in one line.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from hax_jax.config import ConfigError, Experiment
from hax_jax.training.metrics import read_metrics
from hax_jax.training.restore import check_single
from hax_jax.training.workdir import read_config

FORMATS = (".svg", ".png", ".pdf")
TRAIN, VALID = "#9db4c8", "#b03a2e"


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("workdir", type=pathlib.Path, help="folder of a run")
    parser.add_argument("--out", type=pathlib.Path, help="file of the plot; default WORKDIR/training.svg")
    arguments = parser.parse_args(argv[1:])
    workdir, out = arguments.workdir, arguments.out or arguments.workdir / "training.svg"
    try:
        plot(workdir, out)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"plot: {out}")
    result = workdir / "result.json"
    if result.exists():
        print(f"test accuracy: {100 * json.loads(result.read_text())['test_accuracy']:.2f}%")
    return 0


def plot(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draws the run in `workdir` to the file `out`; raises ConfigError where either cannot be used."""
    if out.suffix not in FORMATS:
        raise ConfigError("--out", f"a file named {', '.join(FORMATS)}", str(out), "change its ending")
    config = read_config(workdir)
    check_single(Experiment.from_dict(config["experiment"]), workdir)
    name, entries = config["experiment"]["name"], read_metrics(workdir)
    if not any(entry["kind"] in ("train", "valid") for entry in entries):
        raise ConfigError("workdir", "a run that has logged a step", str(workdir), "train longer")
    try:
        draw(entries, name, out)
    except OSError as error:
        raise ConfigError("--out", "a file that can be written", str(out), str(error.strerror)) from error


def draw(entries: Sequence[dict[str, Any]], title: str, out: pathlib.Path) -> None:
    """Writes the figure of a run's metrics.

    Args:
      entries: lines of `metrics.jsonl`; 'train' gives the faint curves, 'valid' the marked ones, and 'test'
        a horizontal line.
      title: printed above.
      out: file to write.

    Raises:
      ConfigError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("matplotlib", "installed", None, 'pip install -e ".[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same run gives the same file, byte for byte, and text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "hax_jax", "svg.fonttype": "none", "font.size": 9})
    figure, panels = pyplot.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    for axes, quantity, scale in zip(panels, ("accuracy", "loss"), (100.0, 1.0), strict=True):
        for kind, style in (
            ("train", {"color": TRAIN, "linewidth": 0.9}),
            ("valid", {"color": VALID, "linewidth": 1.4, "marker": "o", "markersize": 3}),
        ):
            of_kind = (entry for entry in entries if entry["kind"] == kind)
            # null where every update of an interval was refused.
            points = [(x["step"], scale * x[quantity]) for x in of_kind if x[quantity] is not None]
            axes.plot(*zip(*points, strict=True), label=kind, **style) if points else None
        for entry in entries:
            if entry["kind"] == "test":
                value = scale * entry[quantity]
                axes.axhline(value, color="black", linewidth=0.8, linestyle=":", label=f"test {value:.4g}")
        axes.set_xlabel("step")
        axes.set_ylabel("accuracy (%)" if quantity == "accuracy" else "cross-entropy (nats)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0, top=102 if quantity == "accuracy" else None)
        axes.legend(frameon=False)
    figure.suptitle(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
