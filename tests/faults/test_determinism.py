"""The contract of docs/determinism.md between processes; and a second run in a folder can do nothing."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.faults import power
from tests.faults.runs import Undisturbed
from tests.training.tiny import ROOT

_TRAIN = """
import pathlib, sys
from hax_jax.config import ConfigError
from tests.faults.forms import FORMS

try:
    print(FORMS["plain"].train(pathlib.Path(sys.argv[1])).stopped)
except ConfigError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Undisturbed:
    """A finished run of this process."""
    return power.undisturbed("plain", tmp_path_factory.mktemp("reference"))[0]


def start(folder: pathlib.Path, cache: pathlib.Path, **variables: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-c", _TRAIN, str(folder)],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_another_process_compiling_for_itself_gives_the_same_bits(undisturbed, tmp_path):
    process = start(tmp_path / "run", tmp_path / "cache", PYTHONHASHSEED="7", TZ="Asia/Tokyo", LC_ALL="C")
    output, errors = process.communicate(timeout=280)
    assert output.splitlines()[-1] == "finished", errors[-2000:]
    assert list(undisturbed.wrong_at_end(tmp_path / "run")) == []


def test_second_process_in_a_folder_is_refused_and_the_first_does_not_notice(
    undisturbed, tmp_path, compiled_programs
):
    folder = tmp_path / "run"
    first = start(folder, compiled_programs)
    while not (folder / "metrics.jsonl").exists():
        assert first.poll() is None
    second = start(folder, compiled_programs)
    output, errors = first.communicate(timeout=280)
    assert output.splitlines()[-1] == "finished", errors[-2000:]
    assert list(undisturbed.wrong_at_end(folder)) == []
    output, errors = second.communicate(timeout=280)
    # A second one that was slow found the run finished, and had nothing to do.
    refused = f"process {first.pid} on" in errors and "is training in it" in errors
    assert refused or output.splitlines() == [
        f"this run has finished before; its result is in {folder}/result.json",
        "finished",
    ], (output, errors[-2000:])
