"""The README's numbers are those of the committed results."""

import dataclasses

import pytest

from experiments import export_result, results, update_readme
from experiments.update_readme import BEGIN, END
from hax_jax.config import Experiment
from tests.experiments.finished_run import experiment, make, session


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a README and one result."""
    root = tmp_path / "checkout"
    out = root / "results" / "joint_recall" / "tiny.json"
    workdir = make(tmp_path / "run", sessions=[session()])
    assert export_result.main(["export_result.py", str(workdir), f"--out={out}"]) == 0
    (root / "README.md").write_text(f"# Title\n\n{BEGIN}\n{END}\n\nMore.\n")
    return root


def run(root, *arguments) -> int:
    return update_readme.main(["update_readme.py", *arguments], root)


def test_the_readme_is_up_to_date():
    assert update_readme.main(["update_readme.py", "--check"]) == 0, update_readme.REMEDY


def test_results_are_written_between_the_markers(checkout):
    assert run(checkout) == 0
    text = (checkout / "README.md").read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n") and text.endswith(f"{END}\n\nMore.\n")
    assert "[`tiny`](results/joint_recall/tiny.json) | **78.12%** |  | 1,000 |" in text
    assert "2 x NVIDIA H200 | 11 |" in text
    assert f"    {session()['command']}\n" in text
    assert "seed 0" in text and "tested on the stream (20 sequences)" in text
    assert "![" not in text
    before = text
    assert run(checkout) == 0
    assert (checkout / "README.md").read_text() == before


def test_seeds_of_one_run_have_a_mean_and_a_worst(checkout, tmp_path):
    for seed, accuracy in ((1, 0.75), (2, 0.5)):
        name = f"tiny_lr0.002_seed{seed}"
        settings = dataclasses.replace(experiment(name), seed=seed)
        workdir = make(tmp_path / name, settings, sessions=[session()])
        for path in (workdir / "result.json", workdir / "metrics.jsonl"):
            path.write_text(path.read_text().replace("0.78125", str(accuracy)))
        out = checkout / "results" / "joint_recall" / f"{name}.json"
        assert export_result.main(["export_result.py", str(workdir), f"--out={out}"]) == 0
    assert run(checkout) == 0
    text = (checkout / "README.md").read_text()
    assert "**`tiny`, seeds 0, 1, 2, 1,000 steps: mean 67.71%, worst 50.00%**." in text
    assert text.count(session()["command"]) == 1


def test_seeds_are_told_apart_by_when_they_pass_the_paper():
    group = [
        {
            "config": dataclasses.replace(
                Experiment(name=f"mamba2_hax_lr0.002_seed{seed}"), seed=seed
            ).to_dict(),
            "steps": 3000,
            "test": {"accuracy": curve[-1]},
            "curve": {"valid": {"step": [1000, 2000, 3000], "accuracy": curve}},
        }
        for seed, curve in enumerate(([0.1, 0.8, 0.9], [0.1, 0.6, 0.7], [0.2, 0.9, 1.0]))
    ]
    assert update_readme._over_seeds(group) == (
        "**`mamba2_hax`, seeds 0, 1, 2, 3,000 steps: mean 86.67%, worst 70.00%**. The paper's 74.3% is "
        "passed in validation at 2,000, never, at 2,000; by their mean at step 2,000."
    )


def test_a_figure_is_shown_where_there_is_one(checkout):
    (checkout / "results" / "joint_recall" / "tiny.svg").write_text("<svg/>")
    assert run(checkout) == 0
    assert "](results/joint_recall/tiny.svg)" in (checkout / "README.md").read_text()


def test_check_says_what_is_out_of_date_and_changes_nothing(checkout, tmp_path, capsys):
    before = (checkout / "README.md").read_text()
    assert run(checkout, "--check") == 1
    assert update_readme.REMEDY in capsys.readouterr().err
    assert (checkout / "README.md").read_text() == before
    assert run(checkout) == 0
    assert run(checkout, "--check") == 0
    other = make(tmp_path / "other", experiment("another"), sessions=[session()])
    out = checkout / "results" / "joint_recall" / "another.json"
    assert export_result.main(["export_result.py", str(other), f"--out={out}"]) == 0
    assert run(checkout, "--check") == 1


def test_no_results_are_said(checkout):
    (checkout / "results" / "joint_recall" / "tiny.json").unlink()
    assert run(checkout) == 0
    assert "No results yet." in (checkout / "README.md").read_text()


@pytest.mark.parametrize(
    "text", ["none", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {END}", f"{BEGIN} {BEGIN} {END}"]
)
def test_missing_markers_are_one_line_and_nothing_is_written(checkout, capsys, text):
    (checkout / "README.md").write_text(text)
    assert run(checkout) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: `README.md` must be")
    assert (checkout / "README.md").read_text() == text


def test_a_damaged_result_is_one_line(checkout, capsys):
    (checkout / "results" / "joint_recall" / "tiny.json").write_text("{")
    assert run(checkout) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tiny.json" in line


def test_long_commands_are_wrapped_and_quoted_ones_are_not():
    words = [f"--config.field{index}=value" for index in range(12)]
    wrapped = results.wrapped(" ".join(words))
    assert all(len(line) <= 110 for line in wrapped.splitlines())
    assert wrapped.replace("\\\n", "").split() == words
    quoted = "python x --name='" + "long " * 40 + "'"
    assert results.wrapped(quoted) == quoted
