"""What a run measured reaches the committed file whole, rounded, and never over another run's."""

import itertools
import json

import pytest

from experiments import export_result, results
from hax_jax.training import environment
from tests.experiments import finished_run
from tests.experiments.finished_run import experiment, make, session

GIVEN = [
    "--command=python x",
    f"--commit={'b' * 40}",
    "--device=NVIDIA H200",
    "--versions=jax=0.11.2,cuda=13",
]


def export(workdir, out, *arguments) -> int:
    return export_result.main(["export_result.py", str(workdir), f"--out={out}", *arguments])


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results" / "tiny.json"


def test_a_recorded_run_needs_no_arguments(tmp_path, out, capsys):
    workdir = make(tmp_path / "run", sessions=[session(), session(seconds=30.5)])
    assert export(workdir, out) == 0
    assert capsys.readouterr().out == f"result: {out}\n"
    result = results.read(out)
    assert result["command"] == session()["command"]
    assert result["commit"] == "a" * 40
    assert result["uncommitted_changes"] is False
    assert result["device"] == session()["device"]
    assert result["versions"] == session()["versions"]
    assert result["implementation"] == "xla"
    assert result["seconds"]["wall"] == 90.5
    assert "earlier_sessions" not in result and "note" not in result


def test_places_on_a_machine_are_no_part_of_a_command(tmp_path, out):
    command = f"python x --workdir={tmp_path} --config.data.data_dir=data/small '--config.name=a b'"
    assert export(make(tmp_path / "run", sessions=[session(command=command)]), out) == 0
    told = "python x --config.data.data_dir=data/small '--config.name=a b'"
    assert results.read(out)["command"] == told


def test_a_member_took_the_time_of_its_population(tmp_path, out):
    """Its own record was copied before the end."""
    together = tmp_path / "run"
    workdir = make(together / "members" / "seed0", sessions=[session(seconds=None)])
    (together / "run.json").write_text(json.dumps({"format_version": 1, "sessions": [session(seconds=70.0)]}))
    assert export(workdir, out) == 0
    assert results.read(out)["seconds"]["wall"] == 70.0


def test_measurements_are_kept_and_rounded(tmp_path, out):
    assert export(make(tmp_path / "run", sessions=[session()]), out) == 0
    result = results.read(out)
    assert result["config"] == experiment().to_dict()
    assert (result["steps"], result["best_step"], result["best_valid_accuracy"]) == (1000, 1000, 0.769231)
    assert result["test"]["accuracy"] == 0.78125
    assert result["test"]["num_items"] == 20
    assert result["test"]["by_size"]["accuracy"] == [[1.0, 0.8765], [0.75, 0.5]]
    assert result["speed"] == {"steps_per_s": 11.0, "positions_per_s": 1000.0, "tokens_per_s": 500.0}
    assert result["seconds"]["validation"] == 5.0
    training = sum(2 / (10 + step % 3) for step in range(2, 1001, 2))
    assert result["seconds"]["training"] == pytest.approx(training, abs=0.1)
    # The original's count, with 20 embeddings of width 64 instead of 100.
    assert result["num_parameters"] == 100_594 - 80 * 64


def test_source_recall_is_part_of_the_curve_and_of_the_test(tmp_path, out):
    workdir = make(tmp_path / "run", sessions=[session()])
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] != "train":
            line |= {"recall/1/any": line["step"] / 3000, "reach/any/sign_bin_lsh": 0.123456789}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert export(workdir, out) == 0
    result = results.read(out)
    assert result["test"]["recall"] == {"recall/1/any": 0.33333, "reach/any/sign_bin_lsh": 0.12346}
    assert result["curve"]["valid"]["recall/1/any"][:2] == [0.03333, 0.06667]
    assert len(result["curve"]["valid"]["reach/any/sign_bin_lsh"]) == len(result["curve"]["valid"]["step"])


