"""A table's cells and groups, what their files hold, what is drawn from them, and processes that fail."""

import dataclasses
import json
import math
import os
import pathlib
import re
import time
import types

import pytest

from experiments import results, table3, update_readme
from experiments.table import cells, drawing, record, running
from hax_jax.training.progress import Console
from tests.experiments.finished_run import make, session

# The form of the runs that `finished_run` makes by hand.
STEPS = ["--steps=1000"]


def wish(**changes):
    values = {"configs": ("mamba2_base",), "steps": 1000, **changes}
    return cells.Wish(**values)


def test_the_order_has_every_row_once():
    assert sorted(cells.ORDER) == sorted(results.PAPER)
    drawn = [name for end in drawing.ROWS.values() for name in drawing._names(end) if name]
    assert sorted(drawn) == sorted(results.PAPER)


def test_a_shown_command_leaves_out_where_and_when():
    command = (
        "python experiments/table3.py --mode=parity --jobs=7 --gpus=1 --commit=abc --steps=5 --config.a=1"
    )
    assert drawing._command(command) == "python experiments/table3.py --mode=parity --steps=5 --config.a=1"
    assert drawing._shared(command) and drawing._shared("python t.py --jobs=2")
    assert not any(map(drawing._shared, ("python t.py", "python t.py --jobs=2 --gpus=0,1")))


@pytest.mark.parametrize(("rates", "seeds", "together"), [(3, 3, 16), (3, 3, 4), (2, 5, 2), (1, 1, 1)])
def test_groups_are_grids_that_cover_each_run_once(tmp_path, rates, seeds, together):
    asked = wish(learning_rates=tuple(0.001 * (i + 1) for i in range(rates)), seeds=tuple(range(seeds)))
    (cell,) = cells.plan(dataclasses.replace(asked, together=together), tmp_path)
    assert sorted(cell.members) == sorted((r, s) for r in asked.learning_rates for s in asked.seeds)
    for group in cell.groups:
        assert len(group.members) <= together
        trained = group.experiment.members or (group.experiment,)
        # The members in the order in which the population has them.
        assert [(run.training.learning_rate, run.seed) for run in trained] == list(group.members)
    assert len({group.folder for group in cell.groups}) == len(cell.groups)


def test_what_is_missing_leaves_untouched_groups_as_they_are(tmp_path):
    asked = wish(learning_rates=(0.001, 0.002), seeds=(0, 1), together=2)
    (cell,) = cells.plan(asked, tmp_path)
    first, second = cell.groups
    assert cells.missing(cell, [], asked) == [first, second]
    assert cells.missing(cell, first.members, asked) == [second]
    rest = cells.missing(cell, [*first.members, second.members[0]], asked)
    assert [group.members for group in rest] == [second.members[1:]]
    assert cells.missing(cell, cell.members, asked) == []


def test_modes_forms_and_overrides_reach_every_run(tmp_path):
    asked = wish(
        configs=("mamba2_hax", "samba"), mode="parity", small=True, overrides=("--config.data.seed=5",)
    )
    planned = cells.plan(asked, tmp_path)
    assert cells.name_of(asked, planned) == "parity_1000_cpu"
    for cell in planned:
        (group,) = cell.groups
        assert (cell.shared.model.routing, cell.shared.model.precision) == ("parity", "bfloat16")
        assert group.experiment.data.seed == 5 and group.experiment.data.max_n_context == 3
        assert group.folder == tmp_path / "parity_1000_cpu" / cell.row / "lr0.002_seed0"


def finish(group: cells.Group) -> None:
    """What training leaves behind, made by hand."""
    members = group.experiment.members
    for index, member in enumerate(members or [group.experiment]):
        make(group.folder_of(index), member, [session(seconds=None)])
    if members:
        make(group.folder, group.experiment, [session()])
        ended = [{"stopped": "finished", "steps": 1000} for _ in members]
        result = json.loads((group.folder / "result.json").read_text())
        (group.folder / "result.json").write_text(json.dumps(result | {"members": ended}))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory of its own, and a table's options in it."""
    monkeypatch.chdir(tmp_path)
    return ["table3.py", "--configs=mamba2_key_selection", *STEPS, "--seeds=0,1", "--out=out"]


