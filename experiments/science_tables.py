"""Tables of docs/science.md: ceilings worked out from the task, and what runs measured."""

import json
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from experiments import explain, results
from hax_jax.config import DataConfig

FILE = "docs/science.md"
_KEYS = (8, 16, 32, 64, 128)
_MOST_ROWS = 12
# The steps of the runs that are compared by routing and precision, and where they lie.
_STEPS = 40_000
_PRECISION_FOLDERS = (f"{results.TASK}/*.json", "table3/*/*.json")
_HASHED, _SELECTED = "sign_bin_lsh", "key_selection"


def sections(root: pathlib.Path) -> dict[str, str]:
    """What stands between the markers of the page, by the markers' name."""
    none = "\nNot measured yet.\n"
    return {
        "ceilings": ceilings(),
        "recall": _joined(map(recall_table, _runs(root))) or none,
        "explained": _joined(map(explained, _explained(root))) or none,
        "ladder": ladder(root) or none,
        "precision": precision(root) or none,
    }


def ceilings() -> str:
    """Accuracy of knowing so many entries of each of the paper's tables, all others guessed."""
    rows = [
        [keys, *(f"{100 * results.accuracy_of_memory(DataConfig(), n * keys):.1f}%" for n in (1, 2))]
        for keys in _KEYS
    ]
    return _table(("keys kept", "one entry each", "two entries each"), rows)


def recall_table(result: dict[str, Any]) -> str:
    """Accuracy and recall of one run, over its validations."""
    valid, layers = result["curve"]["valid"], range(1, result["config"]["model"]["num_layers"] + 1)
    sources = result["config"]["model"]["sparse_arch"].split("+")
    columns = [f"recall/{layer}/{source}" for source in sources for layer in layers]
    columns += [f"reach/any/{source}" for source in sources]
    chosen = results.thinned(range(len(valid["step"])), _MOST_ROWS)
    rows = [
        [f"{valid['step'][i]:,}", *(f"{100 * valid[name][i]:.1f}" for name in ("accuracy", *columns))]
        for i in chosen
    ]
    names = [f"`{name}`" for name in columns]
    seed = result["config"]["seed"]
    steps = f"{result['steps']:,} steps"
    header = f"\n`{results.row_name(result)}`, seed {seed}, {steps}, validation, percent:\n"
    return header + _table(("step", "accuracy", *names), rows)


def explained(result: dict[str, Any]) -> str:
    """What experiments/explain.py found in one run."""
    found, sources = result["offsets"], result["sources"]
    rows = [
        [layer + 1, name, *(f"{100 * x:.1f}" for x in shares)]
        for layer, by_source in enumerate(found["visible"])
        for name, shares in zip(sources, by_source, strict=True)
    ]
    rows += [
        [layer + 1, "weight", *(f"{100 * x:.1f}" for x in weight)]
        for layer, weight in enumerate(found["weight"])
    ]
    kinds, weights = result["kinds"]["kind"], result["kinds"]["weight"]
    looks = [
        [layer + 1, kind, *(f"{100 * x:.0f}" for x in row)]
        for layer, by_kind in enumerate(weights)
        for kind, row in zip(kinds[2:], by_kind[2:], strict=True)
    ]
    offsets = [f"{offset:+d}" if offset else "answer" for offset in found["offset"]]
    parts = result["ablations"]["accuracy"]
    empty = ", ".join(
        f"{100 * layer['empty']:.0f}% in layer {i + 1}" for i, layer in enumerate(result["buckets"])
    )
    return "\n".join(
        [
            f"\n`{result['name']}` after {result['step']:,} steps. Percent of {found['num_queries']:,} "
            f"queries of {found['n_context']} x {found['n_key']} tables that see the position so far from "
            f"their answer, and the weight that attention puts there. Queries of an empty bucket: {empty}.",
            _table(("layer", "source", *offsets), rows),
            "\nWhere attention looks: percent of the weight of queries of a kind on keys of each kind.",
            _table(("layer", "query", *kinds), looks),
            "\nAccuracy of the same weights in other forms, and on larger tables.",
            _table(
                ("form", "accuracy"),
                [[name, f"{100 * x:.1f}%"] for name, x in parts.items()],
            ),
            _table(
                ("table", "positions", "token ids never trained", "accuracy"),
                [
                    [
                        f"{x['n_context']} x {x['n_key']}",
                        f"{x['positions']:,}",
                        x["never_trained"],
                        f"{100 * x['accuracy']:.1f}%",
                    ]
                    for x in result["larger"]
                ],
            ),
        ]
    )


