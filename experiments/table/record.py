"""The committed file of a cell: what each of its runs measured, and what comes of them together."""

import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from experiments import export_result, results
from experiments.table.cells import Cell, Group, Member, Wish
from hax_jax.config import ConfigError, Experiment
from hax_jax.training.environment import commit, read_sessions
from hax_jax.training.files import make_folders, plain, write_atomically
from hax_jax.training.workdir import RunFolder, read_config, settings_differences

# Of each run's curve; a cell may hold many.
MOST_POINTS = 100
_FIELDS = ("task", "row", "mode", "steps", "command", "config", "num_parameters", "runs", "summary")
# What runs of a cell share.
_SHARED = ("format_version", "task", "name", "config", "num_parameters", "steps")


def read(path: pathlib.Path) -> dict[str, Any]:
    """A cell that `write` wrote; raises ConfigError if it is none."""
    return results.read(path, _FIELDS)


def read_all(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The cells of a table's folder, each with its file's name as `file`."""
    return [{**read(path), "file": path.name} for path in sorted(folder.glob("*.json"))]


def finished_of(cell: Cell, out: pathlib.Path) -> list[Member]:
    """The runs of a cell that its file holds.

    Raises:
      ConfigError: the file cannot be read, or holds a cell of other settings.
    """
    path = out / f"{cell.row}.json"
    if not path.exists():
        return []
    there = read(path)
    if differences := settings_differences(there["config"], _config(cell.shared)):
        remedy = f"it holds a cell with {differences}; choose another folder"
        raise ConfigError("--out", "a new folder, or one of this same table", str(path), remedy)
    return [(run["learning_rate"], run["seed"]) for run in there["runs"]]


def state_of(group: Group) -> tuple[bool, int]:
    """Whether a group has finished in its folder, and else from which step it goes on.

    Raises:
      ConfigError: the folder holds runs of other settings.
    """
    if not (group.folder / "config.json").exists():
        return False, 0
    stored = read_config(group.folder)["experiment"]
    if differences := settings_differences(stored, group.experiment.to_dict()):
        raise ConfigError(
            "--workdir",
            "a new folder, or one of this same table",
            str(group.folder),
            f"it holds a run with {differences}; choose another folder",
        )
    names = (path.name for path in (group.folder / "checkpoints").glob("*"))
    steps = [int(name) for name in names if name.isdecimal()]
    return (group.folder / "result.json").exists(), max(steps, default=0)


def add(
    cell: Cell, group: Group, wish: Wish, out: pathlib.Path, command: str, given_commit: str | None = None
) -> dict[str, Any]:
    """Adds the runs of a finished group to the file of its cell, and returns its content.

    Args:
      cell: the cell.
      group: the group, finished in its folder.
      wish: the table.
      out: the table's folder.
      command: of the table.
      given_commit: of the code, where the runs did not record it.

    Raises:
      ConfigError: what the runs left behind is not whole, or the file cannot be written.
    """
    path = out / f"{cell.row}.json"
    runs = {(run["learning_rate"], run["seed"]): run for run in (read(path)["runs"] if path.exists() else ())}
    collected = [_run(group, index, given_commit) for index in range(len(group.members))]
    runs |= {(run["learning_rate"], run["seed"]): run for run, _ in collected}
    shared = next((result for _, result in collected if result is not None), None)
    num_parameters = shared["num_parameters"] if shared else None
    ordered = [runs[member] for member in sorted(runs)]
    content = {
        "format_version": results.FORMAT_VERSION,
        "task": results.TASK,
        "row": cell.row,
        "mode": wish.mode,
        "steps": cell.shared.training.num_steps,
        "command": results.without_places(command),
        "num_parameters": num_parameters,
        "config": _config(cell.shared),
        "summary": summary(ordered),
        "runs": ordered,
    }
    try:
        make_folders(out)
        write_atomically(path, (results.to_text(plain(content)) + "\n").encode())
    except OSError as error:
        raise ConfigError("--out", "a folder that can be written", str(out), str(error.strerror)) from error
    return content


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The learning rate whose runs validate best on average, and the test accuracy over its seeds.

    `test_accuracy` is their mean in [0, 1], `test_accuracy_std` their standard deviation (None for one run),
    `test_accuracies` each of them by seed; `diverged` counts runs of any rate that stopped because of numbers
    that were not finite. A rate with such a run is passed over while there is another.
    """
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for run in runs:
        by_rate.setdefault(run["learning_rate"], []).append(run)
    diverged = sum("test" not in run for run in runs)
    whole = {rate: group for rate, group in by_rate.items() if all("test" in run for run in group)}
    partly = {rate: [run for run in group if "test" in run] for rate, group in by_rate.items()}
    candidates = whole or {rate: group for rate, group in partly.items() if group}
    if not candidates:
        return {"learning_rate": None, "test_accuracy": None, "diverged": diverged}
    validation = {
        rate: statistics.fmean(run["best_valid_accuracy"] for run in group)
        for rate, group in candidates.items()
    }
    best = max(validation, key=lambda rate: (validation[rate], -rate))
    tests = [run["test"]["accuracy"] for run in candidates[best]]
    return {
        "learning_rate": best,
        "seeds": [run["seed"] for run in candidates[best]],
        "best_valid_accuracy": round(validation[best], 6),
        "test_accuracy": round(statistics.fmean(tests), 6),
        "test_accuracy_std": round(statistics.stdev(tests), 6) if len(tests) > 1 else None,
        "test_accuracies": tests,
        "diverged": diverged,
    }


def _config(shared: Experiment) -> dict[str, Any]:
    """The settings without what differs between the runs of a cell."""
    config = shared.to_dict()
    del config["seed"], config["training"]["learning_rate"]
    return config


def _run(group: Group, index: int, given_commit: str | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What is kept of one run, and all that it measured; None for a member that diverged."""
    rate, seed = group.members[index]
    begun: dict[str, Any] = {"learning_rate": rate, "seed": seed}
    sessions = read_sessions(group.folder / "run.json")
    if group.experiment.members:
        begun["trained_together"] = len(group.members)
        ended = _ended(group)[index]
        if ended["stopped"] != "finished":
            return {**begun, "stopped": ended["stopped"], "steps": ended["steps"]}, None
    said = export_result.Given(commit=given_commit if sessions and not sessions[-1].get("commit") else None)
    result = export_result.collect(group.folder_of(index), said)
    result["curve"] = {
        kind: {name: results.thinned(column, MOST_POINTS) for name, column in columns.items()}
        for kind, columns in result["curve"].items()
    }
    kept = {name: value for name, value in result.items() if name not in _SHARED}
    return {**begun, **kept}, result


def _ended(group: Group) -> list[dict[str, Any]]:
    """How each member of a population ended."""
    result = RunFolder(group.folder, group.experiment).result()
    if result is None or result.members is None or len(result.members) != len(group.members):
        remedy = "its result.json names no such members; delete that file and run again"
        raise ConfigError("--workdir", "a finished population", str(group.folder), remedy)
    return result.members


def check_commit(given: str | None) -> None:
    """Raises ConfigError where results could not name the commit of their code."""
    if export_result.full_commit(given) is None and commit()["commit"] is None:
        remedy = "git does not know it here: give it"
        raise ConfigError("--commit", "the commit of this code", given, remedy)
