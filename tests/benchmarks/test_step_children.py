"""Processes that compile side by side and measure in turn: their order, their failures, their end."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.step_children import Children
from experiments.results import CHECKOUT

PARENT = """
import sys, time
from benchmarks.step_children import Children
from tests.benchmarks.test_step_children import prepare

with Children(prepare) as children:
    children.compile(["lock " + sys.argv[1]], 1, time.perf_counter() + 60)
    time.sleep(600)
"""


def prepare(name):
    """Stands for the compilation of a config, and for what goes wrong there."""
    kind, _, argument = name.partition(" ")
    if kind == "refused":
        raise ValueError("it does\nnot fit")
    if kind == "dead":
        print("out of memory", file=sys.stderr)
        os._exit(3)
    if kind == "slow":
        time.sleep(600)
    if kind == "lock":
        file = os.open(argument, os.O_RDWR)
        fcntl.flock(file, fcntl.LOCK_EX)

    def measure(seconds):
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.time()
        time.sleep(seconds)
        return {"begin": begin, "end": time.time(), "sees": os.environ.get("CUDA_VISIBLE_DEVICES")}

    return measure


def soon(seconds: float = 60) -> float:
    return time.perf_counter() + seconds


def test_they_measure_in_order_and_a_failure_stays_alone(capfd):
    names = ["refused", "a", "dead", "killed", "b"]
    with Children(prepare) as children:
        children.compile(names, 3, soon())
        measured = dict(children.measure(0.2, lambda: True))
    # Those that failed while they compiled come first.
    assert list(measured)[2:] == ["a", "killed", "b"] and set(measured) == set(names)
    assert measured["refused"]["error"] == "ValueError: it does not fit"
    assert measured["dead"]["error"] == "ended with exit status 3: out of memory"
    assert measured["killed"]["error"].startswith("ended with exit status -9")
    assert measured["b"]["begin"] >= measured["a"]["end"]
    printed, errors = capfd.readouterr()
    assert "compiling refused failed: ValueError" in printed and "compiled a in " in printed and not errors


def test_what_is_late_is_stopped_and_named(capsys):
    with Children(prepare) as children:
        children.compile(["slow", "a"], 1, soon(1))
        assert not children._begun[0].process.is_alive()
        assert not list(children.measure(0.0, lambda: True))
    assert "not compiled in time: slow, a" in capsys.readouterr().out


def test_nothing_begins_after_the_time():
    answers = iter([True, False])
    with Children(prepare) as children:
        children.compile(["a", "b"], 2, soon())
        assert [name for name, _ in children.measure(0.0, lambda: next(answers, False))] == ["a"]
    assert not any(child.process.is_alive() for child in children._begun)


def test_two_gpus_measure_side_by_side_and_each_one_thing_at_a_time(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with Children(prepare, ("2", "5")) as children:
        children.compile(["a", "b", "c", "d"], 4, soon())
        measured = dict(children.measure(1.0, lambda: True))
    assert [measured[name]["gpu"] for name in "abcd"] == ["2", "5", "2", "5"]
    assert all(facts["sees"] == facts["gpu"] for facts in measured.values())
    a, b, c, d = (measured[name] for name in "abcd")
    assert c["begin"] >= a["end"] and d["begin"] >= b["end"]
    assert max(a["begin"], b["begin"]) < min(a["end"], b["end"])


@pytest.mark.timeout(120)
def test_they_end_with_a_parent_that_is_killed(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(lock)], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline().startswith("compiled lock")
    with lock.open() as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        parent.kill()
        parent.communicate()
        # The lock is free when the process that holds it is dead; otherwise the test does not end in time.
        fcntl.flock(file, fcntl.LOCK_EX)
