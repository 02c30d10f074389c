"""Training the groups of a table: some processes at a time, the time left, and what goes wrong on the way."""

import collections
import dataclasses
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from experiments.table.cells import Group
from hax_jax.config import ConfigError
from hax_jax.training.files import make_folders
from hax_jax.training.progress import Console, duration

CHILD = pathlib.Path(__file__).with_name("child.py")
LOG, RESULT = "log.txt", "result.json"
INTERRUPTED = 143
_POLL_SECONDS = 0.2
# Of a process told to stop: it saves within a second or two, unless it is compiling; then nothing is lost.
_GRACE_SECONDS = 20.0
# The end of a file of metrics that holds its last line for certain.
_LAST_BYTES = 4096
# Share of a GPU's memory that processes which use it together divide among them.
_MEMORY = 0.9


@dataclasses.dataclass(frozen=True)
class Plan:
    """How groups are trained.

    Attributes:
      jobs: processes at a time.
      gpus: numbers of the GPUs that they take in turn; empty for all, for each of them.
      limit_seconds: when to stop them, counted from the making of this object.
      report_seconds: between two lines of progress.
    """

    jobs: int = 1
    gpus: tuple[str, ...] = ()
    limit_seconds: float = math.inf
    report_seconds: float = 30.0
    begin: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        return self.begin + self.limit_seconds - time.monotonic()


class Process:
    """A group's process, and how fast it gets on.

    Args:
      group: what it trains.
      environment: variables of its own.
    """

    def __init__(self, group: Group, environment: dict[str, str]):
        make_folders(group.folder)
        self.group, self.begin = group, time.monotonic()
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None
        self._step_before = last_step(group.folder)
        with (group.folder / LOG).open("ab") as log:
            self._popen = subprocess.Popen(
                [sys.executable, str(CHILD), *group.command],
                env={**os.environ, **environment},
                # It ends when the other end is closed: with this process, however that ends.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # A Ctrl-C reaches this process alone, which tells the others.
                start_new_session=True,
            )

    @property
    def step(self) -> int | None:
        """The last step that it has logged; None before it has logged one."""
        return self._last[0] if self._last else None

    def poll(self) -> int | None:
        """Its exit status, or None while it runs; looks how far it has got."""
        status = self._popen.poll()
        step = last_step(self.group.folder)
        # One that goes on drops lines beyond its checkpoint before it compiles.
        self._step_before = min(self._step_before, step)
        if step > (self._last[0] if self._last else self._step_before):
            self._last = step, time.monotonic()
            self._first = self._first or self._last
        return status

    @property
    def seconds_per_step(self) -> float | None:
        """Evaluations and checkpoints included, from the first log step on."""
        if self._first is None or self._last is None or self._last[0] <= self._first[0]:
            return None
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])

    @property
    def start_seconds(self) -> float | None:
        """From its beginning to its first log step, compilation included."""
        return self._first[1] - self.begin if self._first else None

    def stop(self) -> None:
        """Asks it to save and end."""
        self._popen.terminate()

    def end(self, seconds: float) -> None:
        """Waits for its end, and brings it about after so many seconds."""
        try:
            self._popen.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def close(self) -> None:
        """Lets go of it; it has ended, or ends at once."""
        if self._popen.stdin is not None:
            self._popen.stdin.close()
        self._popen.wait()

    def reason(self) -> str:
        """The last thing it said that looks like a reason."""
        with (self.group.folder / LOG).open("rb") as log:
            lines = _tail(log, 4 * _LAST_BYTES).decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        said = [line for line in lines if line.strip()]
        return (errors or said or ["it said nothing"])[-1]


class Estimate:
    """The time that is left for a table, from the groups that have been watched.

    Args:
      steps: that each group still has to take, by its folder.
    """

    def __init__(self, steps: dict[pathlib.Path, int]):
        self._steps = dict(steps)
        self._rates: dict[pathlib.Path, float] = {}
        self._starts: list[float] = []

    def watch(self, process: Process) -> None:
        """Takes in how far a process is, and how fast."""
        folder, group = process.group.folder, process.group
        if process.step is not None:
            self._steps[folder] = group.num_steps - process.step
        if process.seconds_per_step is not None:
            self._rates[folder] = process.seconds_per_step

    def ended(self, process: Process) -> None:
        """A process has ended, well or not: nothing of it is left."""
        self.watch(process)
        self._steps[process.group.folder] = 0
        if process.start_seconds is not None:
            self._starts.append(process.start_seconds)

    def seconds(self, running: Sequence[Process], jobs: int) -> float:
        """Seconds to the end; not a number before anything is known."""
        known = list(self._rates.values())
        if not any(self._steps.values()):
            return 0.0
        if not known:
            return math.nan
        starts = self._starts + [x.start_seconds for x in running if x.start_seconds is not None]
        begun = {process.group.folder for process in running}
        start = statistics.fmean(starts) if starts else 0.0
        times = [
            left * self._rates.get(folder, statistics.fmean(known)) + (0.0 if folder in begun else start)
            for folder, left in self._steps.items()
            if left
        ]
        return max(sum(times) / jobs, max(times))


