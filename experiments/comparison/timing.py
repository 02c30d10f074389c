"""The time of a training step of both frameworks, one after the other in one process on one GPU.

Each takes a batch that lies on the device already, and draws its own random numbers. A measurement is the
median of several rounds of steps that are queued one after the other, as in training, and waited for once;
ours are queued as many at a time as the training loop does.
"""

import concurrent.futures
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.comparison.exchange import Exchange
from hax_jax.config import ConfigError, Experiment, ModelConfig
from hax_jax.data import make_split
from hax_jax.data.batch import Batch
from hax_jax.training.dispatch import make_dispatch, steps_per_dispatch
from hax_jax.training.environment import resolved_implementation
from hax_jax.training.initialise import build
from hax_jax.training.optimizer import make_optimizer
from hax_jax.training.state import make_state, split_model
from hax_jax.training.step import make_train_step

ROUNDS = 5
WARM_UP = 3
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Mode:
    """One bar: who computes what, how."""

    framework: str
    label: str
    model: ModelConfig


def modes(experiment: Experiment) -> tuple[Mode, ...]:
    """PyTorch as the original trains, the same of ours, and our default."""
    half = dataclasses.replace(experiment.model, routing="parity", precision="bfloat16")
    default = dataclasses.replace(experiment.model, routing="causal", precision="default")
    return (
        Mode("torch", "PyTorch, bfloat16", half),
        Mode("jax", "JAX, parity, bfloat16", half),
        Mode("jax", "JAX, causal, default", default),
    )


def measure(experiment: Experiment, exchange: Exchange, num_steps: int) -> Iterator[dict[str, Any]]:
    """Times every mode; a mode that fails gives its error instead of numbers, and the others go on.

    Args:
      experiment: the settings of the run.
      exchange: whose model and optimiser PyTorch uses.
      num_steps: steps of a round.

    Yields:
      One dict a mode: `framework`, `label`, `routing`, `precision`, `implementation`, then `step_ms`,
      `peak_gib`, `positions_per_s`, `tokens_per_s`, `first_s` (building and compiling); or `error`.
    """
    batch = _batch(experiment)
    positions, tokens = batch.tokens.size, int(np.asarray(batch.padding_mask).sum())
    chosen = modes(experiment)
    # JAX compiles before anything is timed, all programs at once: compiling needs cores, not the GPU.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        ready = {
            mode: pool.submit(_prepare_jax, experiment, mode, batch)
            for mode in chosen
            if mode.framework == "jax"
        }
        concurrent.futures.wait(ready.values())
    for mode in chosen:
        row: dict[str, Any] = {
            "framework": mode.framework,
            "label": mode.label,
            "routing": mode.model.routing,
            "precision": mode.model.precision,
        }
        try:
            if mode.framework == "torch":
                run, more = _prepare_torch(exchange, batch)
            else:
                run, more = ready[mode].result()
            row |= more
            seconds = _time(run, num_steps)
            row |= {"peak_gib": round(run.peak_bytes() / GIB, 3), **run.notes}
            row |= {
                "step_ms": round(1e3 * seconds, 4),
                "positions_per_s": round(positions / seconds),
                "tokens_per_s": round(tokens / seconds),
            }
        except Exception as error:
            # Whatever a driver or a compiler raises, the other modes are still worth their time.
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        gc.collect()
        yield row


@dataclasses.dataclass
class _Run:
    """Training steps ready to go: `start` queues `num_steps` of them, `wait` returns when all are done."""

    start: Callable[[], None]
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


def _batch(experiment: Experiment) -> Batch:
    split = make_split(experiment.data, "train")
    raw = next(split.iterator(experiment.training.batch_size, repeat=True))
    return jax.jit(split.materialize)(raw)


def _prepare_jax(experiment: Experiment, mode: Mode, batch: Batch) -> tuple[_Run, dict[str, Any]]:
    begin = time.perf_counter()
    experiment = dataclasses.replace(experiment, model=mode.model)
    structure, params, buffers = split_model(build(experiment))
    optimizer = make_optimizer(experiment.training)
    state = make_state(params, buffers, optimizer, experiment.seed)
    update = make_train_step(structure, lambda given: given, optimizer, experiment.training)
    # As many in one program as the training loop has.
    count = steps_per_dispatch(experiment.training, jax.default_backend())
    raws = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, 1, *x.shape)), batch)
    length = np.int32(count)
    dispatch = jax.jit(make_dispatch(update), donate_argnums=0)
    compiled = dispatch.lower(state, raws, length).compile()
    held = [state]

    def start():
        held[0], _ = compiled(held[0], raws, length)

    def wait() -> None:
        jax.block_until_ready(held[0])

    def peak() -> int:
        memory = compiled.memory_analysis()
        if memory is None:
            raise ConfigError("memory", "reported by the compiler", None, "leave the timing out")
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return needed - memory.alias_size_in_bytes

    run = _Run(start, count, wait, peak, {})
    first = round(time.perf_counter() - begin, 2)
    how = {"implementation": resolved_implementation(mode.model), "steps_per_dispatch": count}
    return run, {**how, "first_s": first}


def _prepare_torch(exchange: Exchange, batch: Batch) -> tuple[_Run, dict[str, Any]]:
    from experiments.pytorch_baseline.speed import TimedStep, default_device

    begin = time.perf_counter()
    tokens, targets, scored, real = (
        np.asarray(x) for x in (batch.tokens, batch.targets, batch.score_mask, batch.padding_mask)
    )
    timed = TimedStep(exchange.meta, tokens, targets, scored, real, default_device())
    run = _Run(timed.step, 1, timed.wait, timed.peak_bytes, {})
    return run, {"implementation": timed.used, "first_s": round(time.perf_counter() - begin, 2)}
