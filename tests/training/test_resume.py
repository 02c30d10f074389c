"""A run that is killed again and again ends with the bits of one that was not."""

import json
import pathlib
import random
import signal
import time

import numpy as np

from hax_jax.training.checkpoints import Checkpoints
from tests.training.tiny import lines_without_timing, start_python

_TRAIN = """
import pathlib, sys
from hax_jax.training import train
from tests.training.tiny import TinyModel, tiny_experiment

settings = tiny_experiment(
    num_steps=int(sys.argv[2]), log_every_steps=7, eval_every_steps=20, checkpoint_every_steps=15,
    tensorboard=True,
)
print(train(settings, pathlib.Path(sys.argv[1]), model=TinyModel()).stopped)
"""
STEPS = 400


def run_to_the_end(folder, cache, kills=()):
    """Starts the same command until it finishes; a kill is a signal and the metric lines to wait for."""
    kills = list(kills)
    starts = 0
    while True:
        starts += 1
        process = start_python(_TRAIN, str(folder), str(STEPS), cache=cache)
        if kills:
            number, lines = kills.pop(0)
            _wait_for_lines(folder / "metrics.jsonl", lines, process)
            process.send_signal(number)
        output, errors = process.communicate(timeout=280)
        if process.returncode == 0 and output.splitlines()[-1] == "finished":
            return starts
        interrupted = process.returncode == 0 and output.splitlines()[-1] == "interrupted"
        assert interrupted or process.returncode == -signal.SIGKILL, errors[-3000:]


def _wait_for_lines(path, lines, process):
    for _ in range(60_000):
        if process.poll() is not None or (path.exists() and path.read_bytes().count(b"\n") >= lines):
            return
        time.sleep(0.002)
    raise AssertionError(f"{path} never had {lines} lines")


def arrays_in(folder: pathlib.Path):
    restored = Checkpoints(folder, 1, print).newest()
    meta = {name: restored.meta.get(name) for name in ("data", "best", "last_valid")}
    return restored.step, restored.arrays, meta


def test_killed_at_random_steps_ends_with_the_same_bits(tmp_path, compiled_programs):
    generator, cache = random.Random(20), compiled_programs
    assert run_to_the_end(tmp_path / "whole", cache) == 1
    total = (tmp_path / "whole" / "metrics.jsonl").read_bytes().count(b"\n")
    moments = sorted(generator.sample(range(1, total - 2), 3))
    kills = zip((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL), moments, strict=True)
    starts = run_to_the_end(tmp_path / "killed", cache, kills)
    assert starts >= 3, "the run was over before it could be killed"

    assert lines_without_timing(tmp_path / "killed") == lines_without_timing(tmp_path / "whole")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("killed", "whole")]
    assert results[0] == results[1]
    for kind in ("checkpoints", "best"):
        (step, arrays, meta), (whole_step, whole_arrays, whole_meta) = (
            arrays_in(tmp_path / name / kind) for name in ("killed", "whole")
        )
        assert (step, meta) == (whole_step, whole_meta)
        assert arrays.keys() == whole_arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, whole_arrays[name], err_msg=name)
