"""Writes what a finished run measured to a small JSON file that is committed.

    python experiments/export_result.py runs/mamba2_hax [--out=results/joint_recall/mamba2_hax.json]

Figures and the table of the README are drawn from that file, never from a run's folder. The command, the
commit, the device and the versions are those that the run recorded in its run.json. For a run without that
file they are given: --command, --commit (by default the checkout's), --device, --versions. What is not known
is left out.

Exit status: 0 done, 2 bad input, said in one line.
"""

import dataclasses
import pathlib
import re
import statistics
import sys
from collections.abc import Sequence
from typing import Any

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from flax import nnx

from experiments import results
from hax_jax.config import ConfigError, Experiment
from hax_jax.models import build_model
from hax_jax.training.environment import commit, git, read_sessions, resolved_implementation
from hax_jax.training.files import plain, write_atomically
from hax_jax.training.metrics import read_metrics
from hax_jax.training.population import MEMBERS
from hax_jax.training.restore import check_single
from hax_jax.training.workdir import RunFolder, RunResult, read_config

MOST_POINTS = 200
MOST_BYTES = 60_000
# In the order in which a result names them.
_WHERE = (
    "command",
    "commit",
    "uncommitted_changes",
    "note",
    "device",
    "platform",
    "versions",
    "implementation",
    "earlier_sessions",
)
# What a run's sessions may differ in without being measured differently.
_OWN_TO_A_SESSION = ("started", "seconds", "command")


@dataclasses.dataclass(frozen=True)
class Given:
    """What is said of a run that did not record it: the options of the command line of the same names."""

    command: str | None = None
    commit: str | None = None
    device: str | None = None
    device_count: int = 1
    versions: str | None = None
    wall_seconds: float | None = None
    note: str | None = None


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    try:
        options = _parser().parse_args(argv[1:])
        said = {field.name: getattr(options, field.name) for field in dataclasses.fields(Given)}
        result = collect(options.workdir, Given(**said))
        out = options.out or results.CHECKOUT / results.FOLDER / results.TASK / f"{result['name']}.json"
        write(result, out, options.replace)
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"result: {out}")
    return 0


def _parser() -> results.Parser:
    parser = results.Parser(__doc__)
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR", help="folder of a finished run")
    parser.add_argument("--out", type=pathlib.Path, help="default results/joint_recall/NAME.json")
    parser.add_argument("--command", help="the command that made the run")
    parser.add_argument("--commit", help="the commit of its code")
    parser.add_argument("--device", help="the kind of its devices, such as 'NVIDIA H200'")
    parser.add_argument("--device_count", type=int, default=1, help="how many they were; default 1")
    parser.add_argument("--versions", help="NAME=VERSION,NAME=VERSION,...")
    parser.add_argument("--wall_seconds", type=float, help="the time of the whole run")
    parser.add_argument("--note", help="what else a reader has to know")
    parser.add_argument("--replace", action="store_true", help="overwrite the result of another run")
    return parser


