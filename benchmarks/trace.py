"""What a device did and when, from the trace that `jax.profiler` writes beside its protocol buffer."""

import dataclasses
import gzip
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax

_HOLDERS = ("while", "call", "conditional")


@dataclasses.dataclass(frozen=True)
class Event:
    """One kernel or copy on the device (on a CPU: one operation of a compiled program).

    Attributes:
      name: of the kernel.
      op: name of the HLO instruction, where the profiler knows it; inside a command buffer it does not.
      start, seconds: when it began on the device's clock, and how long it took.
      is_copy: a copy or a fill rather than a kernel.
    """

    name: str
    op: str | None
    start: float
    seconds: float
    is_copy: bool


def capture(run: Callable[[], Any]) -> list[Event]:
    """The device's events while `run()` is executed; `run` waits for its own work."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        files = sorted(pathlib.Path(folder).rglob("*.trace.json.gz"))
        return read(files[-1]) if files else []


def read(path: pathlib.Path) -> list[Event]:
    """The device's events of a trace file, in order of time."""
    content = json.loads(gzip.decompress(path.read_bytes()))
    processes, threads = _names(content["traceEvents"])
    gpus = {pid for pid, name in processes.items() if name.startswith("/device:GPU")}
    # Lines other than streams repeat the same time under the names of operations and modules.
    streams = {line for line, name in threads.items() if line[0] in gpus and name.startswith("Stream")}
    events = []
    for event in content["traceEvents"]:
        if event.get("ph") != "X":
            continue
        arguments = event.get("args", {})
        if gpus:
            is_ours = (event["pid"], event["tid"]) in streams
        else:
            # What only holds other operations would count their time once more.
            is_ours = "hlo_op" in arguments and not arguments["hlo_op"].startswith(_HOLDERS)
        if is_ours:
            is_copy = event["name"].lower().startswith(("memcpy", "memset"))
            op = arguments.get("hlo_op")
            events.append(Event(event["name"], op, event["ts"] * 1e-6, event.get("dur", 0) * 1e-6, is_copy))
    return sorted(events, key=lambda event: event.start)


def summary(events: Sequence[Event], calls: int) -> dict[str, Any]:
    """Kernels and copies a call, seconds busy a call, and the share of the traced time that was busy."""
    busy, span = busy_seconds(events), 0.0
    if events:
        span = max(event.start + event.seconds for event in events) - events[0].start
    return {
        "kernels_per_call": sum(not event.is_copy for event in events) / calls,
        "copies_per_call": sum(event.is_copy for event in events) / calls,
        "busy_seconds_per_call": busy / calls,
        "busy_share": busy / span if span else None,
        "calls": calls,
    }


def busy_seconds(events: Sequence[Event]) -> float:
    """Time during which at least one event was under way; `events` in order of time."""
    busy, end = 0.0, float("-inf")
    for event in events:
        stop = event.start + event.seconds
        busy += max(stop - max(event.start, end), 0.0)
        end = max(end, stop)
    return busy


def _names(events: Sequence[dict[str, Any]]) -> tuple[dict[Any, str], dict[Any, str]]:
    processes, threads = {}, {}
    for event in events:
        if event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    return processes, threads
