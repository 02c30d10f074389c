"""Eight simulated devices give what one gives; batches that do not divide are refused before compilation."""

import json
import pathlib

import numpy as np
import pytest

from tests.training.tiny import run_script, start_python

_TRAIN = """
import json, pathlib, sys
import jax
from hax_jax.config import ConfigError
from hax_jax.training import load, train
from tests.training.tiny import TinyModel, tiny_experiment

folder, batch_size = pathlib.Path(sys.argv[1]), int(sys.argv[2])
try:
    settings = tiny_experiment(
        batch_size=batch_size, grad_accumulation_steps=2, num_steps=20, learning_rate=2e-3
    )
    train(settings, folder, model=TinyModel())
except ConfigError as error:
    sys.exit(f"refused: {error}")
trained = load(folder, checkpoint="latest", model=TinyModel())
assert all(len(x.sharding.device_set) == jax.device_count() for x in trained.params.values())
arrays = {**trained.params, **trained.buffers}
print(json.dumps({name: x.tolist() for name, x in arrays.items()}))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Parameters, metrics and result on 1 and on 8 devices."""
    found = {}
    for devices in (1, 8):
        folder = tmp_path_factory.mktemp(f"on_{devices}")
        process = start_python(_TRAIN, str(folder), "8", devices=devices, quickly=True)
        output, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors[-3000:]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((folder / "result.json").read_text())
        found[devices] = json.loads(output.splitlines()[-1]), lines, result
    return found


def test_parameters_and_state_are_equal_to_float32_rounding(outcomes):
    one, eight = outcomes[1][0], outcomes[8][0]
    assert one.keys() == eight.keys() == {"embedding", "inner", "outer", "mean"}
    for name in one:
        # 20 updates of 2e-3 from gradients that differ in their last bits.
        np.testing.assert_allclose(eight[name], one[name], atol=1e-5, err_msg=name)


def test_losses_and_scores_are_equal(outcomes):
    (_, one, result_one), (_, eight, result_eight) = outcomes[1], outcomes[8]
    assert [line["step"] for line in one] == [line["step"] for line in eight]
    for a, b in zip(one, eight, strict=True):
        for name in {"loss", "gate_loss", "grad_norm", "tokens"} & a.keys():
            np.testing.assert_allclose(b[name], a[name], rtol=2e-5, err_msg=f"{name} at {a['step']}")
    np.testing.assert_allclose(result_eight["test_accuracy"], result_one["test_accuracy"], atol=1e-6)


def test_batch_that_does_not_divide_is_refused(tmp_path: pathlib.Path):
    process = start_python(_TRAIN, str(tmp_path / "w"), "12", devices=8)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    line = errors.splitlines()[-1]
    assert line.startswith("refused: `training.batch_size` must be a multiple of the 8 devices, got 12; ")
    assert not (tmp_path / "w" / "config.json").exists()


@pytest.mark.timeout(300)
def test_several_gpus_run_the_kernels_of_one_with_its_share_of_the_batch():
    """A whole update with 'auto', lowered for Hopper GPUs: of a plain run and of a population."""
    found = json.loads(run_script("tests/training/kernels_of_a_step.py", devices=4))
    assert len(found) == 2
    for name, kernels in found.items():
        # At least: the convolution's gradient, hash orders, lifetimes, attention and its two gradients, and
        # three kernels of the SSD each way.
        assert len(kernels["on_one"]) >= 12, name
        assert kernels["on_four"] == kernels["on_one"], name
