"""The attention benchmark: linear sparse attention as a whole module against cuDNN's and the dense form."""

import concurrent.futures
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import attention_inputs, ceilings, floors, memory, parts, specs, timing, trace
from benchmarks.attention_inputs import HURTING, RANDOM, Inputs
from benchmarks.attention_programs import (
    AUTO,
    CUDNN,
    DENSE,
    DENSE_TILES,
    DIRECTIONS,
    Program,
    implementations,
    program,
    sparse_module,
    visible_keys,
)
from benchmarks.record import Record, is_wanted
from benchmarks.specs import AttentionShape

LAYERS = ("branch", "mamba2")
_FORWARD, _BOTH = DIRECTIONS
# The dense form holds several t x t arrays; at 64K one of them has 17 GB.
_LONGEST_DENSE = 16 * specs.KIBI
# Input sets that calls go round: enough that none is still in a cache when its turn comes.
_SETS, _SETS_LONG = 4, 2
_TRACED_CALLS = 3
_visible_keys = jax.jit(visible_keys, static_argnums=(4, 5))


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement."""

    kind: str
    shape: AttentionShape
    contender: str
    direction: str

    @property
    def identity(self) -> str:
        return f"{self.shape.name}/{self.kind}/{self.contender}/{self.direction}"

    @property
    def program(self) -> tuple[str, str, str]:
        """What has to be compiled for it: shape, contender, direction."""
        return self.shape.name, self.contender, self.direction


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run measures.

    Attributes:
      seconds: after so many nothing new is begun.
      only: words that all have to be parts of a case's identity; none are all cases.
      tiny: shapes for tests.
      workers: threads that compile before anything is timed, the most important programs first; what they
        have not begun within half of `seconds` is left out.
      plan: how each is timed.
    """

    seconds: float = 540.0
    only: tuple[str, ...] = ()
    tiny: bool = False
    workers: int = 0
    plan: timing.Plan = dataclasses.field(default_factory=timing.Plan)


def run(record: Record, options: Options) -> None:
    """Measures ceilings, errors and all cases, the most important first, until the time is up."""
    chosen = [case for case in cases(options.tiny) if is_wanted(case.identity, options.only)]
    ahead = _compiled_ahead(chosen, options) if options.workers else {}
    record.note(ceilings=ceilings.measure(options.tiny), memory_limit=memory.limit())
    bench = _Bench(record, options, ahead)
    shapes = {case.shape.name: dataclasses.asdict(case.shape) for case in chosen}
    record.note(shapes=shapes)
    left_out = []
    # Errors after the cases that the goals speak of: a wrong result must not go unseen when time is short.
    num_goals = len(_goals(options.tiny))
    for index, case in enumerate(chosen):
        if index == num_goals:
            bench.check_errors()
        not_compiled = options.workers and case.program not in ahead
        if not_compiled or record.elapsed + bench.expected_seconds(case) > options.seconds:
            left_out.append(case.identity)
        else:
            bench.measure(case)
    if len(chosen) <= num_goals:
        bench.check_errors()
    record.note(left_out=left_out)
    for identity in left_out:
        _say(f"left out, no time: {identity}")


def cases(tiny: bool = False) -> list[Case]:
    """All measurements, the most important first."""
    longs = specs.TINY_LONG if tiny else specs.LONG
    joint = specs.TINY_JOINT_RECALL if tiny else specs.JOINT_RECALL
    forms = implementations()
    best, others = forms[-1], forms[:-1]
    found = _goals(tiny)
    middle, longest = (longs[0], longs[-1]) if tiny else (longs[3], longs[-1])
    found += [Case(RANDOM, longest, layer, _BOTH) for layer in LAYERS]
    found += [Case(kind, shape, best, _BOTH) for shape in (middle, longest) for kind in HURTING]
    at_joint = (*forms[::-1], AUTO, DENSE_TILES, DENSE)
    found += [Case(RANDOM, joint, form, _BOTH) for form in at_joint]
    found += [Case(RANDOM, shape, form, _BOTH) for form in others for shape in longs]
    small = [shape for shape in longs if shape.length <= _LONGEST_DENSE]
    found += [Case(RANDOM, shape, who, _BOTH) for shape in small for who in (best, CUDNN, DENSE_TILES, DENSE)]
    found += [Case(RANDOM, joint, form, _FORWARD) for form in at_joint]
    if not tiny:
        found += [Case(RANDOM, specs.JOINT_RECALL_CUDNN, CUDNN, d) for d in DIRECTIONS[::-1]]
    found += [Case(RANDOM, shape, who, _FORWARD) for shape in longs for who in (best, CUDNN, *others)]
    found += [Case(RANDOM, shape, DENSE, _FORWARD) for shape in small]
    found += [
        Case(kind, shape, form, _BOTH) for form in others for shape in (middle, longest) for kind in HURTING
    ]
    return list(dict.fromkeys(found))