def test_curves_are_thinned_from_the_end(tmp_path, out):
    assert export(make(tmp_path / "run", sessions=[session()]), out) == 0
    curve = results.read(out)["curve"]
    steps = curve["train"]["step"]
    assert len(steps) <= export_result.MOST_POINTS
    assert steps[-1] == 1000 and {b - a for a, b in itertools.pairwise(steps)} == {6}
    assert curve["valid"]["step"] == list(range(100, 1001, 100))
    assert curve["valid"]["accuracy"][-1] == 0.76923
    assert curve["train"]["gate_loss"][0] == 0.12346
    assert {len(column) for column in curve["train"].values()} == {len(steps)}
    assert out.stat().st_size < 20_000


def test_what_a_run_did_not_record_is_given(tmp_path, out):
    more = ["--device_count=4", "--wall_seconds=77", "--note=By hand."]
    assert export(make(tmp_path / "run"), out, *GIVEN, *more) == 0
    result = results.read(out)
    assert result["command"] == "python x"
    assert result["commit"] == "b" * 40
    assert result["device"] == {"kind": "NVIDIA H200", "count": 4}
    assert result["versions"] == {"jax": "0.11.2", "cuda": "13"}
    assert result["implementation"] == "xla"
    assert result["seconds"]["wall"] == 77
    assert result["note"] == "By hand."
    # What is not known is left out.
    assert "platform" not in result and "uncommitted_changes" not in result


def test_the_checkout_s_commit_is_the_default(tmp_path, out, monkeypatch):
    monkeypatch.setattr(export_result, "commit", lambda: {"commit": "c" * 40, "uncommitted_changes": True})
    assert export(make(tmp_path / "run"), out, "--command=x", "--device=y") == 0
    result = results.read(out)
    assert (result["commit"], result["uncommitted_changes"]) == ("c" * 40, True)


def test_a_short_commit_is_written_in_full(tmp_path, out):
    head = environment.commit()["commit"]
    if head is None:
        # Outside a checkout there is nothing to look it up in.
        head = "1234567"
    assert export(make(tmp_path / "run"), out, "--command=x", "--device=y", f"--commit={head[:12]}") == 0
    assert results.read(out)["commit"] == head


def test_sessions_that_differ_are_told(tmp_path, out):
    earlier = session(device={"kind": "NVIDIA H100", "count": 1, "hosts": 1}, seconds=None)
    assert export(make(tmp_path / "run", sessions=[earlier, session()]), out) == 0
    result = results.read(out)
    assert result["device"]["kind"] == "NVIDIA H200"
    assert result["earlier_sessions"] == [{"seconds": None, "device": earlier["device"]}]
    # One of the sessions was killed, so that nobody knows how long it took.
    assert result["seconds"]["wall"] is None


def test_another_run_is_not_overwritten(tmp_path, out, capsys):
    first = make(tmp_path / "first", sessions=[session()])
    other = make(tmp_path / "other", experiment(num_layers=1), sessions=[session()])
    assert export(first, out) == 0
    before = out.read_bytes()
    # The same run again may be written again, with a note for example.
    assert export(first, out, "--note=again") == 0
    assert results.read(out)["note"] == "again"
    assert export(first, out) == 0 and out.read_bytes() == before
    capsys.readouterr()
    assert export(other, out) == 2
    assert "--replace" in _only_line(capsys)
    assert out.read_bytes() == before
    assert export(other, out, "--replace") == 0
    assert results.read(out)["config"]["model"]["num_layers"] == 1


def test_a_file_that_is_no_result_is_not_overwritten(tmp_path, out, capsys):
    out.parent.mkdir()
    out.write_text("notes of mine")
    assert export(make(tmp_path / "run", sessions=[session()]), out) == 2
    assert "result" in _only_line(capsys)
    assert out.read_text() == "notes of mine"
    assert [path.name for path in out.parent.iterdir()] == ["tiny.json"]


