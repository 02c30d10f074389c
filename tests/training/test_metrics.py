"""metrics.jsonl after crashes, and what a run prints."""

import io
import json
import math

import pytest

from hax_jax.training.metrics import MetricsWriter, read_metrics
from hax_jax.training.progress import Console, Progress, duration


def write(path, *entries, tail=b""):
    lines = [json.dumps({"step": step, "kind": kind, "loss": 1.5}) + "\n" for step, kind in entries]
    (path / "metrics.jsonl").write_bytes("".join(lines).encode() + tail)
    return lines


def test_lines_reach_the_file_at_once_and_are_strict_json(tmp_path):
    writer = MetricsWriter(tmp_path, 0, 0)
    writer.write(10, "train", {"loss": 0.1, "accuracy": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 10, "kind": "train", "loss": 0.1, "accuracy": null}\n'
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 10, "kind": "train", "loss": 0.1, "accuracy": None}]


def test_resuming_drops_exactly_what_will_be_written_again(tmp_path):
    lines = write(
        tmp_path, (10, "train"), (20, "train"), (20, "valid"), (30, "train"), (40, "train"), (40, "valid"),
        (50, "test"), tail=b'{"step": 60, "ki',
    )
    writer = MetricsWriter(tmp_path, 40, 20)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:5])
    assert writer.num_torn == 0
    writer.write(40, "valid", {"loss": 1.0})
    writer.close()
    names = [(line["step"], line["kind"]) for line in read_metrics(tmp_path)]
    assert names[-2:] == [(40, "train"), (40, "valid")]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", [b'{"step": 20, "kind": "train"', b"\0\0\0", b"\xff\n", b"17\n", b"\n"])
def test_torn_last_line_goes(tmp_path, tail):
    lines = write(tmp_path, (10, "train"), tail=tail)
    MetricsWriter(tmp_path, 100, 100).close()
    assert (tmp_path / "metrics.jsonl").read_text() == lines[0]


def test_damage_inside_the_file_is_counted(tmp_path):
    write(tmp_path, (10, "train"), (20, "train"), (30, "train"))
    content = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(content[0] + b"garbage\n" + content[2])
    writer = MetricsWriter(tmp_path, 100, 100)
    writer.close()
    assert writer.num_torn == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 30]


def test_tensorboard_events_are_written(tmp_path):
    writer = MetricsWriter(tmp_path, 0, 0, tensorboard=True)
    writer.write(1, "train", {"loss": 0.5})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_log_gets_plain_lines_and_a_terminal_a_bar_below_them():
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        console = Console(stream)
        console.bar("[##..]")
        console.line("step 1")
        console.bar("")
    assert log.getvalue() == "step 1\n"
    assert terminal.getvalue() == "[##..]\r\x1b[Kstep 1\n[##..]\r\x1b[K"


def test_closed_output_does_not_end_the_run():
    stream = io.StringIO()
    console = Console(stream)
    stream.close()
    console.line("nobody reads this")
    console.line("nor this")


def test_progress_line_names_everything(monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 103.0]).__next__
    monkeypatch.setattr("hax_jax.training.progress.time.perf_counter", clock)
    log = io.StringIO()
    progress = Progress(Console(log), step=0, num_steps=100, positions=1000)
    assert progress.started(1) == 100.0
    progress.pause(1.0)
    metrics = {"loss": 2.0, "gate_loss": 0.5, "accuracy": 0.25, "learning_rate": 1e-3, "tokens": 400.0}
    speeds = progress.log(11, metrics)
    assert speeds == {"steps_per_s": 10.0, "positions_per_s": 10_000.0, "tokens_per_s": 4_000.0}
    assert log.getvalue() == (
        "step 11/100  loss 2.0000  gate loss 0.5000  accuracy 25.00%  lr 1.00e-03  10 steps/s  "
        "10k positions/s  4k tokens/s  27 s left\n"
    )


def test_durations():
    assert [duration(x) for x in (0.4, 59.6, 185.0, 7800.0, 273_600.0, math.nan, math.inf)] == [
        "0 s", "1 min 0 s", "3 min 5 s", "2 h 10 min", "3 d 4 h", "unknown time", "unknown time",
    ]