def _goals(tiny: bool) -> list[Case]:
    """Forward and backward on random inputs, where the project's goals lie."""
    longs = specs.TINY_LONG if tiny else specs.LONG[2:]
    best = implementations()[-1]
    return [Case(RANDOM, shape, who, _BOTH) for shape in longs for who in (best, CUDNN)]


def _compile(case: Case) -> tuple[Program, Any, float]:
    """The program of a case, compiled, and the seconds that took."""
    begin = time.perf_counter()
    built = program(case.contender, case.shape, case.direction)
    example = jax.eval_shape(functools.partial(attention_inputs.make, RANDOM, case.shape, 0))
    arguments = jax.eval_shape(built.arguments, example)
    compiled = jax.jit(built.function).lower(*arguments).compile()
    return built, compiled, time.perf_counter() - begin


def _compiled_ahead(
    chosen: Sequence[Case], options: Options
) -> dict[tuple, tuple[Program, Any, float] | None]:
    """Programs by `Case.program`, compiled side by side while nothing is timed; None where that failed."""
    errors = [Case(RANDOM, _checked(options.tiny), form, _BOTH) for form in implementations()]
    num_goals = len(_goals(options.tiny))
    wanted: dict[tuple, Case] = {}
    for case in (*chosen[:num_goals], *errors, *chosen[num_goals:]):
        wanted.setdefault(case.program, case)
    pool = concurrent.futures.ThreadPoolExecutor(options.workers)
    waiting = {pool.submit(_compile, case): key for key, case in wanted.items()}
    done, late = concurrent.futures.wait(waiting, timeout=options.seconds / 2)
    # Those under way are waited for, since a compilation beside it would disturb what is timed.
    pool.shutdown(wait=True, cancel_futures=True)
    done |= {future for future in late if not future.cancelled()}
    _say(f"compiled {len(done)} of {len(waiting)} programs")
    return {waiting[future]: None if future.exception() else future.result() for future in done}


def _checked(tiny: bool) -> AttentionShape:
    """The shape at which errors are looked at."""
    return specs.TINY_LONG[-1] if tiny else specs.CHECKED


