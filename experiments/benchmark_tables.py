"""Tables of the committed benchmarks (results/benchmarks/*.json), and of the floors they are held against."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from flax import nnx

from benchmarks import floors, record
from benchmarks.step_program import load
from experiments import results
from hax_jax.config import Experiment
from hax_jax.models import build_model

FOLDER = results.FOLDER / "benchmarks"
_KINDS = {
    "one_bucket": "all keys in one bucket",
    "one_key": "one key that every query sees",
    "rising": "scores rising with position",
    "falling": "scores falling with position",
    "equal": "all scores equal",
}
CONTENDERS = {
    "mosaic_gpu": "HAX, Mosaic GPU",
    "xla": "HAX, XLA",
    "dense_tiles": "dense tiles, masked",
    "reference": "dense, masked",
    "cudnn": "cuDNN, causal",
}
# A rough rate to print floors beside, where nothing was measured: an H200's copy and bfloat16 matmul.
_H200 = {"copy_bytes_per_s": 4.26e12, "matmul_flops_per_s": 790e12}
_MEAN_LENGTH = 464


class Measured:
    """One benchmark file: measurements by id, sessions by number."""

    def __init__(self, path: pathlib.Path, suite: str):
        self.content = record.read(path, suite)
        self.by_id = {m["id"]: m for m in self.content["measurements"]}

    def seconds(self, identity: str) -> float | None:
        """Of a measurement, or None where it is missing or failed."""
        found = self.by_id.get(identity, {})
        return found["time"]["seconds"] if "time" in found else None

    def ratio(self, above: str, below: str) -> float | None:
        """Seconds of one measurement over another's of the same session."""
        numbers = self.seconds(above), self.seconds(below)
        if None in numbers or self.by_id[above]["session"] != self.by_id[below]["session"]:
            return None
        return numbers[0] / numbers[1]  # type: ignore[operator]

    def shapes(self) -> dict[str, Any]:
        """Every shape that a session named, by name."""
        found: dict[str, Any] = {}
        for session in self.content["sessions"]:
            found |= session.get("shapes", {})
        return found

    def circumstances(self) -> str:
        """Device, versions and command of the sessions whose measurements stand in the file."""
        used = sorted({m["session"] for m in self.content["measurements"]})
        sessions = [self.content["sessions"][number] for number in used]
        lines = []
        for session in sessions:
            limits = session.get("ceilings", {})
            rates = ""
            if limits:
                rates = (
                    f"; measured there: copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, bfloat16 matmul "
                    f"{limits['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s"
                )
            known = session["versions"]
            versions = ", ".join(f"{name} {known[name]}" for name in ("jax", "python") if name in known)
            note = f" {session['note']}" if session.get("note") else ""
            lines.append(
                f"{session['device']['kind']}, {results.commit_of(session)}, {versions}{rates}.{note}"
            )
        return "\n\n".join(dict.fromkeys(lines))


def section(root: pathlib.Path) -> str | None:
    """What stands in the README of the benchmarks under `root`; None where there are none."""
    parts = []
    for suite, table in (("attention", _attention), ("step", _step), ("scans", _scans)):
        path = root / FOLDER / f"{suite}.json"
        if path.exists():
            measured = Measured(path, suite)
            figure = FOLDER / f"{suite}.svg"
            shown = ["", f"![{suite}: seconds]({figure.as_posix()})"] if (root / figure).exists() else []
            source = f"`python benchmarks/run.py {suite}` ([JSON]({(FOLDER / path.name).as_posix()})): "
            parts += ["", *table(measured), *shown, "", source + measured.circumstances()]
    return "\n".join([*parts, ""]) if parts else None


def floor_section() -> str:
    """The least bytes and operations of a step by part: padded as the original runs, and without pads."""
    names = ("mamba2_hax", "mamba_hax", "mamba2_base")
    works, totals = {}, []
    for name in names:
        experiment = _experiment(name)
        rows = experiment.training.batch_size
        padded = rows * (experiment.data.padded_length - 1)
        parameters = _num_parameters(name)
        works[name] = floors.step(experiment, padded, parameters)
        packed = floors.total(floors.step(experiment, rows * _MEAN_LENGTH, parameters))
        totals.append((name, floors.total(works[name]), packed))
    # All parts of the three stand in the first.
    parts = sorted(works[names[0]], key=lambda part: -works[names[0]][part].bytes)
    lines = ["", _row(["part", *names]), _row(["---"] * (1 + len(names)))]
    for part in parts:
        cells = [_work(works[name][part]) if part in works[name] else "" for name in names]
        lines.append(_row([part.replace("_", " "), *cells]))
    lines.append(_row(["**all, padded**", *(f"**{_work(padded)}**" for _, padded, _ in totals)]))
    lines.append(_row(["floor, padded", *(_milliseconds(work) for _, work, _ in totals)]))
    lines.append(_row(["**all, packed**", *(f"**{_work(packed)}**" for _, _, packed in totals)]))
    lines.append(_row(["floor, packed", *(_milliseconds(packed) for _, _, packed in totals)]))
    return "\n".join([*lines, ""])


