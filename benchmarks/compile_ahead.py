"""Compiling in other processes before anything is timed, through JAX's folder of compiled programs.

XLA tries its kernels out on the device while it compiles, so nothing may be timed meanwhile; and one
program keeps one core busy for most of its compilation, so several at once take little longer than one.
"""

import collections
import contextlib
import functools
import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any

import jax

_SEEN: collections.Counter[str] = collections.Counter()


def use_cache(folder: pathlib.Path) -> None:
    """Keeps every compiled program in `folder`, and takes it from there."""
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def run(
    names: Sequence[str], breakdown: Sequence[str], command: Sequence[str], workers: int, deadline: float
) -> dict[str, Any]:
    """Compiles each config in a process of its own, `workers` at a time.

    Args:
      names: configs, in the order in which they are begun.
      breakdown: those that are compiled twice.
      command: of a process, to which the config is added.
      workers: processes at a time.
      deadline: on `time.perf_counter`; what is not done then is stopped and left out.

    Returns:
      By config, the seconds of its phases, from an empty cache; only of those that were done.
    """
    # Several processes share the device: none may take most of its memory for itself.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    waiting = collections.deque(names)
    running: dict[str, tuple[subprocess.Popen, IO[str]]] = {}
    done: dict[str, Any] = {}
    with contextlib.ExitStack() as files:
        while (waiting or running) and time.perf_counter() < deadline:
            while waiting and len(running) < workers:
                name = waiting.popleft()
                twice = [f"--breakdown={name}"] if name in breakdown else []
                # A file, since a full pipe would stop the process.
                output: IO[str] = files.enter_context(tempfile.TemporaryFile("w+"))
                arguments = [*command, f"--configs={name}", *twice]
                process = subprocess.Popen(arguments, env=environment, stdout=output, stderr=output)
                running[name] = process, output
            for name, (process, said) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    said.seek(0)
                    _take(name, process.returncode, said.read().strip().splitlines(), done)
            time.sleep(0.2)
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    if late := [*running, *waiting]:
        print(f"not compiled in time: {', '.join(late)}", flush=True)
    return {name: done[name] for name in names if name in done}


def _take(name: str, status: int, output: Sequence[str], done: dict[str, Any]) -> None:
    """Adds what a finished process measured; one that failed says why and is left out."""
    measured = [line for line in output if line.startswith("{")]
    if status or not measured:
        print(f"compiling {name} failed (exit status {status}): {' / '.join(output[-3:])}", flush=True)
        return
    done[name] = json.loads(measured[-1])[name]
    print(f"compiled {name}: {done[name]['compile']:.1f} s", flush=True)


class CacheCounts:
    """Counts programs taken from JAX's folder of compiled programs, and those that were not there."""

    def __init__(self):
        _listen()
        self._before = _SEEN.copy()

    def counts(self) -> dict[str, int]:
        """Since this object was made."""
        events = {f"cache_{what}": f"/jax/compilation_cache/cache_{what}" for what in ("hits", "misses")}
        return {name: _SEEN[event] - self._before[event] for name, event in events.items()}


@functools.cache
def _listen() -> None:
    """Has JAX report its events; once, since a listener stays."""
    jax.monitoring.register_event_listener(lambda event, **_: _SEEN.update([event]))
