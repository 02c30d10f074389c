"""The step benchmark: what an update of each row of Table 3 costs, where its time goes, against its floor."""

import argparse
import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import ceilings, floors, memory, parts, specs, timing, trace
from benchmarks.record import Record
from benchmarks.step_children import Children, in_words
from benchmarks.step_program import StepProgram, load
from hax_jax.config import ConfigError, Experiment
from hax_jax.training.compilation import Compilations
from hax_jax.training.environment import resolved_implementation

# Of the time there is, the share after which nothing is compiled any more.
_COMPILING = 0.6
_TRACED_STEPS = 20
# From the ceilings, and whether there is time for another config, to their names and facts.
_Measure = Callable[[dict[str, Any], Callable[[], bool]], Iterator[tuple[str, dict[str, Any]]]]


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
      cache: folder of compiled programs, None for none.
      workers: processes that compile at a time, one for each config; 0 measures all in this process.
      gpus: numbers of GPUs, dealt out to the processes in turn; none for those that this process sees.
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
    workers: int = 0
    gpus: tuple[str, ...] = ()
    plan: timing.Plan = dataclasses.field(default_factory=timing.Plan)


def main(given: argparse.Namespace, plan: timing.Plan, record: Callable[[], Record], started: float) -> None:
    """The command `step`: checks what is asked for, then measures, or with --compile_only only compiles."""
    names = _words(given.configs) or specs.STEP_CONFIGS
    breakdown, gpus = _words(given.breakdown), _words(given.gpus)
    if strange := [name for name in breakdown if name not in names]:
        expected = "configs that are measured"
        raise ConfigError("--breakdown", expected, ",".join(strange), "add them to --configs")
    if given.compile_only and given.cache is None:
        raise ConfigError("--compile_only", "given with --cache=DIR", True, "name a folder")
    # JAX numbers the kernels of a process, and the numbers are part of what a compiled program is found by:
    # in one process, only the first config would find what another run has compiled.
    workers = given.workers or int(given.cache is not None)
    if gpus and not workers:
        raise ConfigError("--gpus", "given with --workers=N", given.gpus, "say how many compile at a time")
    if len(set(gpus)) < len(gpus):
        raise ConfigError("--gpus", "different GPUs", given.gpus, "name each once")
    options = Options(
        names,
        changes=tuple(given.set),
        label=given.label,
        steps=given.steps,
        breakdown=breakdown,
        seconds=given.seconds,
        tiny=given.tiny,
        cache=given.cache,
        workers=workers,
        gpus=gpus,
        plan=plan,
    )
    for name in names:
        load(name, options.changes, options.tiny)
    if given.compile_only:
        with _children(options) as children:
            children.compile(names, workers, started + options.seconds)
    else:
        run(record, options, started)


def run(record: Callable[[], Record], options: Options, started: float) -> None:
    """Measures the ceilings and each config until the time is up.

    Args:
      record: makes the record, which is when this process takes hold of the device.
      options: what is measured.
      started: when the time began, on `time.perf_counter`.
    """
    was_empty = options.cache is not None and not (options.cache.exists() and any(options.cache.iterdir()))
    left_out = list(options.configs)
    with _compiled(options, started) as measure:
        out, spent = record(), time.perf_counter() - started
        # While no other process compiles or measures.
        out.note(seconds_before=spent, ceilings=ceilings.measure(options.tiny), memory_limit=memory.limit())
        in_time = lambda: time.perf_counter() - started <= options.seconds  # noqa: E731
        for name, found in measure(out.session["ceilings"], in_time):
            left_out.remove(name)
            if was_empty and "error" not in found:
                _note_uncached(found["first_step"])
            identity = "/".join(word for word in (options.label, name, *options.changes) if word)
            facts = {"config": name, "changes": list(options.changes), "label": options.label, **found}
            print(f"{out.elapsed:5.0f} s  {line(out.add(identity, **facts))}", flush=True)
    out.note(left_out=left_out)
    if left_out:
        print(f"left out, no time: {', '.join(left_out)}", flush=True)


@contextlib.contextmanager
def _compiled(options: Options, started: float) -> Iterator[_Measure]:
    """What measures the configs; with workers, all that they run is compiled first, in their processes."""
    if not options.workers:
        yield functools.partial(_in_this_process, options)
        return
    with _children(options) as children:
        children.compile(options.configs, options.workers, started + _COMPILING * options.seconds)
        yield children.measure


def _in_this_process(
    options: Options, limits: dict[str, Any], in_time: Callable[[], bool]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compiles and measures one config after the other."""
    for name in options.configs:
        if not in_time():
            return
        try:
            facts = prepare(options, name)(limits)
        except Exception as error:
            # A config that cannot run must not end the run; what it says is its result.
            facts = {"error": in_words(error)}
        yield name, facts


def _children(options: Options) -> Children:
    """The processes that compile and measure, none of which has begun."""
    # They share the device with this one: none may take most of its memory for itself.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if options.gpus:
        # This process measures the ceilings, on the first.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(options.gpus)
    return Children(functools.partial(prepare, options), options.gpus)


def _note_uncached(first: dict[str, Any]) -> None:
    """Adds `without_cache` where no program was found in a folder that began empty.

    Another config that compiles the same program may have put it there meanwhile.
    """
    if not first["cache_hits"]:
        first["without_cache"] = {name: x for name, x in first.items() if not name.startswith("cache_")}


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


def prepare(options: Options, name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Compiles all that the measurement of a config runs, and runs none of it.

    Returns:
      What measures the config when it is given the ceilings: everything that is recorded of it.
    """
    if options.cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(options.cache.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    experiment = load(name, options.changes, options.tiny)
    compilations = Compilations()
    program = StepProgram(experiment)
    program.compile()
    program.compile_state()
    seen = compilations.so_far()
    cache = {what: seen[what] for what in ("cache_hits", "cache_misses")}
    slow = program.without_graphs() if name in options.breakdown else None
    return lambda limits: _measure(experiment, program, slow, cache, options, limits)


def _measure(
    experiment: Experiment,
    program: StepProgram,
    slow: StepProgram | None,
    cache: dict[str, int],
    options: Options,
    limits: dict[str, Any],
) -> dict[str, Any]:
    """Everything about one config, from its first state on."""
    program.start()
    first = {**program.seconds, "total": sum(program.seconds.values()), **cache}
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
    if slow is not None:
        slow.start()
        facts["breakdown"] = _traces(slow, parts.of_program(slow.compiled.as_text()))["breakdown"]
        facts["breakdown"]["command_buffers"] = False
    return facts


def _time(program: StepProgram, options: Options) -> tuple[dict[str, Any], float]:
    """Seconds a step, and real tokens a step, over samples of about `steps` updates."""
    # What is between two dispatches counts too.
    dispatches = max(-(-options.steps // program.steps), 3)
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


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)
