"""What results/scaling/*.json says, for README.md and docs/scaling.md."""

import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.record import read
from experiments.results import FOLDER, commit_of


def section(root: pathlib.Path, *, simulated: bool, up: str = "") -> str | None:
    """Every file's numbers, of simulated devices or of real ones; None where there are none.

    Args:
      root: the checkout.
      simulated: which of the two.
      up: the way to the checkout's root from the page's folder, such as '../'.
    """
    parts = []
    for path in sorted((root / FOLDER / "scaling").glob("*.json")):
        content = read(path, "scaling")
        if content["sessions"][-1]["simulated"] == simulated:
            parts += _of_file(content, f"{up}{path.relative_to(root).as_posix()}")
    return "\n".join(["", *parts, ""]) if parts else None


def _of_file(content: dict[str, Any], link: str) -> list[str]:
    sessions = [content["sessions"][n] for n in sorted({m["session"] for m in content["measurements"]})]
    last = sessions[-1]
    what = "simulated on a CPU: equality only, nothing to time" if last["simulated"] else "of one host"
    device = f"{last['device']['count']} x {last['device']['kind']}, {what}"
    lines = [f"`{last['config']}`, {device} ([JSON]({link})):", ""]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for measured in content["measurements"]:
        by_kind.setdefault(measured["id"].split("/")[0], []).append(measured)
    tolerance = last["tolerance"]
    lines += [_agreement(m, tolerance) for kind in ("equality", "resume") for m in by_kind.get(kind, ())]
    lines += _throughput(by_kind.get("throughput", []))
    versions = last["versions"]
    known = ", ".join(f"{name} {versions[name]}" for name in ("jax", "python", "cuda") if name in versions)
    commands = dict.fromkeys(f"`{s['command']}`, {commit_of(s)}" for s in sessions)
    return [*lines, "", f"{'; '.join(commands)}; {known}.", ""]


def _agreement(measured: dict[str, Any], tolerance: float) -> str:
    """How one run compares with that of one device, as an item of a list."""
    _, precision, where = measured["id"].split("/")
    if "error" in measured:
        return f"- {precision}, {where}: {measured['error']}"
    if "moved_at" in measured:
        first, then = measured["devices"]
        who = f"{first} devices until step {measured['moved_at']}, then {then}, against {first} throughout"
    else:
        who = f"{measured['devices']} devices against one"
    beyond, steps = measured["first_step_beyond"], measured["steps"]
    if beyond == 1:
        said = (
            f"the losses differ by more than {tolerance:g} from step 1 on, by at most {measured['loss']:.1e}"
        )
    else:
        until = f"all {steps} losses" if beyond is None else f"the losses up to step {beyond - 1} of {steps}"
        later = "" if beyond is None else f" (later {measured['loss']:.1e})"
        said = f"{until} within {tolerance:g}, largest difference {measured['before']:.1e}{later}"
    if beyond is not None and "moved_at" not in measured:
        said += f"; {_decision(measured['decision'])}"
    return f"- {precision}, {who}: {said}."


def _decision(decision: dict[str, Any] | None) -> str:
    if decision is None:
        return "every decision up to there is the same, so it is rounding"
    place = f"row {decision['row']}, position {decision['position']}"
    kind = decision["kind"].replace("_", " ")
    return f"first other decision: step {decision['step']}, layer {decision['layer']}, {kind} at {place}"


def _throughput(measured: Sequence[dict[str, Any]]) -> list[str]:
    """A table of tokens a second against perfect scaling."""
    found = {(m["id"].split("/")[1], m["devices"]): m for m in measured if "time" in m}
    failed = [f"- {m['id']}: {m['error']}" for m in measured if "error" in m]
    one = found.get(("device", 1))
    if one is None:
        return ["", *failed] if failed else []
    lines = [
        "",
        "| GPUs | batch | ms a step | tokens/s | of perfect scaling |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (_, count), m in found.items():
        share = m["tokens_per_s"] / one["tokens_per_s"] / count
        cells = [
            str(count),
            f"{m['batch_size']:,}",
            f"{1e3 * m['time']['seconds']:.3g}",
            f"{m['tokens_per_s'] / 1e6:.2f}M",
            f"{100 * share:.0f}%",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *(["", *failed] if failed else [])]
