"""Timing, records, traces and floors, each on what is known beforehand."""

import gzip
import json
import re

import pytest

from benchmarks import floors, parts, specs, timing, trace
from benchmarks.attention_programs import DIRECTIONS
from benchmarks.record import Record, read
from benchmarks.step_program import StepProgram, load
from benchmarks.trace import Event
from experiments import results
from hax_jax.config import ConfigError
from hax_jax.training.compilation import Compilations

CEILINGS = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e12}


def test_a_measurement_goes_round_the_inputs_and_gives_each_repeats_statistics():
    seen = []
    plan = timing.Plan(repeats=3, samples=2, sample_seconds=0.0, seconds=10.0)
    measured = timing.measure(lambda x: seen.append(x), [(1,), (2,)], plan, wait=lambda _: None)
    assert seen[:4] == [1, 2, 1, 2] and len(seen) == 1 + 2 + 3 * 2 * measured["calls"]
    assert measured["repeats"]["samples"] == [2, 2, 2]
    assert measured["seconds"] in measured["repeats"]["median"]


def test_the_spread_is_what_the_repeats_differ_by():
    summary = timing.summary([[1.0, 3.0, 2.0], [4.0]])
    assert summary["seconds"] == 3.0 and summary["spread"] == pytest.approx(2 / 3)
    assert summary["repeats"]["median"] == [2.0, 4.0] and summary["repeats"]["samples"] == [3, 1]
    assert summary["repeats"]["min"] == [1.0, 4.0] and summary["repeats"]["max"] == [3.0, 4.0]


def test_a_record_is_whole_after_each_measurement_and_can_be_added_to(tmp_path):
    path = tmp_path / "deep" / "attention.json"
    record = Record(path, "attention", commit="abc1234")
    record.add("a", time={"seconds": 1 / 3})
    (first,) = read(path, "attention")["measurements"]
    assert first == {"id": "a", "session": 0, "time": {"seconds": 0.33333}}
    record.add("b")
    more = Record(path, "attention", add=True)
    more.add("a", error="none")
    content = read(path, "attention")
    assert [(m["id"], m["session"]) for m in content["measurements"]] == [("b", 0), ("a", 1)]
    assert content["sessions"][0]["commit"] == "abc1234" and content["sessions"][0]["versions"]["jax"]
    with pytest.raises(ConfigError, match="suite 'step'"):
        Record(path, "step", add=True)
    Record(path, "step")
    assert read(path, "step")["measurements"] == []


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 1}'])
def test_a_damaged_record_is_refused_in_words(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="measure anew"):
        read(path, "attention")


def _trace_file(tmp_path, events):
    path = tmp_path / "host.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_a_gpu_trace_is_its_streams_alone(tmp_path):
    def named(what, name, **where):
        return {"ph": "M", "name": f"{what}_name", "args": {"name": name}, **where}

    def span(name, begin, length, tid, **arguments):
        return {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": begin, "dur": length, "args": arguments}

    path = _trace_file(
        tmp_path,
        [
            named("process", "/device:GPU:0", pid=1),
            named("process", "/host:CPU", pid=2),
            named("thread", "Stream #7(Compute)", pid=1, tid=7),
            named("thread", "XLA Ops", pid=1, tid=8),
            span("late_fusion", 30, 10, 7),
            span("add_fusion", 0, 10, 7, hlo_op="add.1"),
            span("add.1", 0, 10, 8),
            span("MemcpyD2D", 5, 10, 7),
            {"ph": "X", "pid": 2, "tid": 7, "name": "python", "ts": 0, "dur": 99},
        ],
    )
    events = trace.read(path)
    assert [event.name for event in events] == ["add_fusion", "MemcpyD2D", "late_fusion"]
    assert events[0].op == "add.1" and events[1].is_copy
    # 15 us of the first two together, then 10 of the last, in 40.
    assert trace.busy_seconds(events) == pytest.approx(25e-6)
    summary = trace.summary(events, 2)
    assert summary["kernels_per_call"] == 1.0 and summary["copies_per_call"] == 0.5
    assert summary["busy_share"] == pytest.approx(25 / 40)


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(step)/jvp(block)/mixer/ssd/dot_general", "scan"),
        ("jit(step)/transpose(jvp(block))/mixer/hax/sparse_attention/dot_general", "attention"),
        ("jit(step)/jvp(block)/mixer/hax/key_scorer/linear/dot_general", "key_scorer"),
        ("jit(step)/jvp(block)/mixer/hax/linear/dot_general", "hax_projection"),
        ("jit(step)/jvp(block)/mixer/linear/dot_general", "projections"),
        ("jit(step)/jvp(block)/add", "residual"),
        ("jit(step)/add", parts.OTHER),
    ],
)
def test_the_innermost_scope_names_the_part(op_name, part):
    assert parts.part_of(op_name) == part


