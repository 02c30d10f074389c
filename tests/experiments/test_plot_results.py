"""The figure of a committed result: what it shows, and the same bytes each time."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import pytest

from experiments import export_result, plot_results, results
from hax_jax.config import Experiment, ModelConfig
from tests.configs.rows import ROWS
from tests.experiments.finished_run import make, session

COMMITTED = sorted((results.CHECKOUT / results.FOLDER / results.TASK).glob("*.json"))


@pytest.fixture
def result(tmp_path):
    """A small result's file."""
    out = tmp_path / "tiny.json"
    workdir = make(tmp_path / "run", sessions=[session()])
    assert export_result.main(["export_result.py", str(workdir), f"--out={out}"]) == 0
    return out


def _texts(path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    return [text for element in root.iter() if (text := (element.text or "").strip())]


def test_figure_lies_beside_the_result_and_names_what_it_shows(result, capsys):
    capsys.readouterr()
    assert plot_results.main(["plot_results.py", str(result)]) == 0
    out = result.with_suffix(".svg")
    assert capsys.readouterr().out == f"figure: {out}\n"
    texts = _texts(out)
    assert any("tiny: 78.12% on the test split" in text for text in texts)
    assert {"validation", "accuracy (%)", "contexts", "keys", "87.6", "75.0", "50.0"} <= set(texts)
    # Tables of other sizes than the paper's have no number of the paper beside them.
    assert not any("paper" in text for text in texts)
    assert any("2 selected keys alone" in text for text in texts)


def test_source_recall_is_a_third_panel(result, tmp_path):
    content = json.loads(result.read_text())
    names = [f"{kind}/any/{s}" for kind in ("recall", "reach") for s in ("sign_bin_lsh", "key_selection")]
    content["test"]["recall"] = dict.fromkeys(names, 0.5)
    content["curve"]["valid"] |= {name: [0.5] * len(content["curve"]["valid"]["step"]) for name in names}
    result.write_text(json.dumps(content))
    assert plot_results.main(["plot_results.py", str(result)]) == 0
    texts = _texts(result.with_suffix(".svg"))
    assert {"recall, sign_bin_lsh", "reach, key_selection", "contexts"} <= set(texts)


def test_the_same_result_gives_the_same_bytes(result, tmp_path):
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for out in (first, second):
        assert plot_results.main(["plot_results.py", str(result), f"--out={out}"]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in first.read_bytes()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_small_and_drawn(path):
    result = results.read(path)
    assert path.with_suffix(".svg").stat().st_size < 130_000
    assert path.stat().st_size <= export_result.MOST_BYTES
    # The figure beside it was drawn from it, and not from what it replaced.
    texts = _texts(path.with_suffix(".svg"))
    assert plot_results.title(result) in texts
    for _, label in plot_results.reference_lines(result):
        assert set(label.split("\n")) <= set(texts)
    assert all(result[name] for name in ("command", "commit", "device", "versions", "implementation"))


def test_lines_to_compare_with_are_the_paper_s_and_the_keys():
    experiment = Experiment(name="mamba2_hax", model=ModelConfig(sparse_arch="sign_bin_lsh+key_selection"))
    assert plot_results.reference_lines({"config": experiment.to_dict()}) == [
        (74.3, "paper: 74.3%\nafter 400,000 steps"),
        (pytest.approx(41.0483, abs=1e-4), "41.0%: ceiling of\n32 selected keys alone"),
    ]
    base = Experiment(name="mamba2_base").to_dict()
    assert [value for value, _ in plot_results.reference_lines({"config": base})] == [36.6]
    own = dataclasses.replace(experiment, name="mine", model=ModelConfig()).to_dict()
    assert plot_results.reference_lines({"config": own}) == []


def test_the_paper_s_numbers_are_those_of_the_configs():
    assert {row.name: row.paper_accuracy for row in ROWS} == results.PAPER


def test_a_perfect_result_can_be_drawn(result, tmp_path):
    content = json.loads(result.read_text())
    content["test"]["by_size"]["accuracy"] = [[1.0, 1.0], [1.0, 1.0]]
    plot_results.draw(content, tmp_path / "x.svg")
    assert _texts(tmp_path / "x.svg").count("100") >= 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "export the run anew"),
        ("[]", "format version"),
        ('{"format_version": 1}', "lacks"),
    ],
)
def test_what_is_no_result_is_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert plot_results.main(["plot_results.py", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_an_unknown_format_is_one_line(result, capsys):
    assert plot_results.main(["plot_results.py", str(result), "--out=x.jpg"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ".svg" in line
