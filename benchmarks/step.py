"""The step benchmark: what an update of each row of Table 3 costs, where its time goes, against its floor."""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import ceilings, compile_ahead, floors, memory, parts, specs, timing, trace
from benchmarks.record import Record
from benchmarks.step_program import NO_GRAPHS, StepProgram, load
from hax_jax.config import ConfigError
from hax_jax.training.environment import resolved_implementation

_TRACED_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run measures.

    Attributes:
      configs: names under configs/, in order.
      changes: settings FIELD=VALUE, the same for all.
      label: stands before every id, such as 'before'.
      steps: updates in a sample.
      breakdown: configs whose breakdown by part is made without CUDA graphs, which costs a compilation.
      seconds: after so many nothing new is begun.
      tiny: one layer and few rows, for tests.
      cache: folder of compiled programs; with one, each config is measured in a process of its own.
      plan: how each is timed.
    """

    configs: tuple[str, ...]
    changes: tuple[str, ...] = ()
    label: str = ""
    steps: int = 50
    breakdown: tuple[str, ...] = ()
    seconds: float = 540.0
    tiny: bool = False
    cache: pathlib.Path | None = None
    plan: timing.Plan = dataclasses.field(default_factory=timing.Plan)


def main(given: argparse.Namespace, plan: timing.Plan, record: Callable[[], Record], started: float) -> None:
    """The command `step`: checks what is asked for, compiles ahead if wanted, then measures."""
    names = _words(given.configs) or specs.STEP_CONFIGS
    breakdown = _words(given.breakdown)
    if strange := [name for name in breakdown if name not in names]:
        expected = "configs that are measured"
        raise ConfigError("--breakdown", expected, ",".join(strange), "add them to --configs")
    changes, tiny = tuple(given.set), given.tiny
    for name in names:
        load(name, changes, tiny)
    if given.cache is not None:
        compile_ahead.use_cache(given.cache)
        # The device is shared with the processes that compile and measure.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if given.compile_only:
        print(json.dumps(_compile_only(names, changes, breakdown, tiny)), flush=True)
        return
    ahead: dict[str, Any] = {}
    if given.workers:
        if given.cache is None:
            raise ConfigError("--workers", "given with --cache=DIR", given.workers, "name a folder")
        deadline = started + 0.6 * given.seconds
        ahead = compile_ahead.run(names, breakdown, _child_arguments(given), given.workers, deadline)
        # What is not in the cache now would take the time that the others need.
        names = tuple(name for name in names if name in ahead)
    options = Options(
        names, changes, given.label, given.steps, breakdown, given.seconds, tiny, given.cache, plan
    )
    run(record(), options, ahead, time.perf_counter() - started)


def run(record: Record, options: Options, ahead: dict[str, Any] | None = None, spent: float = 0.0) -> None:
    """Measures the ceilings and each config until the time is up; `spent` seconds are gone already."""
    record.note(seconds_before=spent, ceilings=ceilings.measure(options.tiny), memory_limit=memory.limit())
    left_out = []
    for name in options.configs:
        if spent + record.elapsed > options.seconds:
            left_out.append(name)
            continue
        identity = "/".join(word for word in (options.label, name, *options.changes) if word)
        facts: dict[str, Any] = {"config": name, "changes": list(options.changes), "label": options.label}
        try:
            limits = record.session["ceilings"]
            if options.cache is None:
                facts |= _measure(name, options, limits)
            else:
                facts |= _measure_apart(name, options, limits, options.cache)
            if ahead and name in ahead:
                facts["first_step"]["without_cache"] = ahead[name]
        except Exception as error:
            # A config that cannot run must not end the run; what it says is its result.
            facts["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{record.elapsed:5.0f} s  {line(record.add(identity, **facts))}", flush=True)
    record.note(left_out=left_out)
    if left_out:
        print(f"left out, no time: {', '.join(left_out)}", flush=True)


def line(measured: dict[str, Any]) -> str:
    """A measurement for the terminal."""
    if "error" in measured:
        return f"{measured['id']}: {measured['error']}"
    step, traced, peak = measured["time"], measured["trace"], measured["memory"]["program"]["peak"]
    floor = measured["floor"]["total"]["seconds"]
    return (
        f"{measured['id']}: {1e3 * step['seconds']:.3f} ms a step (spread {100 * step['spread']:.1f}%, floor "
        f"{1e3 * floor:.3f}), {measured['tokens_per_s'] / 1e6:.2f}M tokens/s, "
        f"{peak / 2**30:.2f} GiB, {traced['kernels_per_call']:.0f} kernels, busy "
        f"{100 * (traced['busy_share'] or 0):.0f}%, first step {measured['first_step']['total']:.1f} s"
    )


def _measure_apart(
    name: str, options: Options, limits: dict[str, Any], cache: pathlib.Path
) -> dict[str, Any]:
    """As `_measure`, in a new process.

    JAX numbers the kernels of a process, and the numbers are part of what a compiled program is found by:
    what another process compiled first is found only where it comes first.
    """
    use_cache = functools.partial(compile_ahead.use_cache, cache)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, use_cache) as pool:
        return pool.submit(_measure, name, options, limits).result()


def _measure(name: str, options: Options, limits: dict[str, Any]) -> dict[str, Any]:
    """Everything about one config."""
    experiment = load(name, options.changes, options.tiny)
    caches = compile_ahead.CacheCounts()
    program = StepProgram(experiment)
    program.compile()
    program.start()
    first = {**program.seconds, "total": sum(program.seconds.values()), **caches.counts()}
    timed, tokens = _time(program, options)
    work = floors.step(experiment, program.positions, program.num_parameters)
    real = floors.total(floors.step(experiment, tokens, program.num_parameters))
    facts = {
        "implementation": resolved_implementation(experiment.model),
        "steps_per_dispatch": program.steps,
        "members": program.members,
        "positions": program.positions,
        "tokens": tokens,
        "time": timed,
        "tokens_per_s": tokens / timed["seconds"],
        "positions_per_s": program.positions / timed["seconds"],
        "memory": {"program": memory.of_program(program.compiled), "device": memory.of_device()},
        "first_step": first,
        "floor": {
            "total": floors.total(work).report(limits),
            "without_pads": real.report(limits),
            "parts": {part: amount.report(limits) for part, amount in work.items()},
        },
        **_traces(program, parts.of_program(program.compiled.as_text())),
    }
    if name in options.breakdown:
        slow = StepProgram(experiment)
        slow.compile(NO_GRAPHS)
        slow.start()
        facts["breakdown"] = _traces(slow, parts.of_program(slow.compiled.as_text()))["breakdown"]
        facts["breakdown"]["command_buffers"] = False
    return facts


def _time(program: StepProgram, options: Options) -> tuple[dict[str, Any], float]:
    """Seconds a step, and real tokens a step, over samples of about `steps` updates."""
    dispatches = max(-(-options.steps // program.steps), 1)
    tokens: list[float] = []

    def sample() -> float:
        begin = time.perf_counter()
        for _ in range(dispatches):
            metrics = program.dispatch()
        jax.block_until_ready(metrics)
        seconds = (time.perf_counter() - begin) / (dispatches * program.steps)
        # A mean since the last log step: it does not matter which steps it is over.
        tokens.append(float(np.sum(metrics["tokens"])))
        return seconds

    plan = options.plan
    estimate = sample() * dispatches * program.steps
    samples = min(max(int(plan.seconds / (plan.repeats * estimate)), 1), plan.samples)
    repeats = [[sample() for _ in range(samples)] for _ in range(plan.repeats)]
    steps = dispatches * program.steps
    return {**timing.summary(repeats), "steps": steps}, sum(tokens) / len(tokens)


def _traces(program: StepProgram, by_instruction: dict[str, str]) -> dict[str, Any]:
    """What the profiler saw of some steps: numbers a step, time by part, the longest kernels."""
    dispatches = max(_TRACED_STEPS // program.steps, 1)

    def calls():
        for _ in range(dispatches):
            metrics = program.dispatch()
        jax.block_until_ready(metrics)

    events = trace.capture(calls)
    steps = dispatches * program.steps
    return {
        "trace": trace.summary(events, steps),
        "breakdown": {
            "command_buffers": True,
            **parts.breakdown(events, by_instruction, steps),
            "longest": parts.longest(events, steps),
        },
    }


def _compile_only(
    names: tuple[str, ...], changes: tuple[str, ...], breakdown: tuple[str, ...], tiny: bool
) -> dict[str, dict[str, float]]:
    """Fills the cache; seconds of each config's phases."""
    seconds = {}
    for name in names:
        program = StepProgram(load(name, changes, tiny))
        program.compile()
        program.start()
        seconds[name] = {**program.seconds, "total": sum(program.seconds.values())}
        if name in breakdown:
            program.compile(NO_GRAPHS)
    return seconds


def _child_arguments(given: argparse.Namespace) -> list[str]:
    """The command of a process that compiles, but for what it compiles."""
    script = pathlib.Path(__file__).with_name("run.py")
    changes = [f"--set={change}" for change in given.set]
    tiny = ["--tiny"] if given.tiny else []
    return [sys.executable, str(script), "step", "--compile_only", f"--cache={given.cache}", *changes, *tiny]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)
