"""Mutated command lines and config files: one line and status 2, in this process and in some others."""

import random
import subprocess
import sys

import pytest

from tests.faults import commands, mutations
from tests.golden_data import REPOSITORY

SEED = random.SystemRandom().randrange(2**32)


def test_thousand_mutations_are_answered_in_one_line():
    tally = commands.try_commands(1_000, SEED, 100.0)
    assert tally.failures == 0, (SEED, tally.details)
    assert tally.trials > 500
    assert set(mutations.MUTATIONS) <= set(tally.of_kind)


def test_harness_notices_a_traceback_and_a_wrong_status(monkeypatch):
    def broken(arguments):
        raise KeyError(arguments)

    monkeypatch.setattr(mutations.joint_recall, "main", broken)
    monkeypatch.setattr(mutations.create_dataset, "main", lambda arguments: 1)
    tally = commands.try_commands(60, SEED, 100.0)
    kinds = {detail["kind"] for detail in tally.details}
    assert "create_dataset.py" in kinds and len(kinds) > 2
    assert tally.failures > 20


@pytest.mark.parametrize("argument", ["--config=a_loop", "--workdir=a\udcff", "--config=" + "y/" * 3_000])
def test_in_processes_of_their_own(tmp_path, argument):
    (tmp_path / "a_loop").symlink_to("a_loop")
    script = str(REPOSITORY / "experiments" / "joint_recall.py")
    done = subprocess.run([sys.executable, script, argument], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
