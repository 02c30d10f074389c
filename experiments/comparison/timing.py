"""The time of a training step of both frameworks, one after the other in one process on one GPU.

PyTorch takes a batch that lies on the device already; ours is the whole update of the training loop, which
makes its batches on the device. Each draws its own random numbers. A measurement is the median of several
rounds of steps that are queued one after the other, as in training, and waited for once.
"""

import concurrent.futures
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.step_program import StepProgram
from experiments.comparison.exchange import Exchange
from hax_jax.config import ConfigError, DataConfig, Experiment
from hax_jax.data import make_split
from hax_jax.training.environment import resolved_implementation

ROUNDS = 5
WARM_UP = 3
GIB = 2**30
# Positions of a row that several items share, as where results/benchmarks/step.json says 'packed'.
PACKED_ROW = 1280


@dataclasses.dataclass(frozen=True)
class Mode:
    """One bar: who computes what, how."""

    framework: str
    label: str
    experiment: Experiment


def modes(experiment: Experiment) -> tuple[Mode, ...]:
    """PyTorch as the original trains, the same of ours, our default, and that on packed rows."""
    model, data = experiment.model, experiment.data
    padded = dataclasses.replace(data, packing=0)
    packed = dataclasses.replace(data, packing=max(PACKED_ROW, data.padded_length - 1), order="even")
    half = dataclasses.replace(model, routing="parity", precision="bfloat16")
    default = dataclasses.replace(model, routing="causal", precision="default")
    return (
        Mode("torch", "PyTorch, bfloat16", dataclasses.replace(experiment, model=half, data=padded)),
        Mode("jax", "JAX, parity, bfloat16", dataclasses.replace(experiment, model=half, data=padded)),
        Mode("jax", "JAX, default", dataclasses.replace(experiment, model=default, data=padded)),
        Mode("jax", "JAX, default, packed", dataclasses.replace(experiment, model=default, data=packed)),
    )


def measure(
    experiment: Experiment, exchange: Exchange, num_steps: int, wait: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """Times every mode; a mode that fails gives its error instead of numbers, and the others go on.

    Args:
      experiment: the settings of the run.
      exchange: whose model, optimiser and first batch PyTorch uses.
      num_steps: least number of steps of a round.
      wait: called when everything of ours is compiled and nothing has been timed.

    Yields:
      One dict a mode: `framework`, `label`, `routing`, `precision`, `packing`, `order`, `implementation`,
      then `step_ms`, `peak_gib`, `tokens_per_s` (pads left out), `first_s` (building and compiling); or
      `error`.
    """
    tokens = experiment.training.batch_size * tokens_of_an_item(experiment.data)
    chosen = modes(experiment)
    # JAX compiles before anything is timed, all programs at once: compiling needs cores, not the GPU.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        ready = {mode: pool.submit(_compile, mode) for mode in chosen if mode.framework == "jax"}
        concurrent.futures.wait(ready.values())
    wait()
    for mode in chosen:
        model = mode.experiment.model
        row: dict[str, Any] = {
            "framework": mode.framework,
            "label": mode.label,
            "routing": model.routing,
            "precision": model.precision,
            "packing": mode.experiment.data.packing,
            "order": mode.experiment.data.order,
        }
        try:
            run = _torch_run(exchange) if mode.framework == "torch" else _jax_run(mode, *ready[mode].result())
            seconds = _time(run, num_steps)
            row |= run.notes | {
                "step_ms": round(1e3 * seconds, 4),
                "peak_gib": round(run.peak_bytes() / GIB, 3),
                "tokens_per_s": round(tokens / seconds),
            }
            del run
        except Exception as error:
            # Whatever a driver or a compiler raises, the other modes are still worth their time.
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        gc.collect()
        yield row


def tokens_of_an_item(data: DataConfig) -> float:
    """Mean number of an item's tokens that a model reads, over the table sizes."""
    split = make_split(dataclasses.replace(data, packing=0, train_source="stream"), "train")
    raw = next(split.iterator(data.num_pairs, repeat=True))
    return float(np.asarray(jax.jit(split.materialize)(raw).padding_mask).sum() / data.num_pairs)


@dataclasses.dataclass
class _Run:
    """Training steps ready to go: `start` queues `num_steps` of them, `wait` returns when all are done."""

    start: Callable[[], Any]
    num_steps: int
    wait: Callable[[], None]
    peak_bytes: Callable[[], int]
    notes: dict[str, Any]


def _time(run: _Run, num_steps: int) -> float:
    """Seconds of a step: the median of the rounds."""
    begin = time.perf_counter()
    for _ in range(WARM_UP):
        run.start()
    run.wait()
    run.notes["warm_up_s"] = round(time.perf_counter() - begin, 2)
    rounds, calls = [], -(-num_steps // run.num_steps)
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(calls):
            run.start()
        run.wait()
        rounds.append((time.perf_counter() - begin) / (calls * run.num_steps))
    run.notes["step_ms_of_rounds"] = [round(1e3 * x, 4) for x in rounds]
    return statistics.median(rounds)


def _compile(mode: Mode) -> tuple[StepProgram, float]:
    begin = time.perf_counter()
    program = StepProgram(mode.experiment)
    program.compile()
    program.start()
    return program, time.perf_counter() - begin


def _jax_run(mode: Mode, program: StepProgram, seconds: float) -> _Run:
    last: list[Any] = [None]

    def start() -> None:
        last[0] = program.dispatch()

    def wait() -> None:
        jax.block_until_ready(last[0])

    def peak() -> int:
        memory = program.compiled.memory_analysis()
        if memory is None:
            raise ConfigError("memory", "reported by the compiler", None, "leave the timing out")
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return needed - memory.alias_size_in_bytes

    notes = {
        "implementation": resolved_implementation(mode.experiment.model),
        "steps_per_dispatch": program.steps,
        "positions": program.positions,
        "first_s": round(seconds, 2),
    }
    return _Run(start, program.steps, wait, peak, notes)


def _torch_run(exchange: Exchange) -> _Run:
    from experiments.pytorch_baseline.speed import TimedStep, default_device

    begin = time.perf_counter()
    sequences, mask = exchange.arrays["sequences"][0], exchange.arrays["mask"][0].astype(bool)
    tokens = sequences[:, :-1]
    real = tokens != exchange.model.pad_token_id
    timed = TimedStep(exchange.meta, tokens, sequences[:, 1:], mask[:, :-1], real, default_device())
    notes = {
        "implementation": timed.used,
        "positions": tokens.size,
        "first_s": round(time.perf_counter() - begin, 2),
    }
    return _Run(timed.step, 1, timed.wait, timed.peak_bytes, notes)
