"""The run of the GPU tests: what is counted, also of one that is cut short. With tests that need no GPU."""

import os
import sys

import pytest

from tests import gpu

TESTS = """
import pathlib, time

def test_that_ends():
    pass

def test_that_fails():
    assert 1 == 2

def test_that_takes_long():
    pathlib.Path(__file__).with_name("begun").touch()
    time.sleep({seconds})
"""


def counted(folder, seconds: float, limit: float | None):
    (folder / "test_some.py").write_text(TESTS.format(seconds=seconds))
    (folder / "pytest.ini").write_text("[pytest]")
    log = folder / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"--rootdir={folder}",
        f"--junitxml={log}",
        "-p",
        "no:cacheprovider",
    ]
    status, cut_short = gpu.run([*command, f"--confcutdir={folder}", str(folder)], dict(os.environ), limit)
    (found,) = gpu.read(log).values()
    return status, cut_short, found


def test_a_whole_run_is_counted(tmp_path):
    status, cut_short, found = counted(tmp_path, 0, None)
    assert (status, cut_short, found["passed"], found["failed"]) == (1, False, 2, 1)
    assert found["failures"][0].startswith("test_that_fails: assert 1 == 2")


@pytest.mark.timeout(120)
def test_of_a_run_that_is_cut_short_what_ended_is_counted(tmp_path):
    status, cut_short, found = counted(tmp_path, 100, 20)
    assert (tmp_path / "begun").exists()
    assert (status, cut_short, found["passed"], found["failed"]) == (2, True, 1, 1)
