"""Committed results: their form, the paper's numbers beside them, and what chance and memory would give."""

import argparse
import json
import os
import pathlib
import re
import shlex
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from hax_jax.config import ConfigError, DataConfig, Experiment

FORMAT_VERSION = 1
CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = pathlib.Path("results")
TASK = "joint_recall"

# Table 3 (arXiv 2507.00449): test accuracy in percent after 400,000 steps, the best of three learning rates.
PAPER = {
    "mamba_base": 16.3,
    "mamba_base_double": 34.5,
    "mamba_dilated": 7.8,
    "mamba_sliding_window": 18.7,
    "mamba_sliding_window_dilated": 16.6,
    "mamba_sliding_window_sink": 16.4,
    "mamba_lsh": 11.6,
    "mamba_key_selection": 36.6,
    "mamba_hax": 38.0,
    "mamba2_base": 36.6,
    "mamba2_base_double": 59.2,
    "mamba2_dilated": 19.6,
    "mamba2_sliding_window": 70.6,
    "mamba2_sliding_window_dilated": 48.6,
    "mamba2_sliding_window_sink": 49.3,
    "mamba2_lsh": 13.5,
    "mamba2_key_selection": 60.1,
    "mamba2_hax": 74.3,
    "samba": 6.3,
}

_FIELDS = (
    "task",
    "name",
    "command",
    "commit",
    "config",
    "device",
    "versions",
    "implementation",
    "num_parameters",
    "steps",
    "best_step",
    "test",
    "speed",
    "curve",
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, without the usage."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError("command line", "arguments that --help lists", message, "see --help")


def commit_of(session: dict[str, Any]) -> str:
    """The commit that a run or a measurement is of, and whether the checkout held other changes."""
    changes = " with uncommitted changes" if session.get("uncommitted_changes") else ""
    return f"commit {(session['commit'] or 'unknown')[:7]}{changes}"


def without_options(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """A command's words without these options and their values, such as those that say where files lie."""
    kept, skip = [], False
    for word in words:
        name, given, _ = word.partition("=")
        if skip or name in names:
            skip = not skip and not given
        else:
            kept.append(word)
    return kept


def without_places(command: str) -> str:
    """A recorded command without the options whose value is a place on one machine, an absolute path."""
    words = shlex.split(command)
    return shlex.join(word for word in words if not os.path.isabs(word.partition("=")[2]))


def wrapped(command: str) -> str:
    """A shell command over several lines; one with quotes, which must not be broken, stays one line."""
    if "'" in command or '"' in command:
        return command
    parts = textwrap.wrap(command, 100, break_long_words=False, break_on_hyphens=False)
    return " \\\n        ".join(parts)


def read(path: pathlib.Path, fields: Sequence[str] = _FIELDS) -> dict[str, Any]:
    """A result that `export_result.py` wrote, or a file of other fields; raises ConfigError if it is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        fault = " ".join(str(error).split())
        raise _unusable(path, fault) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise _unusable(path, f"it is of format version {version!r}")
    missing = [field for field in fields if field not in content]
    if missing:
        raise _unusable(path, f"it lacks {', '.join(missing)}")
    return content


def _unusable(path: pathlib.Path, fault: str) -> ConfigError:
    expected = f"a whole result of format version {FORMAT_VERSION}"
    return ConfigError("result", expected, str(path), f"{fault}; export the run anew")


def experiment(result: dict[str, Any]) -> Experiment:
    """The settings of a result, checked."""
    return Experiment.from_dict(result["config"])


def paper_accuracy(result: dict[str, Any]) -> float | None:
    """The paper's test accuracy of the same row in percent; None for other rows and other table sizes."""
    data, paper_data = experiment(result).data, DataConfig()
    sizes = ("min_n_context", "max_n_context", "min_n_key", "max_n_key", "n_value")
    same = all(getattr(data, name) == getattr(paper_data, name) for name in sizes)
    return PAPER.get(row_name(result).removesuffix("_parity")) if same else None


def row_name(result: dict[str, Any]) -> str:
    """The row of Table 3 that a result belongs to.

    That is its name, without thousands of steps behind it and what a population adds for a member.
    """
    return re.sub(r"(_[0-9]+k)?(_lr[0-9.e+-]+_seed[0-9]+)?$", "", result["config"]["name"])


def by_seed(found: Sequence[Any], result_of: Callable[[Any], dict[str, Any]]) -> list[list[Any]]:
    """Results in groups that differ in nothing but the seed and what came of it, in the order given."""
    groups: dict[str, list[Any]] = {}
    for one in found:
        result = result_of(one)
        same = {**result["config"], "name": row_name(result), "seed": None}
        groups.setdefault(json.dumps([same, result["steps"]], sort_keys=True), []).append(one)
    return list(groups.values())


def first_step_above(result: dict[str, Any], accuracy: float) -> int | None:
    """The first step whose validation accuracy is above `accuracy`, in [0, 1]; None if there is none."""
    valid = result["curve"]["valid"]
    above = (step for step, x in zip(valid["step"], valid["accuracy"], strict=True) if x > accuracy)
    return next(above, None)


def accuracy_of_memory(data: DataConfig, num_entries: int) -> float:
    """Accuracy in [0, 1] of knowing `num_entries` entries of each table and guessing the others.

    The mean over table sizes of m + (1 - m) / n_value, with m = min(1, num_entries / (n_context n_key)).
    """
    contexts = np.arange(data.min_n_context, data.max_n_context + 1)
    keys = np.arange(data.min_n_key, data.max_n_key + 1)
    known = np.minimum(1.0, num_entries / np.outer(contexts, keys))
    return float(np.mean(known + (1 - known) / data.n_value))


def selected_keys(result: dict[str, Any]) -> int | None:
    """How many keys key selection keeps for a query; None for a model without it."""
    model = experiment(result).model
    return model.keys_per_source if "key_selection" in model.sources else None


def thinned(points: Sequence[Any], most: int) -> Sequence[Any]:
    """Every n-th point counted from the last, the smallest n that leaves at most so many."""
    stride = -(-len(points) // most) or 1
    return points[::-stride][::-1]


def to_text(value: Any, indent: str = "") -> str:
    """JSON with a line for each field and for each list of plain values."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(name)}: {to_text(item, inner)}" for name, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(inner + to_text(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
