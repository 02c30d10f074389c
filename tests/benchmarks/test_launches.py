"""Counting kernels, on a program written by hand."""

from benchmarks import hlo_kernels
from benchmarks.launches import main, report

PROGRAM = """
HloModule step, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%fused_add (p0: f32[1000,64], p1: s32[]) -> bf16[64] {
  %p0 = f32[1000,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1), metadata={op_name="p1"}
  %row = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,64}
  ROOT %narrow = bf16[64]{0} convert(%row), metadata={op_name="jit(f)/jvp(norm)/convert"}
}

%turn (carry: (s32[], f32[1000,64])) -> (s32[], f32[1000,64]) {
  %carry = (s32[], f32[1000,64]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%carry), index=0
  %x = f32[1000,64]{1,0} get-tuple-element(%carry), index=1
  %loop_fusion = bf16[64]{0} fusion(%x, %index), kind=kLoop, calls=%fused_add
  %kernel = (f32[1000,64], /*index=1*/s32[]) custom-call(%x, %loop_fusion), metadata={op_name="f/ssd/map"}
  %y = f32[1000,64]{1,0} get-tuple-element(%kernel), index=0
  ROOT %next = (s32[], f32[1000,64]{1,0}) tuple(%index, %y)
}

%more (carry: (s32[], f32[1000,64])) -> pred[] {
  %carry = (s32[], f32[1000,64]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[1000,64]) -> (s32[], f32[1000,64]) {
  %x = f32[1000,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %copy = f32[1000,64]{1,0} copy(%x)
  %first = (s32[], f32[1000,64]{1,0}) tuple(%zero, %copy)
  ROOT %while = (s32[], f32[1000,64]{1,0}) while(%first), condition=%more, body=%turn
}
"""


def test_a_turn_of_the_loop_is_its_kernels_and_what_they_move():
    fusion, kernel = hlo_kernels.of_loop(PROGRAM)
    # Of x it reads one row, and the index.
    assert (fusion.name, fusion.bytes) == ("loop_fusion", 64 * 2 + 64 * 4 + 4)
    assert (kernel.opcode, kernel.bytes) == ("custom-call", 2 * 256_000 + 4 + 128)
    assert fusion.seconds == 1.8e-6


def test_a_loop_inside_counts_as_often_as_it_turns():
    trips = 'backend_config={"known_trip_count":{"n":"5"}}'
    program = PROGRAM.replace("ENTRY %main", "%inside").replace("body=%turn", f"body=%turn, {trips}")
    program += """
ENTRY %all (x: f32[1000,64]) -> (s32[], f32[1000,64]) {
  %x = f32[1000,64]{1,0} parameter(0)
  ROOT %loop = (s32[], f32[1000,64]{1,0}) while(%x), condition=%more, body=%inside
}
"""
    counted = [(one.name, one.count) for one in hlo_kernels.of_loop(program)]
    assert counted == [("copy", 1), ("loop_fusion", 5), ("kernel", 5)]


def test_kernels_are_added_up_by_part():
    lines = report(PROGRAM, "all").splitlines()
    assert "| scan | 1 | 0.5 | 1.8 |" in lines and "| norms | 1 | 0.0 | 1.8 |" in lines
    assert "| **all** | 2 | 0.5 | 3.6 |" in lines
    assert sum("loop_fusion" in line for line in lines) == 1


def test_a_wrong_setting_is_said_in_one_line(capsys):
    assert main(["launches.py", "--config=mamba2_base", "--set=data.nothing=1"]) == 2
    assert capsys.readouterr().err.startswith("error: `--set` must be FIELD=VALUE")
    assert main(["launches.py", "--config=mamba2_base", "--gpus=3"]) == 2
    assert "`--gpus` must be a number that divides the batch of 64, got 3" in capsys.readouterr().err