def breakdown_section(root: pathlib.Path) -> str | None:
    """Time by part of every config whose kernels were traced without CUDA graphs; None without any."""
    path = root / FOLDER / "step.json"
    if not path.exists():
        return None
    measured = Measured(path, "step")
    found = [
        m
        for m in measured.by_id.values()
        if "breakdown" in m and not m["breakdown"].get("command_buffers", True)
    ]
    lines: list[str] = []
    for m in found:
        parts, least = m["breakdown"]["parts"], m["floor"]["parts"]
        lines += ["", f"`{m['id']}`", "", _row(["part", "ms", "kernels", "floor ms"]), _row(["---"] * 4)]
        for part, cost in parts.items():
            floor = f"{1e3 * least[part]['seconds']:.4f}" if part in least else ""
            cells = [part.replace("_", " "), f"{1e3 * cost['seconds']:.4f}", f"{cost['kernels']:.0f}", floor]
            lines.append(_row(cells))
    return "\n".join([*lines, ""]) if found else None


def _num_parameters(name: str) -> int:
    """Trained numbers of a config's model."""
    shapes = nnx.eval_shape(lambda: build_model(_experiment(name).model, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))


def _attention(measured: Measured) -> list[str]:
    """Milliseconds of the whole module forward and backward by length, then the inputs made to hurt."""
    lengths = _in_order(m["shape"] for m in measured.by_id.values() if m["id"].endswith("/forward_backward"))
    shapes = measured.shapes()
    lengths.sort(key=lambda name: shapes[name]["length"])
    lengths = [name for name in lengths if not name.startswith("joint_recall")]
    ids = {who: {name: f"{name}/random/{who}/forward_backward" for name in lengths} for who in CONTENDERS}
    shown = [who for who in CONTENDERS if any(measured.seconds(i) for i in ids[who].values())]
    best = shown[0] if shown else "xla"
    names = (f"{CONTENDERS[who]}, ms" for who in shown)
    head = ["tokens", *names, "cuDNN / HAX", "peak GiB", "of the floor"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name in lengths:
        mine = measured.by_id.get(ids[best][name], {})
        peak = (mine.get("memory", {}).get("program") or {}).get("peak")
        lines.append(
            _row(
                [
                    name,
                    *(_ms(measured.seconds(ids[who][name])) for who in shown),
                    _times(measured.ratio(ids["cudnn"][name], ids[best][name])),
                    "" if peak is None else f"{peak / 2**30:.2f}",
                    f"{100 * mine['share_of_floor']:.0f}%" if "share_of_floor" in mine else "",
                ]
            )
        )
    return [
        "Sparse attention as a whole module (hashing, sorting, selection, attention), forward and backward, "
        "one head of 64, bfloat16, 32 + 32 keys:",
        "",
        *lines,
        *_hurting(measured, best, lengths),
        *_besides(measured, best),
    ]


def _hurting(measured: Measured, best: str, lengths: Sequence[str]) -> list[str]:
    rows = []
    for kind, text in _KINDS.items():
        ratios = {
            name: measured.ratio(*(f"{name}/{of}/{best}/forward_backward" for of in (kind, "random")))
            for name in lengths
        }
        rows.append((text, ratios))
    shown = [name for name in lengths if any(ratios[name] for _, ratios in rows)]
    if not shown:
        return []
    head = ["inputs made to hurt, time over random inputs'", *shown]
    return ["", _row(head), _row(["---"] * len(head))] + [
        _row([text, *(_times(ratios[name], 2) for name in shown)]) for text, ratios in rows
    ]


def _besides(measured: Measured, best: str) -> list[str]:
    """What else the attention benchmark says, a line each; nothing that was not measured."""
    lines = []
    ratio = measured.ratio(*(f"{name}/random/{best}/forward_backward" for name in ("1M", "64K")))
    if ratio is not None:
        lines.append(f"- Time per token at 1M: {ratio / 16:.2f} times that at 64K.")
    for layer, text in (("branch", "the HAX branch of width 64"), ("mamba2", "a Mamba-2 mixer with it")):
        found = measured.by_id.get(f"1M/random/{layer}/forward_backward", {})
        if "time" in found and found["memory"]["program"]:
            peak = found["memory"]["program"]["peak"] / 2**30
            lines.append(
                f"- 1M tokens forward and backward through {text}, training included: "
                f"{_ms(found['time']['seconds'])} ms, {peak:.2f} GiB."
            )
    times = {who: measured.seconds(f"joint_recall/random/{who}/forward_backward") for who in CONTENDERS}
    known = [f"{CONTENDERS[who]} {_ms(seconds)} ms" for who, seconds in times.items() if seconds is not None]
    if known:
        shape = "64 x 1,057 tokens (queries and keys of 32, values of 128)"
        lines.append(f"- The whole module at {shape}: {'; '.join(known)}.")
    return ["", *lines] if lines else []


def _step(measured: Measured) -> list[str]:
    """A table for every label with its settings, the latest first; a config is a row."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for m in measured.by_id.values():
        groups.setdefault((m["label"], *m["changes"]), []).append(m)
    sessions = measured.content["sessions"]
    lines = ["A training step, 64 items of joint recall, forward, backward and AdamW."]
    for (label, *changes), found in sorted(groups.items(), key=lambda x: -max(m["session"] for m in x[1])):
        settings = f" ({', '.join(f'`{change}`' for change in changes)})" if changes else ""
        commits = _in_order(results.commit_of(sessions[m["session"]]) for m in found)
        name = (label or "as configured").replace("_", " ")
        title = f"{name[0].upper()}{name[1:]}{settings}"
        lines += ["", f"{title}, {', '.join(commits)}:", "", *_steps_of_configs(found)]
    return lines


def _steps_of_configs(found: Sequence[dict[str, Any]]) -> list[str]:
    head = [
        "config",
        "ms a step",
        "floor",
        "tokens/s",
        "positions/s",
        "peak GiB",
        "kernels",
        "busy",
        "first step, s",
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for m in found:
        if "error" in m:
            lines.append(_row([f"`{m['config']}`", m["error"], *[""] * (len(head) - 2)]))
            continue
        program, traced, first = m["memory"]["program"], m["trace"], m["first_step"]
        cold = first.get("without_cache", {}).get("total")
        lines.append(
            _row(
                [
                    f"`{m['config']}`",
                    _ms(m["time"]["seconds"]),
                    _ms(m["floor"]["total"]["seconds"]),
                    f"{m['tokens_per_s'] / 1e6:.1f}M",
                    f"{m['positions_per_s'] / 1e6:.1f}M",
                    f"{program['peak'] / 2**30:.2f}" if program else "",
                    f"{traced['kernels_per_call']:.0f}",
                    f"{100 * traced['busy_share']:.0f}%" if traced["busy_share"] else "",
                    f"{first['total']:.1f}" + (f" ({cold:.0f} uncached)" if cold else ""),
                ]
            )
        )
    return lines


def _scans(measured: Measured) -> list[str]:
    names = _in_order(m["contender"] for m in measured.by_id.values() if "time" in m)
    rows = _in_order(f"{m['op']}/{m['shape']}" for m in measured.by_id.values())
    head = ["recurrence, ms forward + backward", *names]
    lines = [_row(head), _row(["---"] * len(head))]
    for row in rows:
        lines.append(_row([row, *(_ms(measured.seconds(f"{row}/{who}/forward_backward")) for who in names)]))
    return lines


def _experiment(name: str) -> Experiment:
    return load(name, ())


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    # Three digits, zeros at the end too.
    return f"{1e3 * seconds:#.3g}".removesuffix(".") if seconds < 0.9995 else f"{1e3 * seconds:,.0f}"


def _times(ratio: float | None, digits: int = 1) -> str:
    return "" if ratio is None else f"{ratio:.{digits}f}x"


def _work(work: floors.Work) -> str:
    return f"{work.bytes / 1e6:.0f} MB, {work.flops / 1e9:.1f} GFLOP"


def _milliseconds(work: floors.Work) -> str:
    return f"{1e3 * work.seconds(_H200):.2f} ms"