def test_every_scope_of_the_code_belongs_to_a_part():
    code = "".join(path.read_text() for path in (results.CHECKOUT / "hax_jax").rglob("*.py"))
    scopes = set(re.findall(r'named_scope\("(\w+)"\)', code))
    assert scopes == set(parts._PARTS)


def test_kernels_find_their_part_by_instruction_by_name_and_by_vote():
    hlo = """
%fused (p: f32[2]) -> f32[2] {
  %a.1 = f32[2] add(p, p), metadata={op_name="jit(f)/ssd/add"}
  ROOT %b.1 = f32[2] multiply(a.1, p), metadata={op_name="jit(f)/ssd/mul"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %sort.3 = f32[2] sort(x), metadata={op_name="jit(f)/bucket_orders/sort"}
  %loop_fusion.2 = f32[2] fusion(sort.3), kind=kLoop, calls=%fused
  ROOT %copy.9 = f32[2] copy(loop_fusion.2)
}
"""
    found = parts.of_program(hlo)
    assert {name: found[name] for name in ("sort.3", "loop_fusion.2", "copy.9")} == {
        "sort.3": "hashing",
        "loop_fusion.2": "scan",
        "copy.9": parts.COPIES,
    }
    events = [
        Event("anything", "sort.3", 0.0, 2.0, False),
        Event("loop_fusion_2", None, 2.0, 4.0, False),
        Event("cutlass_gemm", None, 6.0, 1.0, False),
    ]
    result = parts.breakdown(events, found, calls=2)
    assert result["parts"] == {
        "scan": {"seconds": 2.0, "kernels": 0.5},
        "hashing": {"seconds": 1.0, "kernels": 0.5},
        parts.UNNAMED: {"seconds": 0.5, "kernels": 0.5},
    }
    assert result["unnamed"] == {"cutlass_gemm": 0.5}


def test_the_floor_of_attention_counts_every_array_once():
    shape = specs.AttentionShape("x", 2, 10, 4, 8, "test", sparse_keys=2, num_hash=3)
    forward = floors.attention(shape, 30, backward=False, out_bytes=4, is_sparse=False)
    assert forward == floors.Work(20 * (2 * (4 + 4 + 8) + 4 * 8), 2 * 12 * 30)
    both = floors.attention(shape, 30, backward=True, out_bytes=4, is_sparse=False)
    assert both.bytes == 20 * (2 * 2 * (4 + 4 + 8) + 2 * 4 * 8)
    assert both.flops == forward.flops + 2 * (3 * 4 + 2 * 8) * 30
    assert floors.Work(2e9, 1e12).seconds(CEILINGS) == 2.0 and floors.Work(1e9, 3e12).seconds(CEILINGS) == 3.0


@pytest.mark.parametrize("name", ["mamba2_hax", "mamba_lsh", "mamba2_base", "samba"])
def test_the_floor_of_a_step_names_parts_that_the_breakdown_knows(name):
    rules = [{"": rule} if isinstance(rule, str) else dict(rule) for rule in parts._PARTS.values()]
    known = {part for rule in rules for part in rule.values()}
    experiment = load(name, ("training.batch_size=3",))
    work = floors.step(experiment, 1000, 10)
    assert set(work) <= known
    assert floors.total(floors.step(experiment, 2000, 0)).bytes == pytest.approx(
        2 * floors.total(floors.step(experiment, 1000, 0)).bytes
    )


@pytest.mark.parametrize(
    "change", ["training.batch_size", "training.nothing=1", "model.hidden_size=wide", "x=1"]
)
def test_a_bad_change_of_a_setting_is_refused(change):
    with pytest.raises(ConfigError, match="--set"):
        load("mamba2_hax", (change,))


def test_every_row_of_table_3_is_measured_once():
    assert sorted(specs.STEP_CONFIGS) == sorted(results.PAPER)
    assert len(DIRECTIONS) == 2


def test_the_state_of_a_population_is_compiled_before_it_is_made():
    program = StepProgram(load("mamba_base", ("training.population_seeds=0,1",), tiny=True))
    compilations = Compilations()
    program.compile_state()
    compiling = compilations.so_far()["compiling_seconds"]
    program.begin()
    assert compilations.so_far()["compiling_seconds"] == compiling > 0
    assert program.members == 2 and program.state.step.shape == (2,)
