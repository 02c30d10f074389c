"""Whole runs on packed rows: the same training, validation and test as on padded rows, on any devices."""

import dataclasses
import pathlib

import numpy as np
import pytest

from hax_jax.config import ConfigError, Experiment
from hax_jax.training import train
from hax_jax.training.metrics import read_metrics
from tests.compilation import quickly as compilation
from tests.training.tiny import (
    TinyModel,
    lines_without_timing,
    start_python,
    tiny_experiment,
    tiny_hax_model,
)

# Everything is held to a tolerance.
__all__ = ["compilation"]

MODEL = tiny_hax_model(sparse_keys=8, precision="float32")


def experiment(packing: int) -> Experiment:
    settings = tiny_experiment(
        batch_size=4, grad_accumulation_steps=2, eval_batch_size=6, num_steps=4, eval_every_steps=2
    )
    data = dataclasses.replace(settings.data, packing=packing)
    return dataclasses.replace(settings, model=MODEL, data=data)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return folder, train(experiment(packing=30), folder)


def test_a_packed_run_is_the_padded_run(packed, tmp_path):
    folder, result = packed
    padded = train(experiment(packing=0), tmp_path)
    assert result.test_accuracy == pytest.approx(padded.test_accuracy, abs=1e-6)
    assert result.test_loss == pytest.approx(padded.test_loss, rel=1e-4)
    assert result.test_by_size["num_items"] == padded.test_by_size["num_items"]
    np.testing.assert_allclose(result.test_by_size["accuracy"], padded.test_by_size["accuracy"], atol=1e-6)
    lines, others = lines_without_timing(folder), lines_without_timing(tmp_path)
    assert [(line["step"], line["kind"]) for line in lines] == [(x["step"], x["kind"]) for x in others]
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"kind"}:
            assert line[name] == pytest.approx(other[name], rel=2e-4, abs=1e-6), (line["step"], name)
    # Real tokens are the same, positions fewer: the padded rows of 8 items have 8 x 21.
    rates = [line for line in read_metrics(folder) if "positions_per_s" in line]
    for rate in rates:
        assert rate["positions_per_s"] / rate["tokens_per_s"] < 8 * 21 / rate["tokens"] - 0.1


_TRAIN = """
import pathlib, sys
from hax_jax.training import train
from tests.training.test_packed_run import experiment
train(experiment(packing=30), pathlib.Path(sys.argv[1]))
"""


def test_two_devices_share_the_rows(packed, tmp_path):
    process = start_python(_TRAIN, str(tmp_path), devices=2, quickly=True)
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    one, two = (lines_without_timing(folder) for folder in (packed[0], tmp_path))
    for line, other in zip(one, two, strict=True):
        for name in line.keys() - {"kind"}:
            assert other[name] == pytest.approx(line[name], rel=2e-4, abs=1e-6), (line["step"], name)


def test_a_model_that_knows_nothing_of_packed_rows_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(ConfigError, match=r"`data\.packing` must be 0 for a model .* got 'TinyModel'"):
        train(experiment(packing=30), tmp_path / "run", model=TinyModel())
    assert not (tmp_path / "run" / "config.json").exists()
