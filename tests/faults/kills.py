"""Trials of kill -9: a run is killed again and again, always started anew, and held to its bits.

A trial is one kill. After it the folder must hold nothing but what the undisturbed run leaves, and nothing
whole may be gone; when the run has got to its end everything must be equal, or all its trials have failed.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import Any

from tests.faults import session
from tests.faults.forms import FORMS, Form
from tests.faults.runs import Undisturbed
from tests.faults.tally import memory

ROOT = pathlib.Path(__file__).resolve().parents[2]
# After so many kills a run may come to its end, which takes a whole session.
_MOST_KILLS = 12
# Of the sessions that are to be killed; the others get their kill from outside at any time.
_AIMED = 0.7
# A session far longer than any other hangs.
_PATIENCE = 240.0


@dataclasses.dataclass
class Tally:
    """Counts of trials, to be added to those of other sessions of the harness."""

    trials: int = 0
    failures: int = 0
    runs: int = 0
    fresh_processes: int = 0
    in_phase: Counter[str] = dataclasses.field(default_factory=Counter)
    how: Counter[str] = dataclasses.field(default_factory=Counter)
    details: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def counts(self) -> dict[str, Any]:
        """As plain JSON."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return plain | {"in_phase": dict(self.in_phase), "how": dict(self.how)}


class Sessions:
    """Starts sessions of one form, forked from a process that has imported everything, or quite anew.

    Args:
      form: the name of a form.
      folder: for logs, compiled programs and the file in which a session notes its phase.
    """

    def __init__(self, form: str, folder: pathlib.Path, cache: pathlib.Path):
        self._form, self._folder = form, folder
        self.log, self._phases = folder / "log", folder / "phases"
        self._environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={FORMS[form].devices}",
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        self._server = self._start(form, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> "Sessions":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()

    def run(self, workdir: pathlib.Path, fresh: bool, kill_after: float | None = None, **order: Any) -> int:
        """One session; returns 0, or the number of the signal that ended it.

        Raises:
          RuntimeError: it ended in any other way; the message has the end of its log.
        """
        self._phases.write_bytes(bytes(len(session.PHASES)))
        order |= {"workdir": str(workdir), "phases": str(self._phases), "log": str(self.log)}
        self.log.write_bytes(b"")
        if fresh:
            with self.log.open("ab") as log:
                process = self._start(self._form, json.dumps(order), stdout=log, stderr=log)
            status = _ended(process, kill_after)
        else:
            status = self._fork(order, kill_after)
        if status not in (0, signal.SIGKILL):
            raise RuntimeError(f"a session ended with {status}: {self.log.read_text()[-3000:]}")
        return status

    def phase(self) -> str:
        """What the last session was doing when it ended; a write in a thread counts before anything else."""
        inside = self._phases.read_bytes()
        active = [name for name, count in zip(session.PHASES, inside, strict=True) if count]
        return active[-1] if active else "start"

    def _start(self, *arguments: str, **streams: Any) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "tests" / "faults" / "session.py"), *arguments]
        return subprocess.Popen(command, env=self._environment, cwd=ROOT, **streams)

    def _fork(self, order: dict[str, Any], kill_after: float | None) -> int:
        self._server.stdin.write(json.dumps(order).encode() + b"\n")
        self._server.stdin.flush()
        child = int(self._server.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            # Until the server has been read from again nobody else can have got this process id.
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        status = int(self._server.stdout.readline())
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _ended(process: subprocess.Popen, kill_after: float | None) -> int:
    try:
        code = process.wait(timeout=_PATIENCE if kill_after is None else kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    return -code if code < 0 else code


def undisturbed(form: Form, sessions: Sessions, folder: pathlib.Path) -> Undisturbed:
    """Runs a form to its end twice: with cold caches, then for the record."""
    sessions.run(folder / "warm", fresh=False)
    sessions.run(folder / "whole", fresh=False, record=str(folder / "record.json"))
    record = json.loads((folder / "record.json").read_text())
    reference = Undisturbed(folder / "whole", record, form.members)
    problems = list(reference.wrong_at_end(folder / "warm"))
    if problems:
        raise RuntimeError(f"two undisturbed runs differ: {problems}")
    return reference


def random_kill(generator: random.Random, record: dict[str, Any], left: float) -> dict[str, Any]:
    """An order that ends a session at a moment drawn at random; `left` is the share of the run to come."""
    if generator.random() > _AIMED:
        return {"kill_after": generator.uniform(0.0, (0.6 + 0.4 * left) * record["seconds"])}
    kind = generator.choice((*session.PHASES[1:], "call", "call", "torn"))
    # Early moments are drawn more often, so that a run is killed several times on its way.
    early = left * generator.random() ** 2
    if kind == "torn":
        nth = 1 + int(early * record["phases"]["metrics"] / 2)
        return {"torn": [nth, generator.random()]}
    if kind == "call":
        name = generator.choice([name for name in session.CALLS if record["calls"].get(name)])
        nth = 1 + int(early * record["calls"][name])
        return {"at_call": [name, nth, generator.choice(("before", "after"))]}
    nth = 1 + int(early * record["phases"][kind])
    seconds = record["seconds_in"][kind] if kind != "steps" else 0.4 * left * record["seconds"]
    return {"in_phase": [kind, nth, generator.uniform(0.0, 1.2 * seconds)]}


def try_form(
    name: str, trials: int, seed: int, seconds: float, fresh_share: float, cache: pathlib.Path
) -> Tally:
    """Kills runs of a form until so many trials are done or so many seconds have passed; at least one run."""
    tally, generator, begin = Tally(), random.Random(f"{name} {seed}"), time.monotonic()
    with tempfile.TemporaryDirectory(dir=memory()) as temporary:
        folder = pathlib.Path(temporary)
        with Sessions(name, folder, cache) as sessions:
            reference = undisturbed(FORMS[name], sessions, folder)
            while tally.trials < trials and (time.monotonic() - begin < seconds or not tally.runs):
                most = min(_MOST_KILLS, trials - tally.trials)
                _one_run(sessions, reference, folder, generator, most, fresh_share, tally)
    return tally


def _one_run(
    sessions: Sessions,
    reference: Undisturbed,
    folder: pathlib.Path,
    generator: random.Random,
    most: int,
    fresh_share: float,
    tally: Tally,
) -> None:
    """One run from its beginning to its end, killed at most so many times on the way."""
    workdir = pathlib.Path(tempfile.mkdtemp(dir=folder)) / "run"
    newest: dict[str, int] = {}
    orders, problems = [], []
    tally.runs += 1
    while True:
        left = 1.0 - max(newest.values(), default=0) / reference.num_steps
        order = random_kill(generator, reference.record, max(left, 0.05)) if len(orders) < most else {}
        fresh = generator.random() < fresh_share
        tally.fresh_processes += fresh
        try:
            status = sessions.run(workdir, fresh, **order)
        except RuntimeError as error:
            problems.append(str(error))
            break
        if status == 0:
            problems += reference.wrong_at_end(workdir)
            break
        orders.append(order)
        tally.in_phase[sessions.phase()] += 1
        tally.how["from outside" if "kill_after" in order else next(iter(order))] += 1
        problems += reference.wrong_after_kill(workdir, newest)
    tally.trials += len(orders)
    if problems:
        tally.failures += max(len(orders), 1)
        tally.details.append({"orders": orders, "problems": problems})
