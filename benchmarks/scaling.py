"""The scaling benchmark: data-parallel training on 1, 2, 4, ... devices of one host.

Three kinds of measurements, by their ids:

    equality/PRECISION/N   the training command on N devices against one, at the same global batch
    resume/PRECISION/M-N   begun on M devices, from the middle on with N, against M throughout
    throughput/device/N    updates on N devices at a constant batch per device
    throughput/global/N    the same at a constant global batch

In float32, and in the config's own precision: a sum of gradients that differs in its last bit can move a
weight over a rounding boundary of bfloat16, and that is seen in the loss at once.

Every measurement is made in processes of its own, which see as many devices as they should use; this one
touches none. On simulated devices there is nothing to time.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.record import Record, is_wanted
from benchmarks.scaling_runs import Machine, Runs, first_other_decision, run_settings
from benchmarks.step_program import load
from hax_jax.config import ConfigError

CONFIG, STEPS = "mamba2_hax", 200
# Of a loss, in nats.
TOLERANCE = 1e-5
# What NCCL and XLA were told goes with the numbers.
_VARIABLES = ("NCCL_", "XLA_FLAGS")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run measures.

    Attributes:
      config: a name under configs/, with an argument after a colon or without.
      changes: settings FIELD=VALUE.
      steps: updates of the runs that are compared, a multiple of 4.
      counts: numbers of devices, ascending; the first is 1.
      only: parts of the ids that are wanted.
      seconds: after so many nothing new is begun.
      tiny: one layer and few rows, for tests.
    """

    config: str
    changes: tuple[str, ...]
    steps: int
    counts: tuple[int, ...]
    only: tuple[str, ...] = ()
    seconds: float = 540.0
    tiny: bool = False


def main(given: argparse.Namespace, folder: pathlib.Path) -> None:
    """The command `scaling`: finds the devices, checks what is asked for, then measures."""
    # This process compares files; the devices are for those that it starts.
    jax.config.update("jax_platforms", "cpu")
    machine = Machine(given.simulated, given.cache)
    about = machine.describe()
    steps = STEPS if given.steps is None else given.steps
    if steps < 4 or steps % 4:
        raise ConfigError("--steps", "a multiple of 4", steps, "such as 200")
    options = Options(
        given.configs or CONFIG,
        tuple(given.set),
        steps,
        _counts(given.devices, about["device"]["count"]),
        tuple(word for word in given.only.split(",") if word),
        given.seconds,
        given.tiny,
    )
    # Settings that cannot be used are answered before a device is busy.
    experiment = load(options.config, run_settings(options.changes, options.steps), options.tiny)
    if odd := [n for n in options.counts if experiment.training.batch_size % n]:
        size = experiment.training.batch_size
        raise ConfigError("--devices", f"numbers that divide the batch of {size}", odd, "choose others")
    name = "simulated" if given.simulated else about["device"]["kind"].lower().replace(" ", "_")
    out = given.out or folder / f"{name}.json"
    record = Record(out, "scaling", add=given.add, commit=given.commit, note=given.note, about=about)
    record.note(
        simulated=bool(given.simulated),
        environment={name: x for name, x in os.environ.items() if name.startswith(_VARIABLES)},
        config=options.config,
        changes=list(options.changes),
        tolerance=TOLERANCE,
    )
    run(record, options, machine)


def run(record: Record, options: Options, machine: Machine) -> None:
    """Measures until the time is up."""
    with tempfile.TemporaryDirectory() as temporary:
        left_out = []
        for identity, measure in _measurements(options, machine, pathlib.Path(temporary)).items():
            if options.only and not is_wanted(identity, options.only):
                continue
            if record.elapsed > options.seconds:
                left_out.append(identity)
                continue
            try:
                facts = measure()
            except Exception as error:
                # What cannot run must not end the others; what it says is its result.
                facts = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"}
            print(f"{record.elapsed:5.0f} s  {line(record.add(identity, **facts))}", flush=True)
    record.note(left_out=left_out)
    if left_out:
        print(f"left out, no time: {', '.join(left_out)}", flush=True)


def line(measured: dict[str, Any]) -> str:
    """A measurement for the terminal."""
    identity = measured["id"]
    if "error" in measured:
        return f"{identity}: {measured['error']}"
    if identity.startswith("throughput"):
        return (
            f"{identity}: batch {measured['batch_size']}, {1e3 * measured['time']['seconds']:.3f} ms a step, "
            f"{measured['tokens_per_s'] / 1e6:.2f}M tokens/s"
        )
    beyond = measured["first_step_beyond"]
    found = f"equal to {TOLERANCE:g} up to step {beyond - 1}" if beyond else "equal"
    decision = measured.get("decision")
    told = f"; first other decision: {decision}" if decision else ""
    return f"{identity}: {found}, largest difference of a loss {measured['loss']:.1e}{told}"


def _measurements(
    options: Options, machine: Machine, folder: pathlib.Path
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to measure, by id, in order."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    several = options.counts[1:]
    configured = load(options.config, options.changes, options.tiny)
    for precision in dict.fromkeys(("float32", configured.model.precision)) if several else ():
        changes = (*options.changes, f"model.precision={precision}")
        runs = Runs(machine, folder / precision, options.config, changes, options.steps, options.tiny)
        for count in several:
            found[f"equality/{precision}/{count}"] = functools.partial(_equality, runs, count)
        for count in dict.fromkeys((1, *several[-2:-1])):
            moved = functools.partial(_resume, runs, several[-1], count)
            found[f"resume/{precision}/{several[-1]}-{count}"] = moved
    if not machine.simulated:
        batch = configured.training.batch_size
        for count in options.counts:
            # On one device both are the same.
            sizes = {"device": batch * count, "global": batch} if count > 1 else {"device": batch}
            for per, size in sizes.items():
                changes = (*options.changes, f"training.batch_size={size}")
                found[f"throughput/{per}/{count}"] = functools.partial(
                    machine.measure, count, options.config, changes, options.tiny
                )
    return found


def _equality(runs: Runs, count: int) -> dict[str, Any]:
    """A run on `count` devices against that on one; where they part, the first other decision."""
    found = runs.difference(runs.on(1), runs.on(count), TOLERANCE)
    beyond, decision = found["first_step_beyond"], None
    if beyond is not None:
        decision = first_other_decision(runs.decisions(1, beyond), runs.decisions(count, beyond))
    return {"devices": count, "steps": runs.steps, **found, "decision": decision}


def _resume(runs: Runs, first: int, then: int) -> dict[str, Any]:
    """A run that changes its devices in the middle, against the one that did not."""
    found = runs.difference(runs.on(first), runs.moved(first, then), TOLERANCE)
    return {"devices": [first, then], "steps": runs.steps, "moved_at": runs.steps // 2, **found}


def _counts(given: str, available: int) -> tuple[int, ...]:
    """The numbers of devices to use: as asked for, or 1, 2, 4, 8 as far as there are so many."""
    if not given:
        return tuple(n for n in (1, 2, 4, 8) if n <= available)
    try:
        counts = tuple(sorted({1, *(int(word) for word in given.split(","))}))
    except ValueError as error:
        raise ConfigError("--devices", "numbers, as in 1,2,4", given, str(error)) from error
    if counts[0] < 1 or counts[-1] > available:
        raise ConfigError("--devices", f"numbers from 1 to the {available} there are", given, "ask for fewer")
    return counts
