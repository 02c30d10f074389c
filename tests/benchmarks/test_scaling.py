"""The scaling benchmark on simulated devices: runs compared, where they part, what is written of it."""

import json

import numpy as np
import pytest

from benchmarks import run as command
from benchmarks import scaling, scaling_process, timing
from benchmarks.record import read
from benchmarks.scaling_runs import Machine, first_other_decision
from benchmarks.step_program import load
from experiments import scaling_tables, update_readme
from hax_jax.config import ConfigError

# Quick to compile.
PLAIN = ("training.batch_size=4", "training.warmup_steps=1", "model.sparse_arch=sliding_window")


@pytest.mark.timeout(600)
def test_runs_are_compared_and_moved(tmp_path):
    path = tmp_path / "simulated.json"
    changes = [f"--set={change}" for change in PLAIN]
    options = ["--simulated=2", "--tiny", "--steps=4", "--only=float32", f"--cache={tmp_path / 'cache'}"]
    assert command.main(["run.py", "scaling", *options, *changes, f"--out={path}"]) == 0
    content = read(path, "scaling")
    (session,) = content["sessions"]
    assert session["simulated"] and session["device"]["count"] == 2
    assert session["command"].startswith("python ") and not session["left_out"]
    by_id = {m["id"]: m for m in content["measurements"]}
    assert by_id.keys() == {"equality/float32/2", "resume/float32/2-1"}
    for measured in by_id.values():
        assert measured["first_step_beyond"] is None and measured["steps"] == 4, measured
        # Two devices add in another order than one: it was not the same run twice.
        assert 0 < measured["parameter"] < 1e-5, measured
    assert by_id["resume/float32/2-1"]["moved_at"] == 2

    folder = tmp_path / "results" / "scaling"
    folder.mkdir(parents=True)
    (folder / path.name).write_bytes(path.read_bytes())
    text = scaling_tables.section(tmp_path, simulated=True)
    assert "2 x cpu, simulated on a CPU: equality only, nothing to time" in text
    assert (
        "- float32, 2 devices until step 2, then 1, against 2 throughout: all 4 losses within 1e-05" in text
    )
    assert scaling_tables.section(tmp_path, simulated=False) is None


def test_updates_are_timed_and_decisions_kept(tmp_path):
    """In this process, on one device; on several it is the same code."""
    plan = timing.Plan(repeats=2, samples=1, sample_seconds=0.0, seconds=0.1)
    timed = scaling_process.measure(load("mamba2_hax", PLAIN[1:], tiny=True), plan)
    assert timed["time"]["seconds"] > 0 and timed["steps_per_dispatch"] == 2
    assert timed["tokens_per_s"] * timed["time"]["seconds"] == pytest.approx(2 * 43, rel=0.3)

    path = tmp_path / "decisions.npz"
    experiment = load("mamba2_hax", ("model.sparse_keys=8", "training.warmup_steps=1"), tiny=True)
    kinds = scaling_process.decide(experiment, 2, path)["decisions"]
    assert kinds == [f"layer0/{kind}" for kind in ("key_code", "lifetime", "query_code", "ranking")]
    with np.load(path) as arrays:
        kept = dict(arrays)
    assert kept["layer0/lifetime"].shape[:2] == (2, 2) and kept["layer0/lifetime"].max() > 0
    assert first_other_decision(kept, kept) is None
    other = {name: array.copy() for name, array in kept.items()}
    other["layer0/ranking"][0, 1, 2] += 1
    other["layer0/key_code"][1, 0, 3] ^= 1
    found = first_other_decision(kept, other)
    place = {"step": 1, "layer": 0, "kind": "ranking", "row": 1, "position": 2, "count_in_step": 1}
    assert found.items() >= place.items() and found["here"] == found["on_one_device"] + 1


def test_each_process_sees_so_many_devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Machine(0, None)._environment(2)["CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert Machine(0, None)._environment(2)["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert Machine(0, None)._environment(None)["CUDA_VISIBLE_DEVICES"] == "4,5,7"
    simulated = Machine(8, None)._environment(2)
    assert simulated["XLA_FLAGS"].endswith("device_count=2") and simulated["JAX_PLATFORMS"] == "cpu"


def test_numbers_of_devices():
    assert scaling._counts("", 6) == (1, 2, 4)
    assert scaling._counts("8,2", 8) == (1, 2, 8)
    for given in ("0,2", "16", "two"):
        with pytest.raises(ConfigError, match="--devices"):
            scaling._counts(given, 8)


def test_what_several_gpus_gave_goes_into_the_readme(tmp_path):
    """The table's arithmetic, on numbers made up here."""

    def timed(per, count, batch, seconds):
        rate = 464.0 * batch / seconds
        one = {"devices": count, "batch_size": batch, "time": {"seconds": seconds}, "tokens_per_s": rate}
        return {"id": f"throughput/{per}/{count}", "session": 0, **one}

    decision = {"step": 41, "layer": 1, "kind": "key_code", "row": 3, "position": 7, "count_in_step": 1}
    compared = {
        "steps": 200,
        "loss": 3e-4,
        "before": 4e-6,
        "first_step_beyond": 42,
        "devices": 2,
        "decision": decision,
    }
    session = {
        "simulated": False,
        "config": "mamba2_hax",
        "tolerance": 1e-5,
        "device": {"kind": "NVIDIA H200", "count": 2},
        "command": "python benchmarks/run.py scaling",
        "commit": "0123456789",
        "versions": {"jax": "0.11.2"},
    }
    content = {
        "format_version": 1,
        "suite": "scaling",
        "sessions": [session],
        "measurements": [
            {"id": "equality/default/2", "session": 0, **compared},
            {"id": "equality/float32/2", "session": 0, **compared, "first_step_beyond": 1, "before": 0.0},
            timed("device", 1, 64, 1e-3),
            timed("device", 2, 128, 1.25e-3),
            timed("global", 2, 64, 0.625e-3),
        ],
    }
    folder = tmp_path / "results" / "scaling"
    folder.mkdir(parents=True)
    (folder / "nvidia_h200.json").write_text(json.dumps(content))
    begin, end = update_readme.BEGIN, update_readme.END
    (tmp_path / "README.md").write_text(
        f"{begin}\n{end}\n<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\n"
    )
    assert update_readme.main(["update_readme.py"], tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| 2 | 128 | 1.25 | 47.51M | 80% |" in text and "| 2 | 64 | 0.625 | 47.51M | 80% |" in text
    assert "the losses up to step 41 of 200 within 1e-05, largest difference 4.0e-06 (later 3.0e-04)" in text
    assert "the losses differ by more than 1e-05 from step 1 on, by at most 3.0e-04; first other" in text
    assert "first other decision: step 41, layer 1, key code at row 3, position 7" in text