@pytest.mark.parametrize("missing", ["command", "device"])
def test_what_is_neither_recorded_nor_given_is_asked_for(tmp_path, out, capsys, missing):
    arguments = [word for word in GIVEN if not word.startswith(f"--{missing}=")]
    assert export(make(tmp_path / "run"), out, *arguments) == 2
    assert f"give --{missing}" in _only_line(capsys)
    assert not out.exists()


def test_no_commit_at_all_is_refused(tmp_path, out, capsys, monkeypatch):
    monkeypatch.setattr(environment, "CHECKOUT", tmp_path)
    assert export(make(tmp_path / "run"), out, "--command=x", "--device=y") == 2
    assert "give --commit" in _only_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--commit=main"], "hexadecimal"),
        (["--versions=jax"], "NAME=VERSION"),
        (["--unknown"], "--unknown"),
        (["--device=NVIDIA H200"], "run.json"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, out, capsys, arguments, message):
    assert export(make(tmp_path / "run", sessions=[session()]), out, *arguments) == 2
    assert message in _only_line(capsys)
    assert not out.exists()


def _drop_line(workdir, kind):
    path = workdir / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["kind"] != kind]
    path.write_text("".join(lines))


def _change_result(workdir, **changes):
    path = workdir / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "no config.json"),
        (lambda run: (run / "result.json").unlink(), "a finished run"),
        (lambda run: (run / "result.json").write_text("{"), "result.json is readable"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text("\0\n"), "metrics.jsonl"),
        (lambda run: _drop_line(run, "valid"), "belongs to its result.json"),
        (lambda run: _drop_line(run, "test"), "belongs to its result.json"),
        (lambda run: _change_result(run, stopped="interrupted"), "a finished run"),
        (lambda run: _change_result(run, test_accuracy=0.5), "belongs to its result.json"),
        (lambda run: _change_result(run, steps=2000), "belongs to its result.json"),
        (lambda run: _change_result(run, test_by_size=None), "are whole"),
    ],
)
def test_damaged_runs_are_one_line(tmp_path, out, capsys, damage, message):
    workdir = make(tmp_path / "run", sessions=[session()])
    damage(workdir)
    assert export(workdir, out) == 2
    assert message in _only_line(capsys)
    assert not out.exists()


def test_no_such_folder_is_one_line(tmp_path, out, capsys):
    assert export(tmp_path / "nowhere", out) == 2
    assert "no config.json" in _only_line(capsys)


def test_a_module_of_one_s_own_is_refused(tmp_path, out, capsys):
    workdir = make(tmp_path / "run", sessions=[session()])
    config = json.loads((workdir / "config.json").read_text()) | {"module": "Transformer"}
    (workdir / "config.json").write_text(json.dumps(config))
    assert export(workdir, out) == 2
    assert "Transformer" in _only_line(capsys)


def test_a_result_too_large_is_refused(tmp_path, out, capsys, monkeypatch):
    monkeypatch.setattr(export_result, "MOST_BYTES", 1000)
    assert export(make(tmp_path / "run", sessions=[session()]), out) == 2
    assert "at most 1000 bytes" in _only_line(capsys)
    assert not out.exists()


def test_the_text_is_the_value(tmp_path):
    value = {"a": [1, 2.5, None, "x[1, 2]"], "b": {}, "c": [[1], [2]], "d": {"e": True, "f": []}}
    text = results.to_text(value)
    assert json.loads(text) == value
    assert ' "a": [1, 2.5, null, "x[1, 2]"],' in text.splitlines()


def test_memory_of_a_part_of_each_table():
    data = finished_run.experiment().data
    # Tables of 1, 2, 2 and 4 entries with 2 values: all of them known, or one of each.
    assert results.accuracy_of_memory(data, 4) == 1.0
    assert results.accuracy_of_memory(data, 1) == pytest.approx((1 + 2 * (0.5 + 0.25) + (0.25 + 0.375)) / 4)
    assert results.accuracy_of_memory(data, 0) == 0.5


def _only_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line