class Training:
    """Trains groups, each in a process of its own; one that fails does not stop the others.

    Args:
      groups: in the order in which they are begun.
      plan: how.
      finished: called with each group that has finished; what it returns is printed. It may raise
        ConfigError, which makes the group one that failed.
      counts: what else a line of progress says.
      console: prints.

    Attributes:
      failures: the groups that failed, and why.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        plan: Plan,
        finished: Callable[[Group], str],
        counts: Callable[[], str],
        console: Console,
    ):
        self._plan, self._finished, self._counts, self._console = plan, finished, counts, console
        self._waiting = collections.deque(groups)
        self._slots: list[Process | None] = [None] * min(plan.jobs, len(groups))
        self._estimate = Estimate(
            {group.folder: group.num_steps - last_step(group.folder) for group in groups}
        )
        self._reported = time.monotonic()
        self.failures: list[tuple[Group, str]] = []

    def run(self, stop: Any) -> str | None:
        """Trains all groups; returns what stopped it before its end, or None.

        Args:
          stop: true once this process has been asked to stop, with the signal's `name`.
        """
        try:
            while self._waiting or self._running():
                if stop:
                    return stop.name
                if self._plan.seconds_left <= 0:
                    return "the limit"
                for slot, process in enumerate(self._slots):
                    if process is None and self._waiting:
                        self._slots[slot] = self._begin(self._waiting.popleft(), slot)
                    elif process is not None and (status := process.poll()) is not None:
                        self._slots[slot] = None
                        self._estimate.ended(process)
                        self._take(process, status)
                self._report()
                time.sleep(_POLL_SECONDS)
            return None
        finally:
            self._console.bar("")
            self._stop()

    def collect(self, group: Group) -> None:
        """Takes in a group that has finished."""
        try:
            self._console.line(self._finished(group))
        except ConfigError as error:
            self._fail(group, " ".join(str(error).split()))

    def _running(self) -> list[Process]:
        return [process for process in self._slots if process is not None]

    def _begin(self, group: Group, slot: int) -> Process | None:
        try:
            return Process(group, environment(slot, self._plan))
        except (OSError, ValueError) as error:
            self._fail(group, str(error))
            return None

    def _take(self, process: Process, status: int) -> None:
        """Deals with a process that has ended by itself."""
        process.close()
        if status == 0:
            self.collect(process.group)
        elif status == INTERRUPTED:
            self._fail(process.group, "stopped by a signal, all saved; the same command goes on")
        else:
            self._fail(process.group, f"exit status {status}: {process.reason()}")

    def _fail(self, group: Group, reason: str) -> None:
        self._console.line(f"{group.row} failed: {reason}")
        self.failures.append((group, reason))

    def _report(self) -> None:
        running = self._running()
        for process in running:
            self._estimate.watch(process)
        left = duration(self._estimate.seconds(running, len(self._slots)))
        steps = [
            f"{process.group.row} "
            + ("starting" if process.step is None else f"{process.step:,}/{process.group.num_steps:,}")
            for process in running
        ]
        text = f"{self._counts()}; {', '.join(steps)}; {left} left"
        self._console.bar(text)
        now = time.monotonic()
        if running and now - self._reported >= self._plan.report_seconds and not self._console.is_terminal:
            self._console.line(text)
            self._reported = now

    def _stop(self) -> None:
        """Has all processes that still run save and end."""
        left = self._running()
        for process in left:
            process.stop()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in left:
            process.end(deadline - time.monotonic())
            status = process.poll()
            process.close()
            # It may have ended by itself in the meantime: well, if the signal met its last moments, or not.
            if (process.group.folder / RESULT).exists():
                self.collect(process.group)
            elif status is not None and status > 0 and status != INTERRUPTED:
                self._take(process, status)


def environment(slot: int, plan: Plan) -> dict[str, str]:
    """Variables of the process in a slot: its GPU, and its share of the memory where several share one."""
    variables = {"PYTHONUNBUFFERED": "1"}
    if plan.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = plan.gpus[slot % len(plan.gpus)]
    sharing = -(-plan.jobs // max(len(plan.gpus), 1))
    if sharing > 1 and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{_MEMORY / sharing:.3f}"
    return variables


def last_step(folder: pathlib.Path) -> int:
    """The last step that a run has logged, 0 before the first."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            lines = _tail(file, _LAST_BYTES).splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            # The first may begin in the middle, the last may not be whole yet.
            continue
    return 0


def _tail(file: IO[bytes], size: int) -> bytes:
    file.seek(0, os.SEEK_END)
    file.seek(max(file.tell() - size, 0))
    return file.read()
