"""The short form of the harness, and that it notices what it is there for.

`python tests/faults/run.py` makes the same trials by the thousand; results/faults/ counts them.
"""

import dataclasses
import json
import os
import random
import shutil

import pytest

from hax_jax.training import checkpoints
from tests.faults import damage, kills, power, report
from tests.faults.forms import FORMS
from tests.faults.runs import Undisturbed
from tests.faults.session import PHASES

SEED = random.SystemRandom().randrange(2**32)
SECONDS = 100.0


@pytest.mark.parametrize("form", FORMS)
def test_killed_at_random_moments_ends_with_the_same_bits(form, compiled_programs):
    trials = 8 if form == "plain" else 3
    tally = kills.try_form(form, trials, SEED, SECONDS, 0.2, compiled_programs)
    assert tally.trials > 0 and tally.failures == 0, (SEED, tally.details)


# What a population keeps lies in folders of its members too.
@pytest.mark.parametrize("form", ["plain", "population"])
def test_pulled_plug_loses_nothing_that_was_counted_on(form):
    tally = power.try_power(form, 25, SEED, SECONDS, moments=0.05)
    assert tally.trials >= 20 and tally.failures == 0, (SEED, tally.details)


# Orbax, where a folder has lost its sums and is read all the same, closes an event loop too early.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_checkpoints_are_noticed_and_the_newest_whole_one_is_used():
    tally = damage.try_damage(150, SEED, SECONDS)
    assert tally.trials > 50 and tally.failures == 0, (SEED, tally.details)


def test_simulated_outage_notices_a_missing_fsync(monkeypatch):
    monkeypatch.setattr(checkpoints, "sync_folder", lambda folder: None)
    tally = power.try_power("plain", 60, SEED, SECONDS, moments=0.2)
    assert tally.failures > 0
    assert any("went back" in problem for detail in tally.details for problem in detail["problems"])


@pytest.mark.parametrize(
    ("form", "lost"),
    [
        (
            "plain",
            {
                "checkpoints/60": "/checkpoints: the newest is 54, not 60",
                "metrics.jsonl": "/metrics.jsonl differs",
            },
        ),
        ("population", {f"{FORMS['population'].members[1]}/result.json": "result.json is missing"}),
    ],
)
def test_what_a_finished_run_lacks_is_noticed(tmp_path, form, lost):
    reference, opening = power.undisturbed(form, tmp_path)

    def problems(folder):
        return list(power._wrong_in(folder, {}, reference, opening))

    for number, (name, problem) in enumerate(lost.items()):
        folder = tmp_path / f"copy_{number}"
        shutil.copytree(reference.folder, folder)
        assert problems(folder) == []
        (shutil.rmtree if (folder / name).is_dir() else os.remove)(folder / name)
        assert any(problem in found for found in problems(folder))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run and its record."""
    folder = tmp_path_factory.mktemp("reference")
    return power.undisturbed("plain", folder)[0]


def test_comparison_notices_every_kind_of_difference(undisturbed: Undisturbed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed.folder, folder)
    before: dict[str, int] = {}
    assert list(undisturbed.wrong_after_kill(folder, before)) == []
    assert list(undisturbed.wrong_at_end(folder)) == []
    best = json.loads((folder / "result.json").read_text())["best_step"]
    assert before == {"/checkpoints": 60, "/best": best}

    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    changed = json.dumps({**json.loads(lines[3]), "loss": 0.5})
    (folder / "metrics.jsonl").write_text("".join([*lines[:3], changed + "\n", *lines[4:]]))
    assert any("foreign line" in problem for problem in undisturbed.wrong_after_kill(folder, before))
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert list(undisturbed.wrong_at_end(folder)) == ["/metrics.jsonl differs"]

    shutil.rmtree(folder / "checkpoints" / "60")
    assert any("went back from 60" in problem for problem in undisturbed.wrong_after_kill(folder, before))
    other = dataclasses.replace(undisturbed, record={"digests": {}})
    assert any("is not that of" in problem for problem in other.wrong_after_kill(folder, {}))


def test_kills_are_drawn_from_all_phases(undisturbed: Undisturbed):
    record = {
        "phases": dict.fromkeys(PHASES, 20),
        "seconds_in": dict.fromkeys(PHASES, 0.1),
        "seconds": 2.0,
        "calls": {"fsync": 100, "rename": 10},
    }
    generator = random.Random(1)
    orders = [kills.random_kill(generator, record, 1.0) for _ in range(300)]
    assert {next(iter(order)) for order in orders} == {"kill_after", "in_phase", "at_call", "torn"}
    assert {order["in_phase"][0] for order in orders if "in_phase" in order} == set(PHASES[1:])


def test_reports_add_up(tmp_path):
    path = tmp_path / "kills.json"
    first = {"trials": 3, "failures": 0, "of_kind": {"a": 3}, "details": []}
    report.add(path, "plain", first, seed=5, seconds=1.0)
    report.add(path, "hax", first, seed=6, seconds=1.0)
    second = {"trials": 2, "failures": 1, "of_kind": {"a": 1, "b": 1}, "details": [{"seed": 7}]}
    sums = report.add(path, "plain", second, seed=7, seconds=2.0)
    assert sums == {"seconds": 3.0, "trials": 5, "failures": 1, "of_kind": {"a": 4, "b": 1}}
    content = json.loads(path.read_text())
    assert content["total"]["trials"] == 8 and content["total"]["failures"] == 1
    assert [session["seed"] for session in content["sessions"]] == [5, 6, 7]
    assert content["sessions"][2]["details"] == [{"seed": 7}]
