"""One session of a run in a process of its own, which can be told at what moment to die.

    python tests/faults/session.py FORM ORDER     # one session, as the JSON object ORDER says
    python tests/faults/session.py FORM           # a session for each line of standard input, each in a fork

The second imports everything once, so that a trial costs no imports. An order has `workdir`; `phases`, the
file in which the session notes what it is doing; and at most one of:

- `record`: a file for what an undisturbed run does, to compare with (`Recorder`);
- `in_phase`: [phase, n, seconds]: SIGKILL that long after the n-th beginning of the phase;
- `at_call`: [name, n, when]: SIGKILL 'before' or 'after' the n-th call of that function of `os`;
- `torn`: [n, fraction]: SIGKILL when that part of the n-th line of metrics has been written.
"""

import contextlib
import json
import mmap
import os
import pathlib
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from hax_jax.training import checkpoints, evaluate, metrics, progress
from tests.faults.forms import FORMS
from tests.faults.runs import digest_of

PHASES = ("start", "steps", "evaluation", "checkpoint", "metrics")
# What a file system is asked to do by Python; what TensorStore does in C++ is met by `in_phase`.
CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
# Where a phase begins. Checkpoints are copied in the main thread and written in another.
SEAMS = {
    (evaluate.Evaluator, "__call__"): "evaluation",
    (checkpoints.Checkpoints, "save"): "checkpoint",
    (checkpoints.Checkpoints, "_write"): "checkpoint",
    (metrics.MetricsWriter, "write"): "metrics",
    (metrics.MetricsWriter, "flush"): "metrics",
}


def die() -> None:
    """As `kill -9` from outside: nothing of Python's or the C++ libraries' runs any more."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class Phases:
    """What the session is doing, in memory that outlives it: for each phase a byte that counts threads."""

    def __init__(self, path: str, order: dict[str, Any]):
        with open(path, "r+b") as file:
            self._shared = mmap.mmap(file.fileno(), len(PHASES))
        self._aim = order.get("in_phase")
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self._shared[PHASES.index("start")] = 1

    def begin_steps(self) -> None:
        """The first step is done, so everything is compiled."""
        self._shared[PHASES.index("start")] = 0
        self._shared[PHASES.index("steps")] = 1
        self._begun("steps")

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        index, begin = PHASES.index(phase), time.perf_counter()
        self._shared[index] += 1
        self._begun(phase)
        try:
            yield
        finally:
            self._shared[index] -= 1
            self.seconds[phase] += time.perf_counter() - begin

    def _begun(self, phase: str) -> None:
        self.counts[phase] += 1
        if self._aim is not None and self._aim[:2] == [phase, self.counts[phase]]:
            timer = threading.Timer(self._aim[2], die)
            timer.daemon = True
            timer.start()


class Recorder:
    """Writes what an undisturbed run does: phases, calls and seconds to aim at, digests to compare with."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    def saw(self, kept: checkpoints.Checkpoints, step: int, tree: Any, meta: Any) -> None:
        name = f"{kept.folder.parent.name}/{kept.folder.name}/{step}"
        self.digests[name] = digest_of(checkpoints.host_arrays(tree), meta)

    def write(self, path: str, phases: Phases, calls: Counter[str], seconds: float) -> None:
        content = {
            "digests": self.digests,
            "phases": phases.counts,
            "seconds_in": {name: phases.seconds[name] / count for name, count in phases.counts.items()},
            "calls": calls,
            "seconds": seconds,
        }
        pathlib.Path(path).write_text(json.dumps(content))


def run(form: str, order: dict[str, Any]) -> None:
    """Trains as the form says, and dies as the order says."""
    phases, recorder, calls = Phases(order["phases"], order), Recorder(), Counter()
    _watch_phases(phases, recorder if "record" in order else None)
    _watch_calls(calls, order.get("at_call"))
    if "torn" in order:
        _tear_metrics(*order["torn"])
    begin = time.perf_counter()
    result = FORMS[form].train(pathlib.Path(order["workdir"]))
    if "record" in order:
        recorder.write(order["record"], phases, calls, time.perf_counter() - begin)
    print(result.stopped)


def _watch_phases(phases: Phases, recorder: Recorder | None) -> None:
    for (kind, name), phase in SEAMS.items():
        setattr(kind, name, _in_phase(getattr(kind, name), phases, phase))
    save, started = checkpoints.Checkpoints.save, progress.Progress.started

    def recorded_save(self, step, tree, meta):
        if recorder is not None:
            recorder.saw(self, step, tree, meta)
        save(self, step, tree, meta)

    def noted_started(self, step):
        phases.begin_steps()
        return started(self, step)

    checkpoints.Checkpoints.save = recorded_save
    progress.Progress.started = noted_started


def _in_phase(function: Callable[..., Any], phases: Phases, phase: str) -> Callable[..., Any]:
    def watched(*arguments: Any, **keywords: Any) -> Any:
        with phases.within(phase):
            return function(*arguments, **keywords)

    return watched


def _watch_calls(calls: Counter[str], aim: Any) -> None:
    for name in CALLS:
        setattr(os, name, _counted(name, getattr(os, name), calls, aim))


def _counted(name: str, function: Callable[..., Any], calls: Counter[str], aim: Any) -> Callable[..., Any]:
    def watched(*arguments: Any, **keywords: Any) -> Any:
        calls[name] += 1
        aimed = aim is not None and aim[:2] == [name, calls[name]]
        if aimed and aim[2] == "before":
            die()
        result = function(*arguments, **keywords)
        if aimed:
            die()
        return result

    return watched


def _tear_metrics(nth: int, fraction: float) -> None:
    opened = metrics.MetricsWriter.__init__
    lines = Counter()

    class Torn:
        def __init__(self, file: Any):
            self._file = file

        def write(self, line: bytes) -> None:
            lines["written"] += 1
            if lines["written"] == nth:
                os.write(self._file.fileno(), line[: int(fraction * len(line))])
                die()
            self._file.write(line)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    def torn_init(self, *arguments, **keywords):
        opened(self, *arguments, **keywords)
        self._file = Torn(self._file)

    metrics.MetricsWriter.__init__ = torn_init


def _serve(form: str) -> None:
    """A fork for each order: prints its process id, then its exit status as `os.waitpid` has it."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                log = os.open(json.loads(line)["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                status = _status_of(form, line)
            sys.stdout.flush()
            os._exit(status)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


def _status_of(form: str, order: str) -> int:
    try:
        run(form, json.loads(order))
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(_status_of(sys.argv[1], sys.argv[2]))
    _serve(sys.argv[1])