def test_a_finished_group_is_collected_without_training(here, monkeypatch, capsys):
    monkeypatch.setattr(running, "CHILD", pathlib.Path("no such file"))
    (cell,) = cells.plan(wish(configs=("mamba2_key_selection",), seeds=(0, 1)), pathlib.Path("runs/table3"))
    finish(cell.groups[0])
    assert table3.main([*here, "--dry_run"]) == 0
    assert "mamba2_key_selection: 2 runs finished, not yet collected" in capsys.readouterr().out
    assert table3.main(here) == 0
    content = record.read(pathlib.Path("out/mamba2_key_selection.json"))
    assert [(run["learning_rate"], run["seed"]) for run in content["runs"]] == [(0.002, 0), (0.002, 1)]
    assert content["summary"]["test_accuracy"] == 0.78125 and content["summary"]["test_accuracy_std"] == 0
    (first, _) = content["runs"]
    # The population's own record: a member's copy was made before the end.
    assert (first["seconds"]["wall"], first["trained_together"]) == (60.0, 2)
    assert len(first["curve"]["train"]["step"]) <= record.MOST_POINTS
    text = pathlib.Path("out/table.md").read_text()
    # 64 keys of 25 to 256 entries, at 16 values.
    assert "| +KS |  |  | [78.1 ± 0.0](mamba2_key_selection.json) | 60.1 | 68.5 |" in text
    assert "<svg" in pathlib.Path("out/curves.svg").read_text()


def test_more_seeds_train_only_those_that_are_new(here, capsys):
    asked = wish(configs=("mamba2_key_selection",), seeds=(0, 1))
    (cell,) = cells.plan(asked, pathlib.Path("runs/table3"))
    finish(cell.groups[0])
    assert table3.main(here) == 0
    capsys.readouterr()
    more = [*here[:-2], "--seeds=0,1,2", "--out=out", "--dry_run"]
    assert table3.main(more) == 0
    assert "mamba2_key_selection: 2 runs finished; not begun" in capsys.readouterr().out


def test_a_member_that_diverged_is_told_and_not_run_again(here, capsys):
    asked = wish(configs=("mamba2_key_selection",), seeds=(0, 1))
    (cell,) = cells.plan(asked, pathlib.Path("runs/table3"))
    (group,) = cell.groups
    finish(group)
    ended = json.loads((group.folder / "result.json").read_text())
    ended["members"][1] = {"stopped": "non-finite", "steps": 1000}
    (group.folder / "result.json").write_text(json.dumps(ended))
    assert table3.main(here) == 0
    text = pathlib.Path("out/table.md").read_text()
    assert "[78.1](mamba2_key_selection.json), 1 diverged" in text
    assert table3.main([*here, "--dry_run"]) == 0
    assert "1 of 1 cells finished" in capsys.readouterr().out


def test_a_result_that_is_damaged_fails_its_cell_alone(here, capsys):
    here[1] += ",samba"
    asked = wish(configs=("mamba2_key_selection", "samba"), seeds=(0, 1))
    for cell in cells.plan(asked, pathlib.Path("runs/table3")):
        finish(cell.groups[0])
    (folder,) = pathlib.Path("runs/table3/causal_1000/mamba2_key_selection").iterdir()
    (folder / "result.json").write_text("{")
    assert table3.main(here) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("failed: mamba2_key_selection in ") and "result.json" in line
    assert "samba: finished, test accuracy 78.12%" in captured.out
    assert "| Samba | [78.1 ± 0.0](samba.json) | 6.3 |" in pathlib.Path("out/table.md").read_text()


def run_of(rate, seed, valid, test):
    return {"learning_rate": rate, "seed": seed, "best_valid_accuracy": valid, "test": {"accuracy": test}}


def test_the_best_rate_is_chosen_by_validation():
    runs = [run_of(0.1, s, 0.5, 0.9) for s in (0, 1)] + [run_of(0.2, s, 0.6, 0.4 + 0.2 * s) for s in (0, 1)]
    found = record.summary(runs)
    assert (found["learning_rate"], found["test_accuracy"]) == (0.2, 0.5)
    assert found["test_accuracy_std"] == pytest.approx(0.02**0.5, abs=1e-6)
    # A rate one of whose runs diverged is passed over.
    found = record.summary([*runs, {"learning_rate": 0.2, "seed": 2, "stopped": "non-finite"}])
    assert (found["learning_rate"], found["diverged"]) == (0.1, 1)
    assert record.summary([{"learning_rate": 0.2, "seed": 2}])["test_accuracy"] is None


