"""What is drawn from the files of a table's cells: the table in Markdown, and the figure of the curves."""

import pathlib
import re
import shlex
import statistics
from collections.abc import Sequence
from typing import Any

from experiments import figures, results
from experiments.table import record
from hax_jax.training.progress import duration

FOLDER = "table3"
FIGURE, TABLE = "curves.svg", "table.md"
# The paper's label, and the end of the config files' names.
ROWS = {
    "Base": "base",
    "+D": "dilated",
    "+SW": "sliding_window",
    "+SW+D": "sliding_window_dilated",
    "+A": "sliding_window_sink",
    "+LSH": "lsh",
    "+KS": "key_selection",
    "+HAX": "hax",
    "Base, 2 x dim": "base_double",
    "Samba": "samba",
}
_MODES = {
    "causal": "causal routing, float32 parameters",
    "parity": "the original's routing and its pure bfloat16",
}
_HEAD = ("row", "Mamba", "paper", "Mamba-2", "paper", "selected keys alone")
_COLORS = ("#444444", "#8c6d31", "#1f77b4", "#17a2a2", "#7f7f7f", "#9467bd", "#ff7f0e", "#b03a2e", "#2ca02c")


def table(cells: Sequence[dict[str, Any]], folder: str = "") -> list[str]:
    """Lines of Markdown: test accuracies in percent beside the paper's, and each row's ceiling.

    Args:
      cells: of one table, as `record.read_all` gives them.
      folder: what links to their files begin with.
    """
    of_row = {cell["row"]: cell for cell in cells}
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD))]
    for label, end in ROWS.items():
        pair = [of_row.get(name) for name in _names(end)]
        if not any(pair):
            continue
        entries = [label]
        for cell in pair:
            paper = results.paper_accuracy(cell) if cell else None
            entries += [_entry(cell, folder), "" if paper is None else f"{paper:.1f}"]
        ceilings = {f"{value:.1f}" for cell in pair if cell and (value := ceiling(cell)) is not None}
        lines.append(_line([*entries, " / ".join(sorted(ceilings))]))
    return lines


def ceiling(cell: dict[str, Any]) -> float | None:
    """Test accuracy in percent of knowing what key selection keeps and guessing the rest; None without it."""
    selected = results.selected_keys(cell)
    if selected is None:
        return None
    return 100 * results.accuracy_of_memory(results.experiment(cell).data, selected)