class _Bench:
    """Compiles each program once, keeps the inputs of the last shape, and measures."""

    def __init__(
        self, record: Record, options: Options, ahead: dict[tuple, tuple[Program, Any, float] | None]
    ):
        self.record, self.options = record, options
        self.ceilings = record.session["ceilings"]
        self.limit = memory.limit()
        # What failed ahead is tried again where it is measured, and says there what is wrong.
        self.compiled = {key: found for key, found in ahead.items() if found is not None}
        self.inputs: tuple[tuple, list[Inputs], dict[str, int]] | None = None
        self.spent: dict[tuple[str, str, int], float] = {}

    def expected_seconds(self, case: Case) -> float:
        """What a measurement will take, judged by the same contender's at other lengths; 0 if unknown."""
        tokens = case.shape.tokens
        known = [
            seconds * max(tokens / there, 1.0) ** 2
            for (who, direction, there), seconds in self.spent.items()
            if who == case.contender and direction == case.direction and there <= tokens
        ]
        # First call, one for each set of inputs, and a sample in each repeat.
        return min(known) * (1 + _SETS_LONG + self.options.plan.repeats) if known else 0.0

    def measure(self, case: Case) -> None:
        """Measures one case and records it, or why it could not be."""
        shape, begin = case.shape, self.record.elapsed
        facts: dict[str, Any] = dataclasses.asdict(case) | {"shape": shape.name}
        try:
            built, compiled, compile_seconds = self._program(case)
            planned = memory.of_program(compiled)
            if planned and self.limit and planned["peak"] > self.limit:
                raise MemoryError(f"needs {planned['peak'] / 2**30:.1f} GiB")
            inputs, pairs = self._inputs(case.kind, shape)
            arguments = [built.arguments(x) for x in inputs]
            before = memory.of_device()
            timed = timing.measure(compiled, arguments, self.options.plan)
            facts |= {"compile_seconds": compile_seconds, "time": timed}
            facts["memory"] = {"program": planned, "device_before": before, "device": memory.of_device()}
            facts |= self._against_floor(case, built, pairs, timed["seconds"])
            if self._is_traced(case):
                facts["trace"] = self._trace(compiled, arguments)
            self.spent[case.contender, case.direction, shape.tokens] = timed["seconds"]
        except Exception as error:
            # One contender that cannot run a shape must not end the run; what it says is its result.
            facts["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        measured = self.record.add(case.identity, **facts)
        _say(f"{self.record.elapsed:5.0f} s  {_line(measured)}  ({self.record.elapsed - begin:.1f} s)")

    def check_errors(self) -> None:
        """Each form's outputs and gradients against the dense form in float32, on every kind of inputs."""
        shape = _checked(self.options.tiny)
        exact = jax.jit(_exact(shape))
        for form in implementations():
            for kind in (RANDOM, *HURTING):
                identity = f"{shape.name}/{kind}/{form}/errors"
                if not is_wanted(identity, set(self.options.only) - set(DIRECTIONS)):
                    continue
                try:
                    built, compiled, _ = self._program(Case(kind, shape, form, _BOTH))
                    (x, *_), _ = self._inputs(kind, shape)
                    got, expected = compiled(*built.arguments(x)), exact(x)
                    errors = {
                        name: _relative_error(a, b)
                        for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True)
                    }
                    measured = self.record.add(
                        identity, contender=form, kind=kind, shape=shape.name, errors=errors
                    )
                    _say(f"{measured['id']}: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
                except Exception as error:
                    fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    self.record.add(identity, contender=form, kind=kind, error=fault)
                    _say(f"{identity}: {fault}")

    def _program(self, case: Case) -> tuple[Program, Any, float]:
        if case.program not in self.compiled:
            self.compiled[case.program] = _compile(case)
        return self.compiled[case.program]

    def _inputs(self, kind: str, shape: AttentionShape) -> tuple[list[Inputs], dict[str, int]]:
        """Sets of inputs, and the pairs visible in the first of them."""
        if self.inputs is None or self.inputs[0] != (kind, shape.name):
            self.inputs = None
            count = _SETS_LONG if shape.tokens > _LONGEST_DENSE else _SETS
            sets = [attention_inputs.make(kind, shape, seed) for seed in range(count)]
            first = sets[0]
            size = shape.keys_per_source
            key_set = _visible_keys(first.q, first.k, first.scores, first.projection, size, AUTO)
            buckets, lifetimes = key_set.sources
            pairs = attention_inputs.visible_pairs(buckets.query_count, lifetimes.expiry, size)
            self.inputs = (kind, shape.name), sets, pairs
        return self.inputs[1], self.inputs[2]

    def _against_floor(
        self, case: Case, built: Program, pairs: dict[str, int], seconds: float
    ) -> dict[str, Any]:
        """The floor and the share of it that was reached; nothing for a layer, which does more."""
        shape = case.shape
        if case.contender in LAYERS:
            return {}
        is_sparse = case.contender != CUDNN
        visible = sum(pairs.values()) if is_sparse else shape.batch * shape.length * (shape.length + 1) / 2
        work = floors.attention(
            shape, visible, backward=case.direction == _BOTH, out_bytes=built.out_bytes, is_sparse=is_sparse
        )
        floor = work.report(self.ceilings)
        return {
            "pairs": pairs if is_sparse else {"all": visible},
            "floor": floor,
            "share_of_floor": floor["seconds"] / seconds,
        }

    def _is_traced(self, case: Case) -> bool:
        is_end = case.shape.length in (64 * specs.KIBI, 1024 * specs.KIBI, specs.JOINT_RECALL.length)
        return case.kind == RANDOM and case.direction == _BOTH and (is_end or self.options.tiny)

    def _trace(self, compiled: Any, arguments: Sequence[tuple]) -> dict[str, Any]:
        def calls():
            for index in range(_TRACED_CALLS):
                jax.block_until_ready(compiled(*arguments[index % len(arguments)]))

        events = trace.capture(calls)
        by_instruction = parts.of_program(compiled.as_text())
        return {
            **trace.summary(events, _TRACED_CALLS),
            **parts.breakdown(events, by_instruction, _TRACED_CALLS),
            "longest": parts.longest(events, _TRACED_CALLS),
        }


def _exact(shape: AttentionShape):
    """Output and gradients by the dense form in float32, as a function of one set of inputs."""

    def function(x: Inputs):
        wide = [array.astype(jnp.float32) for array in (x.q, x.k, x.v)]
        out, pull = jax.vjp(
            lambda q, k, v: sparse_module(
                q, k, v, x.scores, x.projection, size=shape.keys_per_source, implementation=DENSE
            ),
            *wide,
        )
        return out, *pull(x.d_out.astype(jnp.float32))

    return function


def _relative_error(got: jax.Array, expected: jax.Array) -> float:
    """||got - expected|| / ||expected||, in float32; where nothing is expected, the root mean square."""
    difference, size = got.astype(jnp.float32) - expected, float(jnp.linalg.norm(expected.ravel()))
    return float(jnp.linalg.norm(difference.ravel())) / (size or expected.size**0.5)


def _line(measured: dict[str, Any]) -> str:
    """A measurement for the terminal."""
    if "error" in measured:
        return f"{measured['id']}: {measured['error']}"
    timed, program_memory = measured["time"], measured["memory"]["program"]
    line = f"{measured['id']}: {1e3 * timed['seconds']:.4g} ms, spread {100 * timed['spread']:.1f}%"
    if program_memory:
        line += f", peak {program_memory['peak'] / 2**30:.3f} GiB"
    if "share_of_floor" in measured:
        line += f", {100 * measured['share_of_floor']:.1f}% of the floor's speed"
    if "trace" in measured:
        share = measured["trace"]["busy_share"] or 0.0
        line += f", {measured['trace']['kernels_per_call']:.0f} kernels, busy {100 * share:.0f}%"
    return line


def _say(text: str) -> None:
    print(text, flush=True)
    sys.stdout.flush()