def test_the_readme_shows_committed_tables(tmp_path):
    readme = "# Title\n<!-- results:begin -->\n<!-- results:end -->\n"
    markers = "<!-- table3:begin -->\n<!-- table3:end -->\n"
    (tmp_path / "README.md").write_text(readme)
    assert update_readme.main(["update_readme.py"], tmp_path) == 0
    asked = wish(configs=("mamba2_hax", "mamba_hax"))
    out = tmp_path / "results" / "table3" / "causal_1000"
    for cell in cells.plan(asked, tmp_path / "runs"):
        finish(cell.groups[0])
        record.add(cell, cell.groups[0], asked, out, "python experiments/table3.py")
    # Results without a place are an error, not left out.
    assert update_readme.main(["update_readme.py"], tmp_path) == 2
    (tmp_path / "README.md").write_text(readme + markers)
    assert update_readme.main(["update_readme.py"], tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    folder = "results/table3/causal_1000"
    row = (
        f"| +HAX | [78.1]({folder}/mamba_hax.json) | 38.0 | [78.1]({folder}/mamba2_hax.json) | 74.3 | 41.0 |"
    )
    assert row in text
    assert "1,000 steps of 64 sequences" in text and "    python experiments/table3.py\n" in text
    assert "curves.svg" not in text
    drawing.write(out)
    assert update_readme.main(["update_readme.py"], tmp_path) == 0
    assert f"]({folder}/curves.svg)" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs=mamba3"], "mamba2_hax"),
        (["--configs="], "list of different names"),
        (["--seeds=0,0"], "different integers"),
        (["--seeds=-1"], "`seed`"),
        (["--learning_rates=fast"], "different numbers"),
        (["--learning_rates=-1,1"], "population_learning_rates"),
        (["--steps=0"], "training.num_steps"),
        (["--mode=fast"], "invalid choice"),
        (["--jobs=0"], "at least 1"),
        (["--limit_seconds=nan"], "at least 0"),
        (["--nonsense"], "unrecognized"),
        (["--config.training.num_steps=5"], "use --steps"),
        (["--config.seed=5"], "use --seeds"),
        (["--config.model.nonsense=5"], "a known field"),
        (["--config.data.eval_source=dataset"], "data.data_dir"),
        (["--config.data.eval_source=dataset", "--config.data.data_dir=nowhere"], "nowhere"),
        (["--commit=main"], "hexadecimal"),
        (["--out=/dev/null"], "`--out`"),
        (["--out=/dev/null/out"], "`--out`"),
        (["--workdir=" + "x" * 300], "`--workdir`"),
        (["--workdir=a\0b"], "`--workdir`"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_made(here, capsys, arguments, message):
    assert table3.main([*here, *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and message in line and captured.out == ""
    assert os.listdir() == []


def test_other_settings_are_refused(here, capsys):
    asked = wish(configs=("mamba2_key_selection",), seeds=(0, 1))
    (cell,) = cells.plan(asked, pathlib.Path("runs/table3"))
    finish(cell.groups[0])
    other = [*here, "--config.data.packing=2048"]
    assert table3.main(other) == 2
    assert "data.packing=0 (here 2048)" in capsys.readouterr().err
    assert table3.main(here) == 0
    capsys.readouterr()
    assert table3.main([*other, "--workdir=elsewhere"]) == 2
    assert "data.packing=0 (here 2048)" in capsys.readouterr().err


CHILD = """
import json, pathlib, sys, time
folder = pathlib.Path(next(word for word in sys.argv if word.startswith('--workdir=')).partition('=')[2])
if 'mamba2_lsh' in str(folder):
    print('error: boom')
    sys.exit(1)
with (folder / 'metrics.jsonl').open('a') as file:
    for step in range(100, 1001, 100):
        file.write(json.dumps({'step': step, 'kind': 'train'}) + '\\n')
        file.flush()
        time.sleep(PAUSE)
"""


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Trains rows by a program that only pretends to; returns what was printed beside the outcome."""

    def train(rows, pause, **plan):
        child = tmp_path / "child.py"
        child.write_text(CHILD.replace("PAUSE", str(pause)))
        monkeypatch.setattr(running, "CHILD", child)
        groups = [cell.groups[0] for cell in cells.plan(wish(configs=rows), tmp_path / "runs")]
        training = running.Training(
            groups, running.Plan(**plan), lambda group: f"{group.row} done", lambda: "counts", Console()
        )
        return training, training.run(None), capsys.readouterr().out

    return train


def test_a_failure_does_not_stop_the_others(train):
    rows = ("mamba2_lsh", "mamba2_base", "samba")
    for jobs in (1, 3):
        training, why, said = train(rows, 0.0, jobs=jobs)
        assert why is None
        assert [(group.row, reason) for group, reason in training.failures] == [
            ("mamba2_lsh", "exit status 1: error: boom")
        ]
        assert "mamba2_base done\n" in said and "samba done\n" in said


def test_a_limit_stops_what_runs_and_begins_nothing_more(train):
    begin = time.monotonic()
    training, why, said = train(("mamba2_base", "samba"), 5.0, limit_seconds=1.0)
    assert time.monotonic() - begin < 10
    assert (why, training.failures) == ("the limit", []) and "done" not in said
    assert not (training._waiting[0].folder).exists()


def test_what_finishes_while_it_is_told_to_stop_is_taken_in(train, tmp_path):
    folder = tmp_path / "runs" / "causal_1000" / "samba" / "lr0.002_seed0"
    folder.mkdir(parents=True)
    # The signal ends the process, but it had come to its end.
    (folder / "result.json").write_text("{}")
    _, why, said = train(("samba",), 5.0, limit_seconds=1.0)
    assert why == "the limit" and "samba done\n" in said


def test_a_signal_stops_the_whole(here, tmp_path_factory, monkeypatch, capsys):
    child = tmp_path_factory.mktemp("program") / "child.py"
    # Sent from there, so that it cannot come before anybody listens.
    child.write_text("import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n")
    monkeypatch.setattr(running, "CHILD", child)
    assert table3.main(here) == 143
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("note: 1,000 steps end within the warm-up of 5,000")
    assert said[1:] == ["stopped by SIGTERM, all saved; the same command goes on. 0 of 1 cells finished"]


def test_progress_says_how_far_each_process_is(train):
    _, _, said = train(("mamba2_base", "samba"), 0.05, report_seconds=0.0)
    lines = [line for line in said.splitlines() if line.startswith("counts; ")]
    assert all(re.fullmatch(r"counts; \w+ (starting|[\d,]+/1,000); .* left", line) for line in lines)
    assert {line.split()[1] for line in lines} == {"mamba2_base", "samba"}


def test_the_time_left_is_that_of_the_whole_table(tmp_path):
    groups = [
        cell.groups[0] for cell in cells.plan(wish(configs=("mamba2_base", "samba", "mamba_base")), tmp_path)
    ]
    estimate = running.Estimate({group.folder: 1000 for group in groups})

    def process(index, step, rate):
        values = {"group": groups[index], "step": step, "seconds_per_step": rate, "start_seconds": 20.0}
        return types.SimpleNamespace(**values)

    assert math.isnan(estimate.seconds([], 1))
    first = process(0, 400, 0.1)
    estimate.watch(first)
    # The rest of this one; of the others, at its speed, all, and their start.
    assert estimate.seconds([first], 1) == pytest.approx(600 * 0.1 + 2 * (1000 * 0.1 + 20))
    assert estimate.seconds([first], 2) == pytest.approx((600 * 0.1 + 2 * (1000 * 0.1 + 20)) / 2)
    # No less than the longest that is left.
    assert estimate.seconds([first], 3) == pytest.approx(1000 * 0.1 + 20)
    estimate.ended(first)
    second = process(1, 500, 0.2)
    estimate.watch(second)
    assert estimate.seconds([second], 1) == pytest.approx(500 * 0.2 + 1000 * 0.15 + 20)
    estimate.ended(second)
    estimate.ended(process(2, 1000, 0.1))
    assert estimate.seconds([], 1) == 0


def test_a_process_gets_its_gpu_and_its_share_of_the_memory(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    plan = running.Plan(jobs=4, gpus=("0", "3"))
    shares = [running.environment(slot, plan) for slot in range(4)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0", "3", "0", "3"]
    assert {share["XLA_PYTHON_CLIENT_MEM_FRACTION"] for share in shares} == {"0.450"}
    alone = running.environment(0, running.Plan())
    assert "CUDA_VISIBLE_DEVICES" not in alone and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in alone
