"""How long a call takes: warm-up, medians, rotating inputs, and everything twice to show the spread."""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Plan:
    """How often something is called.

    Attributes:
      repeats: the whole measurement, one after the other; what they differ by is the spread.
      samples: times taken in each repeat, if `seconds` allows so many.
      sample_seconds: a sample is as many calls, back to back, as take about this long.
      seconds: about what one measurement may take in all.
    """

    repeats: int = 2
    samples: int = 10
    sample_seconds: float = 0.02
    seconds: float = 4.0


MOST_CALLS = 200


def measure(
    call: Callable[..., Any],
    inputs: Sequence[tuple],
    plan: Plan,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[str, Any]:
    """Times `call(*inputs[i])`, i going round, device work included; `wait` waits for a call's result.

    Calls of one sample are dispatched without waiting in between, as a program would do it: where a call is
    shorter than its dispatch, it is the dispatch that is measured.

    Returns:
      `seconds` (median of the repeats' medians), `spread` (largest less smallest median, over `seconds`),
      `calls` in a sample, `first_call` in seconds, and the `repeats`' medians, extremes and samples.
    """
    turns = itertools.cycle(inputs)

    def sample(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            result = call(*next(turns))
        wait(result)
        return (time.perf_counter() - begin) / calls

    first_call = sample(1)
    # Every set of inputs once more, so that nothing is touched for the first time under the clock.
    estimate = first_call
    for _ in inputs:
        estimate = min(estimate, sample(1))
    calls = min(max(math.ceil(plan.sample_seconds / estimate), 1), MOST_CALLS)
    affordable = int(plan.seconds / (plan.repeats * calls * estimate))
    samples = min(max(affordable, 1), plan.samples)
    repeats = [[sample(calls) for _ in range(samples)] for _ in range(plan.repeats)]
    return {"first_call": first_call, **summary(repeats), "calls": calls}


def summary(repeats: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The statistics of times, one list a repeat."""
    medians = [statistics.median(times) for times in repeats]
    seconds = statistics.median(medians)
    return {
        "seconds": seconds,
        "spread": (max(medians) - min(medians)) / seconds,
        "repeats": {
            "median": medians,
            "min": [min(times) for times in repeats],
            "max": [max(times) for times in repeats],
            "samples": [len(times) for times in repeats],
        },
    }