def circumstances(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: what stands with a table, and the command."""
    runs = [run for cell in cells for run in cell["runs"]]
    whole = [run for run in runs if "test" in run]
    training = results.experiment(cells[0]).training
    rates = sorted({run["learning_rate"] for run in runs})
    told = [
        _MODES[cells[0]["mode"]],
        f"{cells[0]['steps']:,} steps of {training.batch_size} sequences",
        f"warm-up {training.warmup_steps:,}",
        f"seed{_list(sorted({run['seed'] for run in runs}))}",
        f"learning rate{_list(rates)}" + (" (the best in validation of each row)" if len(rates) > 1 else ""),
        *_differing(whole),
    ]
    seconds = _seconds(whole)
    took = f", {duration(seconds)} in all" if seconds else ""
    if any(_shared(cell["command"]) for cell in cells):
        took += ", runs that shared a GPU each counted in full"
    several = any(len(cell["summary"].get("seeds", ())) > 1 for cell in cells)
    what = "Test accuracy in percent" + (", the mean and standard deviation over seeds" if several else "")
    commands = dict.fromkeys(_command(cell["command"]) for cell in cells)
    return [
        f"{what}: {', '.join(told)}{took}. "
        "Selected keys alone: what the keys that key selection keeps would give, were they always the right "
        "ones, and all else guessed.",
        "",
        *(f"    {results.wrapped(command)}" for command in commands),
    ]


def section(root: pathlib.Path) -> str | None:
    """What the README shows of the committed tables, or None; raises ConfigError over a bad file."""
    lines = []
    for path in sorted((root / results.FOLDER / FOLDER).glob("*")):
        cells = record.read_all(path) if path.is_dir() else []
        if not cells:
            continue
        folder = path.relative_to(root).as_posix()
        lines += ["", *table(cells, f"{folder}/"), "", *circumstances(cells)]
        if (path / FIGURE).exists():
            what = f"{cells[0]['mode']}, {cells[0]['steps']:,} steps: validation accuracy against steps"
            lines += ["", f"![{what}]({folder}/{FIGURE})"]
    return "\n".join([*lines, ""]) if lines else None


def write(folder: pathlib.Path) -> None:
    """Writes the table and the figure of a folder's cells beside them.

    Raises:
      ConfigError: a cell cannot be read, a file not be written, or matplotlib is missing.
    """
    cells = record.read_all(folder)
    if not cells:
        return
    text = "\n".join([*table(cells), "", *circumstances(cells), "", f"![curves]({FIGURE})", ""])
    (folder / TABLE).write_text(text)
    draw(cells, folder / FIGURE)


def draw(cells: Sequence[dict[str, Any]], out: pathlib.Path) -> None:
    """Draws validation accuracy against steps: mean and range over the seeds of each row's best rate.

    The paper's test accuracies stand as triangles at the right end, in the colour of their rows.
    """
    colors = dict(zip(ROWS, (*_COLORS, _COLORS[0]), strict=True))
    of_row = {cell["row"]: cell for cell in cells}
    layout = {"figsize": (10, 5), "layout": "constrained", "sharey": True}
    with figures.drawing(out, 1, 2, **layout) as (figure, panels):
        lines: dict[str, Any] = {}
        for axes, arch, title in zip(panels, (0, 1), ("Mamba", "Mamba-2"), strict=True):
            for label, end in ROWS.items():
                cell = of_row.get(_names(end)[arch])
                if cell is not None and cell["summary"]["learning_rate"] is not None:
                    style = {"linestyle": ":"} if end == "samba" else {}
                    lines[label] = _draw_cell(axes, cell, color=colors[label], **style)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("steps")
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
            axes.set_xlim(left=0)
            axes.set_ylim(0, 103)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("validation accuracy (%)")
        labels = [label for label in ROWS if label in lines]
        handles = [lines[label] for label in labels]
        figure.legend(handles, labels, frameon=False, fontsize=9, ncols=5, loc="outside lower center")
        figure.suptitle(
            f"{cells[0]['mode']}, {cells[0]['steps']:,} steps; triangles: the paper after 400,000"
        )


def _draw_cell(axes, cell: dict[str, Any], **style: Any) -> Any:
    """Draws a cell and returns its line."""
    runs = [
        run
        for run in cell["runs"]
        if run["learning_rate"] == cell["summary"]["learning_rate"] and "curve" in run
    ]
    curves = [run["curve"]["valid"] for run in runs]
    steps = curves[0]["step"]
    columns = list(zip(*(curve["accuracy"] for curve in curves), strict=True))
    means = [100 * statistics.fmean(column) for column in columns]
    (line,) = axes.plot(steps, means, linewidth=1.4, **style)
    if len(runs) > 1:
        low, high = ([100 * f(column) for column in columns] for f in (min, max))
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    paper = results.paper_accuracy(cell)
    if paper is not None:
        axes.plot(
            [1.01], [paper], "<", color=style["color"], transform=axes.get_yaxis_transform(), clip_on=False
        )
    return line


def _names(end: str) -> tuple[str, str]:
    """The config files of a row: of Mamba, and of Mamba-2."""
    return ("samba", "") if end == "samba" else (f"mamba_{end}", f"mamba2_{end}")


def _entry(cell: dict[str, Any] | None, folder: str) -> str:
    """What a table shows of a cell."""
    if cell is None:
        return ""
    found = cell["summary"]
    if found["test_accuracy"] is None:
        return f"[diverged]({folder}{cell['file']})"
    text = f"{100 * found['test_accuracy']:.1f}"
    if found["test_accuracy_std"] is not None:
        text += f" ± {100 * found['test_accuracy_std']:.1f}"
    text = f"[{text}]({folder}{cell['file']})"
    if len({run["learning_rate"] for run in cell["runs"]}) > 1:
        text += f" at {found['learning_rate']:g}"
    return text + (f", {found['diverged']} diverged" if found["diverged"] else "")


def _differing(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Devices, commits and versions, each as often as it differs."""
    devices = dict.fromkeys(f"{run['device']['count']} x {run['device']['kind']}" for run in runs)
    commits = dict.fromkeys(results.commit_of(run) for run in runs)
    versions = dict.fromkeys(
        f"{name} {run['versions'][name]}"
        for name in ("jax", "python")
        for run in runs
        if name in run["versions"]
    )
    return [*devices, *commits, *versions]


def _command(command: str) -> str:
    """The command of a table without what decides only where and when its cells are trained."""
    free = re.compile(r"--(jobs|gpus|limit_seconds|commit|compilation_cache)=")
    return shlex.join(word for word in shlex.split(command) if not free.match(word))


def _shared(command: str) -> bool:
    """Whether a table's command trains several cells on one GPU at a time."""
    options = dict(word.split("=", 1) for word in shlex.split(command) if "=" in word)
    return int(options.get("--jobs", 1)) > len(options.get("--gpus", "0").split(","))


def _seconds(runs: Sequence[dict[str, Any]]) -> float:
    """The time of all runs; where a process was killed, that of training and validation alone."""
    total = 0.0
    for run in runs:
        seconds = run["seconds"]
        wall = seconds["wall"]
        own = seconds["training"] + seconds["validation"] if wall is None else wall
        total += own / run.get("trained_together", 1)
    return total


def _list(values: Sequence[float]) -> str:
    text = ", ".join(f"{value:g}" for value in values)
    return f"s {text}" if len(values) > 1 else f" {text}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
