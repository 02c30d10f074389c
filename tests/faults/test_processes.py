"""Two processes train one run: whichever is killed or signalled, both go on together with the same bits."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.faults.runs import Undisturbed, whole
from tests.training.tiny import ROOT

PATIENCE = 240


class Pair:
    """Both processes of a run."""

    def __init__(self, folder: pathlib.Path, cache: pathlib.Path, *arguments: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
        }
        environment.pop("XLA_FLAGS", None)
        script = str(ROOT / "tests" / "faults" / "two.py")
        self.processes = [
            subprocess.Popen(
                [sys.executable, script, str(port), str(number), str(folder), *arguments],
                env=environment,
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for number in range(2)
        ]
        self._metrics = folder / "metrics.jsonl"

    def wait_for_lines(self, lines: int) -> None:
        """Returns when the run has written so many lines of metrics."""
        end = time.monotonic() + PATIENCE
        while not self._metrics.exists() or self._metrics.read_bytes().count(b"\n") < lines:
            assert time.monotonic() < end and self.processes[0].poll() is None, self.kill()
            time.sleep(0.002)

    def ended(self) -> list[str]:
        """The last lines of both when they have ended by themselves."""
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in self.processes]
        assert [process.returncode for process in self.processes] == [0, 0], outputs
        return [output.splitlines()[-1] for output in outputs]

    def failed(self) -> list[str]:
        """The last lines of both when each has ended with an error."""
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in self.processes]
        assert all(process.returncode for process in self.processes), outputs
        return outputs

    def kill(self) -> list[str]:
        """Ends both, as a batch system does when one of them is gone."""
        for process in self.processes:
            process.kill()
        return [process.communicate()[0][-2000:] for process in self.processes]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, compiled_programs):
    """A run of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("two") / "whole"
    pair = Pair(folder, compiled_programs)
    assert pair.ended() == ["finished", "finished"]
    return Undisturbed(folder, {"digests": {}}, ("",))


@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed_and_both_are_started_again(undisturbed, tmp_path, compiled_programs, killed):
    folder = tmp_path / "run"
    pair = Pair(folder, compiled_programs)
    pair.wait_for_lines(random.randrange(5, 30))
    pair.processes[killed].kill()
    time.sleep(0.2)
    pair.kill()
    assert not (folder / "result.json").exists()
    assert Pair(folder, compiled_programs).ended() == ["finished", "finished"]
    assert list(undisturbed.wrong_at_end(folder)) == []


def test_signal_to_the_second_stops_both_at_one_step(undisturbed, tmp_path, compiled_programs):
    folder = tmp_path / "run"
    pair = Pair(folder, compiled_programs)
    pair.wait_for_lines(6)
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.ended() == ["interrupted", "interrupted"]
    assert whole(folder / "checkpoints")
    assert Pair(folder, compiled_programs).ended() == ["finished", "finished"]
    assert list(undisturbed.wrong_at_end(folder)) == []


def test_last_checkpoint_that_cannot_be_written_ends_both(undisturbed, tmp_path, compiled_programs):
    folder = tmp_path / "run"
    begin = time.monotonic()
    first, second = Pair(folder, compiled_programs, "full").failed()
    # The second does not wait until JAX gives up the first.
    assert time.monotonic() - begin < 100
    assert "No space left on device" in first
    assert "The first process could not write a checkpoint" in second
    assert not (folder / "result.json").exists()
    assert Pair(folder, compiled_programs).ended() == ["finished", "finished"]
    assert list(undisturbed.wrong_at_end(folder)) == []


def test_what_several_processes_leave_is_what_one_can_go_on_from(undisturbed):
    result = json.loads((undisturbed.folder / "result.json").read_text())
    assert result["steps"] == 60
    sessions = json.loads((undisturbed.folder / "run.json").read_text())["sessions"]
    assert sessions[-1]["device"]["hosts"] == 2 and sessions[-1]["device"]["count"] == 2
    assert sorted(whole(undisturbed.folder / "checkpoints")) == [48, 54, 60]
