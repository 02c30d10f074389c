"""The README's table 'Against PyTorch', made from the committed comparisons."""

import pathlib
from typing import Any

from experiments import results
from experiments.comparison import report

COLUMNS = (
    "config",
    "steps",
    "loss differs by at most",
    "first other decision",
    "PyTorch",
    "JAX, parity",
    "JAX, default",
    "default, packed rows",
    "peak memory",
)
_KINDS = {
    "query_code": "hash code of a query",
    "key_code": "hash code of a key",
    "lifetime": "selected key",
    "ranking": "ranking of the gate loss",
}


_Kind = tuple[str, str, bool]
# Framework, routing and whether rows are packed, in the order of the columns.
_BARS: tuple[_Kind, ...] = (
    ("torch", "parity", False),
    ("jax", "parity", False),
    ("jax", "causal", False),
    ("jax", "causal", True),
)


def section(root: pathlib.Path) -> str | None:
    """The table of all comparisons, then where each was made, or None; raises ConfigError over a bad file."""
    paths = sorted((root / report.FOLDER).glob("*.json"))
    found = [(path.relative_to(root), report.read(path)) for path in paths]
    if not found:
        return None
    # The timed ones first, each group by name.
    found.sort(key=lambda item: not report.speed_rows(item[1]))
    lines = ["", _row(COLUMNS), _row(["---"] * len(COLUMNS))]
    lines += [_row(_cells(path, result)) for path, result in found]
    lines.append("")
    for path, result in found:
        lines += [*_details(path, result, root), ""]
    return "\n".join(lines)


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(path: pathlib.Path, result: dict[str, Any]) -> list[str]:
    curves = result["curves"]
    first = curves["first_difference"]
    decision = "none"
    if first is not None:
        near = "" if first["margin"] is None else f", {first['margin']:.0e} from its boundary"
        decision = f"step {first['step']}: {_KINDS[first['kind']]}{near}"
    rows = {_kind(row): row for row in report.speed_rows(result)}
    times = [_time(rows, kind) for kind in _BARS]
    memory = " / ".join(f"{rows[kind]['peak_gib']:.2f}" if kind in rows else "-" for kind in _BARS)
    return [
        f"[`{path.stem}`]({path.as_posix()})",
        str(curves["steps"]),
        _largest(curves),
        decision,
        *times,
        f"{memory} GiB" if rows else "",
    ]


def _largest(curves: dict[str, Any]) -> str:
    """The largest difference of a loss, before the first other decision and in all."""
    overall = f"{curves['largest_difference']['loss']:.1e}"
    first = curves["first_difference"]
    if first is None:
        return overall
    before = f"{curves['largest_difference_before']['loss']:.1e}, " if first["step"] else ""
    return f"{before}then {overall}"


def _kind(row: dict[str, Any]) -> _Kind:
    return row["framework"], row["routing"], bool(row["packing"])


def _time(rows: dict[_Kind, dict[str, Any]], kind: _Kind) -> str:
    """The time of a step, and how many times faster than PyTorch that is."""
    if kind not in rows:
        return ""
    text, torch = f"{rows[kind]['step_ms']:.2f} ms", rows.get(_BARS[0])
    if kind[0] == "torch" or torch is None:
        return text
    return f"{text} ({torch['step_ms'] / rows[kind]['step_ms']:.1f}x)"


def _details(path: pathlib.Path, result: dict[str, Any], root: pathlib.Path) -> list[str]:
    versions, device = result["versions"], result["device"]
    told = [
        result["origin"],
        f"{device['count']} x {device['kind']}",
        *(f"{name} {versions[name]}" for name in ("jax", "torch") if name in versions),
        results.commit_of(result),
    ]
    used = [row["implementation"] for row in report.speed_rows(result) if row["framework"] == "torch"]
    kernels = f" PyTorch's kernels: {'; '.join(_kernels(used[0]))}." if used else ""
    failed = [row for row in result["timing"] or () if "error" in row]
    errors = "".join(f" {row['label']} could not be timed: {row['error']}." for row in failed)
    figure = path.with_suffix(".svg")
    shown = f" [Figure]({figure.as_posix()})." if (root / figure).exists() else ""
    return [f"`{path.stem}`: {', '.join(told)}; `{result['command']}`.{kernels}{errors}{shown}"]


def _kernels(used: dict[str, str]) -> list[str]:
    """Which operations each form serves."""
    by_form: dict[str, list[str]] = {}
    for operation, form in used.items():
        by_form.setdefault(form, []).append(operation)
    return [f"{', '.join(operations)} by {form}" for form, operations in by_form.items()]
