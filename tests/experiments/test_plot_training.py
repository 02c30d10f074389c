"""The plot of a run is drawn from its metrics, says where it is, and refuses what is no run."""

import json

import pytest

from experiments import plot_training
from hax_jax.config import Experiment
from hax_jax.training.workdir import RunFolder, RunResult

METRICS = (
    {"step": 10, "kind": "train", "loss": 2.5, "accuracy": 0.1},
    {"step": 20, "kind": "train", "loss": 2.0, "accuracy": 0.3},
    {"step": 20, "kind": "valid", "loss": 1.9, "accuracy": 0.35},
    {"step": 20, "kind": "test", "loss": 1.8, "accuracy": 0.375},
)


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has finished."""
    folder = tmp_path / "run"
    with RunFolder(folder, Experiment(name="a_small_run")) as made:
        made.claim()
        made.finish(RunResult("finished", 20, test_accuracy=0.375))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in METRICS))
    return folder


def test_svg_beside_the_metrics(run, capsys):
    assert plot_training.main(["plot_training.py", str(run)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [f"plot: {run / 'training.svg'}", "test accuracy: 37.50%"]
    text = (run / "training.svg").read_text()
    for part in ("a_small_run", "accuracy (%)", "cross-entropy (nats)", "test 37.5", "valid"):
        assert part in text


def test_the_same_run_gives_the_same_file(run):
    for name in ("a.svg", "b.svg"):
        assert plot_training.main(["plot_training.py", str(run), f"--out={run / name}"]) == 0
    assert (run / "a.svg").read_bytes() == (run / "b.svg").read_bytes()


def test_a_run_under_way(run, capsys):
    """Without a result the plot is the last line."""
    (run / "result.json").unlink()
    assert plot_training.main(["plot_training.py", str(run), f"--out={run / 'deeper' / 'now.png'}"]) == 0
    assert capsys.readouterr().out == f"plot: {run / 'deeper' / 'now.png'}\n"
    assert (run / "deeper" / "now.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("spoil", "arguments", "named"),
    [
        ("config.json", [], "no config.json"),
        ("metrics.jsonl", [], "train longer"),
        (None, ["--out=plot.gif"], ".svg, .png, .pdf"),
        (None, ["--out=/proc/nowhere/plot.svg"], "a file that can be written"),
    ],
)
def test_bad_input(run, capsys, spoil, arguments, named):
    if spoil:
        (run / spoil).unlink()
    assert plot_training.main(["plot_training.py", str(run), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert named in err