def collect(workdir: pathlib.Path, said: Given | None = None) -> dict[str, Any]:
    """The result of the run in `workdir`; raises ConfigError where something is missing or contradicts.

    Accuracies are in [0, 1], losses in nats. `curve.train` holds means since the log step before; of log
    steps and of validations there are at most `MOST_POINTS` each. `seconds.training` leaves out compilation,
    evaluation and checkpoints.
    """
    config = read_config(workdir)
    experiment = Experiment.from_dict(config["experiment"])
    if config.get("module"):
        raise ConfigError(
            "workdir",
            "a run whose model its settings describe",
            str(workdir),
            f"its model is a module {config['module']} of its own",
        )
    check_single(experiment, workdir)
    done = RunFolder(workdir, experiment).result()
    if done is None or done.stopped != "finished":
        raise ConfigError("workdir", "a finished run", str(workdir), "its own command goes on with it")
    entries: dict[str, list[dict]] = {kind: [] for kind in ("train", "valid", "test")}
    for entry in read_metrics(workdir):
        entries.get(entry["kind"], []).append(entry)
    try:
        _check_consistent(entries, done, workdir)
        measured = _measured(entries, done)
        measured["test"] |= _recall(entries["test"][-1])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "workdir",
            "a run whose metrics.jsonl and result.json are whole",
            str(workdir),
            f"{type(error).__name__}: {error}; restore those files",
        ) from error
    sessions = read_sessions(workdir / "run.json")
    said = said or Given()
    where = _where(sessions, said, experiment)
    measured["seconds"]["wall"] = said.wall_seconds or wall_seconds(sessions) or _of_population(workdir)
    shapes = nnx.eval_shape(lambda: build_model(experiment.model, rngs=nnx.Rngs(0)))
    num_parameters = sum(x.size for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
    return {
        "format_version": results.FORMAT_VERSION,
        "task": results.TASK,
        "name": experiment.name,
        **where,
        "num_parameters": num_parameters,
        **measured,
        "config": config["experiment"],
        "curve": _curves(entries),
    }


def write(result: dict[str, Any], out: pathlib.Path, replace: bool = False) -> None:
    """Writes a result as a whole or not at all.

    Raises:
      ConfigError: the file holds the result of another run and `replace` is false, it cannot be written, or
        the result is too large to be committed.
    """
    text = results.to_text(plain(result)) + "\n"
    if len(text) > MOST_BYTES:
        raise ConfigError("result", f"at most {MOST_BYTES} bytes", len(text), "validate less often")
    if out.exists() and not replace:
        there = results.read(out)
        if any(there.get(field) != plain(result)[field] for field in ("config", "test", "curve")):
            raise ConfigError(
                "--out",
                "a new file, or one of this same run",
                str(out),
                "it holds the result of another run; give --replace or another --out",
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text.encode())
    except OSError as error:
        raise ConfigError("--out", "a file that can be written", str(out), str(error.strerror)) from error


def _check_consistent(entries: dict[str, list[dict]], done: RunResult, workdir: pathlib.Path) -> None:
    """Refuses metrics that are of another run than the result, or cut off."""
    accuracy = {entry["step"]: entry["accuracy"] for entry in entries["valid"]}
    tests = [entry["accuracy"] for entry in entries["test"]]
    if (
        not entries["train"]
        or entries["train"][-1]["step"] != done.steps
        or accuracy.get(done.best_step) != done.best_valid_accuracy
        or tests != [done.test_accuracy]
    ):
        raise ConfigError(
            "workdir",
            "a run whose metrics.jsonl belongs to its result.json",
            str(workdir),
            "its last step, best validation or test accuracy differ; restore those files",
        )


def _measured(entries: dict[str, list[dict]], done: RunResult) -> dict[str, Any]:
    if done.best_valid_accuracy is None or done.test_accuracy is None or done.test_loss is None:
        raise ValueError("a score is missing")
    timed = [entry for entry in entries["train"] if entry.get("steps_per_s")]
    speed = {
        name: float(f"{statistics.median(entry[name] for entry in timed):.4g}")
        for name in ("steps_per_s", "positions_per_s", "tokens_per_s")
        if timed
    }
    steps = [0, *(entry["step"] for entry in entries["train"])]
    rates = [entry.get("steps_per_s") or speed["steps_per_s"] for entry in entries["train"]]
    training = sum((b - a) / rate for a, b, rate in zip(steps[:-1], steps[1:], rates, strict=True))
    table = dict(done.test_by_size or {})
    table["accuracy"] = [_rounded(row, 4) for row in table["accuracy"]]
    return {
        "steps": done.steps,
        "best_step": done.best_step,
        "best_valid_accuracy": round(done.best_valid_accuracy, 6),
        "test": {
            "accuracy": round(done.test_accuracy, 6),
            "loss": round(done.test_loss, 6),
            "num_items": sum(map(sum, table["num_items"])),
            "by_size": table,
        },
        "speed": speed,
        "seconds": {
            "training": round(training, 1),
            "validation": round(sum(entry["seconds"] for entry in entries["valid"]), 1),
        },
    }


def _curves(entries: dict[str, list[dict]]) -> dict[str, Any]:
    """Columns by kind. Every n-th line stays, counted from the last: at most `MOST_POINTS` of each kind."""
    chosen = {kind: results.thinned(entries[kind], MOST_POINTS) for kind in ("train", "valid")}
    seen = _recall(entries["valid"][-1]).get("recall", ())
    quantities = {"train": ("loss", "gate_loss", "accuracy"), "valid": ("loss", "accuracy", *seen)}
    return {
        kind: {"step": [entry["step"] for entry in lines]}
        | {name: _rounded([entry[name] for entry in lines], 5) for name in quantities[kind]}
        for kind, lines in chosen.items()
    }


def _recall(entry: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What a line of metrics says of source recall, as the field `recall`; nothing of models without it."""
    found = {name: round(x, 5) for name, x in entry.items() if name.startswith(("recall/", "reach/"))}
    return {"recall": found} if found else {}


def _rounded(values: list[float | None], digits: int) -> list[float | None]:
    return [None if value is None else round(value, digits) for value in values]


def _where(sessions: list[dict[str, Any]], said: Given, experiment: Experiment) -> dict[str, Any]:
    """Command, commit, device, versions: as the last session recorded them, or as given."""
    given = _given(said)
    if sessions:
        known = {name: value for name, value in sessions[-1].items() if value is not None}
        known |= _earlier(sessions)
    else:
        known = {"implementation": resolved_implementation(experiment.model)}
        known |= {} if "commit" in given else {k: v for k, v in commit().items() if v is not None}
    for name, value in given.items():
        if name in known:
            raise ConfigError(f"--{name}", "left out where the run recorded it", value, "see its run.json")
    found = {"versions": {}, **known, **given}
    for name in ("command", "commit", "device"):
        if name not in found:
            raise ConfigError(name, "recorded in the run's run.json, or given", None, f"give --{name}")
    found["command"] = results.without_places(found["command"])
    return {name: found[name] for name in _WHERE if name in found}


def _given(said: Given) -> dict[str, Any]:
    """What is said of the run; only what it does say."""
    device = None if said.device is None else {"kind": said.device, "count": said.device_count}
    values = {
        "command": said.command,
        "commit": full_commit(said.commit),
        "device": device,
        "versions": _versions(said.versions),
        "note": said.note,
    }
    return {name: value for name, value in values.items() if value is not None}


def _earlier(sessions: list[dict[str, Any]]) -> dict[str, Any]:
    """What the sessions before the last had other than it, where it is more than their times."""
    last = sessions[-1]
    differing = [
        {name: value for name, value in session.items() if value != last.get(name) and name != "first_step"}
        for session in sessions[:-1]
    ]
    told = any(set(session).difference(_OWN_TO_A_SESSION) for session in differing)
    return {"earlier_sessions": differing} if told else {}


def full_commit(given: str | None) -> str | None:
    """A commit that is given, in full where git knows it; raises ConfigError where it cannot be one."""
    if given is None:
        return None
    if not re.fullmatch("[0-9a-f]{7,40}", given):
        raise ConfigError("--commit", "7 to 40 hexadecimal digits", given, "as `git log` shows them")
    return git("rev-parse", "--verify", "--quiet", f"{given}^{{commit}}") or given


def _versions(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name.strip() and version.strip() for name, _, version in pairs):
        raise ConfigError("--versions", "NAME=VERSION,NAME=VERSION,...", text, "for example jax=0.11.2")
    return {name.strip(): version.strip() for name, _, version in pairs}


def _of_population(workdir: pathlib.Path) -> float | None:
    """The time of the population that a run was a member of; the member's own record ends before that."""
    together = workdir.resolve().parent
    return wall_seconds(read_sessions(together.parent / "run.json")) if together.name == MEMBERS else None


def wall_seconds(sessions: list[dict[str, Any]]) -> float | None:
    """The time of all sessions of a run; None where one was killed."""
    times = [session["seconds"] for session in sessions if session.get("seconds") is not None]
    return round(sum(times), 1) if times and len(times) == len(sessions) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv))