def ladder(root: pathlib.Path) -> str | None:
    """All small experiments: what was predicted, what came."""
    rows = []
    for path in sorted((root / results.FOLDER / "ladder").glob("*.json")):
        result = json.loads(path.read_text())
        accuracy = [100 * member["accuracy"] for member in result["members"]]
        curves = [member["curve"] for member in result["members"]]
        last = [_mean(curves, f"recall/any/{source}") for source in (_HASHED, _SELECTED)]
        seen = [layer["seen"] for member in result["members"] for layer in member.get("buckets", [])]
        rows.append(
            [
                f"[`{path.stem}`]({pathlib.Path('..') / path.relative_to(root)})",
                f"{result['step'][-1]:,}",
                len(accuracy),
                f"{statistics.fmean(accuracy):.1f}% ({min(accuracy):.1f} to {max(accuracy):.1f})",
                *("" if x is None else f"{100 * x:.1f}%" for x in last),
                f"{statistics.fmean(seen):.1f}" if seen else "",
                result["prediction"],
            ]
        )
    names = (
        "experiment",
        "steps",
        "seeds",
        "accuracy",
        "recall, hashing",
        "recall, selection",
        "keys in a query's bucket",
        "predicted",
    )
    return _table(names, rows) if rows else None


def precision(root: pathlib.Path) -> str | None:
    """Runs of the full model, all with one seed and `_STEPS` steps, by routing, precision and rate."""
    kinds = ("routing", "precision")
    rows = []
    paths = [path for folder in _PRECISION_FOLDERS for path in sorted((root / results.FOLDER).glob(folder))]
    for path in paths:
        result = json.loads(path.read_text())
        model = result["config"]["model"]
        whole = (model["arch"], model["sparse_arch"]) == ("mamba2", f"{_HASHED}+{_SELECTED}")
        # A cell of a table holds its runs; elsewhere a file is a run.
        for run in result.get("runs", [result]):
            seed = run["seed"] if "seed" in run else result["config"]["seed"]
            if whole and result["steps"] == _STEPS and seed == 0:
                link = f"[`{path.stem}`]({pathlib.Path('..') / path.relative_to(root)})"
                valid = run["curve"]["valid"]
                early = [f"{100 * x:.1f}%" for x in results.thinned(valid["accuracy"], 5)[:-1]]
                accuracy = f"{100 * run['test']['accuracy']:.1f}%"
                rate = run.get("learning_rate") or result["config"]["training"]["learning_rate"]
                rows.append([*(model[kind] for kind in kinds), rate, link, *early, accuracy])
                steps = results.thinned(valid["step"], 5)[:-1]
    if not rows:
        return None
    names = (*kinds, "rate", "run")
    return _table((*names, *(f"after {step:,}" for step in steps), f"test, {_STEPS:,}"), sorted(rows))


def _mean(curves: Iterable[dict[str, list[float]]], name: str) -> float | None:
    last = [curve[name][-1] for curve in curves if name in curve]
    return statistics.fmean(last) if last else None


def _runs(root: pathlib.Path) -> list[dict[str, Any]]:
    paths = sorted((root / results.FOLDER / results.TASK).glob("*.json"))
    return [result for path in paths if "recall" in (result := results.read(path))["test"]]


def _explained(root: pathlib.Path) -> list[dict[str, Any]]:
    paths = sorted((root / results.FOLDER / explain.FOLDER.name).glob("*.json"))
    return [results.read(path, explain.FIELDS) for path in paths]


def _joined(parts: Iterable[str]) -> str:
    return "\n".join(parts)


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(["", *(f"| {' | '.join(map(str, line))} |" for line in lines), ""])
