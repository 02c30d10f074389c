"""Processes that compile one thing each, several at a time, wait, and measure it when it is their turn.

XLA tries its kernels out on the device while it compiles, so nothing may be timed meanwhile; and one
program keeps one core busy for most of its compilation, so several at once take little longer than one. The
process that compiled a program also times it: a new one would have to import, trace and load it once more.
"""

import collections
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

# Of a name: compiles, and returns what measures when it is called with what the parent says at its turn.
Prepare = Callable[[str], Callable[[Any], dict[str, Any]]]


class Children:
    """One process for each name; a context that ends all that are left when it is left.

    Args:
      prepare: what a process calls with its name. It is pickled, so it stands at the top of a module. It may
        use the device, what it returns is called only when the process may time.
      gpus: numbers of the GPUs, dealt out to the processes in turn as the only one that each sees. Of none
        given, all processes share what this process was shown.
    """

    def __init__(self, prepare: Prepare, gpus: Sequence[str] = ()):
        self._prepare, self._gpus = prepare, gpus or (None,)
        self._begun: list[_Child] = []
        self._ready: list[_Child] = []
        self._failed: dict[str, str] = {}
        self._logs = tempfile.TemporaryDirectory()

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: Any) -> None:
        for child in self._begun:
            child.stop()
        self._logs.cleanup()

    def compile(self, names: Sequence[str], workers: int, deadline: float) -> None:
        """Has each name prepared, and says of each how that went.

        Args:
          names: in the order in which they are begun, and later measured.
          workers: processes that prepare at a time; those that are done wait beside them.
          deadline: on `time.perf_counter`; what is not done then is stopped and never measured.
        """
        waiting = collections.deque(zip(names, itertools.cycle(self._gpus), strict=False))
        compiling: list[_Child] = []
        while (waiting or compiling) and (left := deadline - time.perf_counter()) > 0:
            while waiting and len(compiling) < workers:
                compiling.append(self._begin(*waiting.popleft()))
            for child in _heard(compiling, left):
                compiling.remove(child)
                answer = child.answer()
                if "error" in answer:
                    self._failed[child.name] = answer["error"]
                    print(f"compiling {child.name} failed: {answer['error']}", flush=True)
                else:
                    self._ready.append(child)
                    print(f"compiled {child.name} in {time.perf_counter() - child.begun:.0f} s", flush=True)
        for child in compiling:
            child.stop()
        if late := [*(child.name for child in compiling), *(name for name, _ in waiting)]:
            print(f"not compiled in time: {', '.join(late)}", flush=True)
        self._ready.sort(key=lambda child: names.index(child.name))

    def measure(self, told: Any, in_time: Callable[[], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Lets the processes measure, in order, one at a time on each GPU.

        Args:
          told: what each is told at its turn.
          in_time: asked before each turn; once it says no, the rest has none.

        Yields:
          Each name with the facts that its process reported, as soon as it has, and the `gpu` where they were
          dealt out. Of one that failed, also while it compiled, an `error` says why.
        """
        for name, error in self._failed.items():
            yield name, {"error": error}
        waiting, timing = list(self._ready), list[_Child]()
        while True:
            for child in list(waiting):
                is_free = child.gpu not in [other.gpu for other in timing]
                if is_free and in_time():
                    waiting.remove(child)
                    child.tell(told)
                    timing.append(child)
            if not timing:
                return
            for child in _heard(timing):
                facts = child.answer()
                # The next one may not begin before the device is free of this one.
                child.stop()
                timing.remove(child)
                yield child.name, facts if child.gpu is None else {**facts, "gpu": child.gpu}

    def _begin(self, name: str, gpu: str | None) -> "_Child":
        """A new process that prepares `name`."""
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        log = pathlib.Path(self._logs.name) / str(len(self._begun))
        log.touch()
        process = spawn.Process(target=_live, args=(theirs, gpu, log), daemon=True)
        process.start()
        # Without another copy of that end, the pipe closes when the process ends.
        theirs.close()
        child = _Child(name, gpu, process, ours, log, time.perf_counter())
        self._begun.append(child)
        child.tell((self._prepare, name))
        return child


@dataclasses.dataclass
class _Child:
    """A process, with the GPU that it sees (None: as this one), and the file of all that it prints."""

    name: str
    gpu: str | None
    process: Any
    connection: Connection
    log: pathlib.Path
    begun: float

    def tell(self, message: Any) -> None:
        """Sends a message; of a process that is dead `answer` will say so."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(message)

    def answer(self) -> dict[str, Any]:
        """The next that it reports; of a dead one as `error` how it ended and what it printed last."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            printed = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            return {"error": f"ended with exit status {self.process.exitcode}: {' / '.join(printed)}"}

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.join()


def in_words(error: Exception) -> str:
    """What an error says, short enough for a record."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _heard(children: Sequence[_Child], seconds: float | None = None) -> list[_Child]:
    """Those that have reported something or are dead, once there are any; none after so many seconds."""
    heard = wait([child.connection for child in children], seconds)
    return [child for child in children if child.connection in heard]


def _live(connection: Connection, gpu: str | None, log: pathlib.Path) -> None:
    """All that a process does: it prepares, reports, waits, measures and reports."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        # JAX is imported here, by what is unpickled: its GPU has been chosen before.
        prepare, name = connection.recv()
        measure = prepare(name)
        connection.send({})
        connection.send(measure(connection.recv()))
    except Exception as error:
        connection.send({"error": in_words(error)})


def _end_with_parent() -> None:
    """Ends this process when its parent is dead, even one that was killed: nothing else would."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
