"""Several steps in one program: the same bits as one by one, whatever falls between them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from hax_jax.config import TrainingConfig
from hax_jax.data.dataset import Plan, create_dataset
from hax_jax.models import build_model
from hax_jax.training import make_optimizer, train
from hax_jax.training.checkpoints import Checkpoints
from hax_jax.training.dispatch import in_one_graph, make_dispatch, steps_per_dispatch, steps_until_due
from hax_jax.training.state import make_state, split_model
from hax_jax.training.step import make_train_step, metrics_of
from tests.training.test_loop import _interrupt_at
from tests.training.test_step import items
from tests.training.tiny import (
    DATA,
    TinyModel,
    lines_without_timing,
    tiny_experiment,
    tiny_hax_model,
)

HAX = tiny_hax_model(data_max_length=32)


def outcome(folder):
    """All that a run computes: its metrics, its checkpoints and its result."""
    arrays = {}
    for kind in ("checkpoints", "best"):
        restored = Checkpoints(folder / kind, 1, print).newest()
        arrays |= {f"{kind} {restored.step} {name}": array for name, array in restored.arrays.items()}
    return lines_without_timing(folder), arrays, json.loads((folder / "result.json").read_text())


def assert_same_bits(folder, other):
    (lines, arrays, result), (other_lines, other_arrays, other_result) = outcome(folder), outcome(other)
    assert lines == other_lines
    assert result == other_result
    assert arrays.keys() == other_arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, other_arrays[name], err_msg=name)


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train(tiny_experiment(steps_per_dispatch=1), folder, model=TinyModel())
    return folder


@pytest.mark.parametrize("count", [2, 100])
def test_dispatches_of_any_length_give_the_same_bits(one_by_one, tmp_path, count):
    """Logging every 2, checkpoints every 3 and validation every 4 steps cut them to 1 and 2 steps."""
    train(tiny_experiment(steps_per_dispatch=count), tmp_path, model=TinyModel())
    assert_same_bits(tmp_path, one_by_one)


def test_long_dispatches_of_accumulated_batches_give_the_same_bits(tmp_path):
    """Nothing is due on the way: all six updates are one dispatch, each of two batches."""
    intervals = dict.fromkeys(("log_every_steps", "eval_every_steps", "checkpoint_every_steps"), 6)
    for name, count in (("one", 1), ("all", 6)):
        experiment = tiny_experiment(
            steps_per_dispatch=count, num_steps=6, grad_accumulation_steps=2, **intervals
        )
        train(experiment, tmp_path / name, model=TinyModel())
    assert_same_bits(tmp_path / "all", tmp_path / "one")


def test_a_model_with_sparse_attention_gives_the_same_bits():
    structure, params, buffers = split_model(build_model(HAX, rngs=nnx.Rngs(0)))
    training = tiny_experiment(num_steps=8, warmup_steps=0, log_every_steps=8).training
    optimizer = make_optimizer(training)
    dispatch = jax.jit(make_dispatch(make_train_step(structure, optimizer, training)))
    raws = jax.tree.map(lambda x: np.asarray(x)[:24].reshape(3, 1, 8, *x.shape[1:]), items())
    start = make_state(params, buffers, optimizer, seed=0)
    at_once = dispatch(start, raws, np.int32(3))
    one_by_one = start
    for index in range(3):
        raw = jax.tree.map(lambda x, i=index: x[i : i + 1], raws)
        one_by_one = dispatch(one_by_one, raw, np.int32(1))
    same = lambda tree: jax.tree.map(np.asarray, dataclasses.replace(tree, key=0))  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, same(one_by_one), same(at_once))
    metrics = [jax.jit(lambda state: metrics_of(training, state))(x) for x in (one_by_one, at_once)]
    jax.tree.map(np.testing.assert_array_equal, *metrics)
    assert int(at_once.step) == 3


def test_a_run_may_go_on_with_another_number(one_by_one, tmp_path):
    assert _interrupt_at(2, tiny_experiment(steps_per_dispatch=2), tmp_path).stopped == "interrupted"
    train(tiny_experiment(steps_per_dispatch=1), tmp_path, model=TinyModel())
    assert_same_bits(tmp_path, one_by_one)


@pytest.mark.parametrize(
    ("settings", "platform", "positions", "wanted"),
    [
        ({}, "cuda", 1 << 20, 20),
        ({}, "cuda", 1 << 15, 100),
        ({}, "cpu", 1 << 15, 1),
        ({"steps_per_dispatch": 7}, "cpu", 1 << 15, 7),
        ({"log_every_steps": 50, "eval_every_steps": 75}, "cuda", 1 << 20, 5),
        ({"log_every_steps": 50, "eval_every_steps": 75}, "cuda", 1 << 15, 25),
        ({"num_steps": 12_345}, "cuda", 1 << 20, 5),
        ({"num_steps": 12_347}, "cuda", 1 << 15, 1),
    ],
)
def test_number_without_a_setting_divides_everything(settings, platform, positions, wanted):
    assert steps_per_dispatch(TrainingConfig(**settings), platform, positions) == wanted


@pytest.mark.parametrize(
    ("count", "positions", "wanted"),
    [(100, 1 << 17, True), (2, 1, True), (1, 1, False), (101, 1, False), (100, (1 << 17) + 1, False)],
)
def test_a_few_small_updates_are_one_graph(count, positions, wanted):
    assert in_one_graph(count, positions) == wanted


def test_dispatches_end_where_something_is_due_and_begin_where_the_step_says():
    training = TrainingConfig(
        num_steps=47, log_every_steps=10, eval_every_steps=15, checkpoint_every_steps=20
    )
    step, ends = 0, []
    while step < 47:
        step += steps_until_due(step, training, 4)
        ends.append(step)
    assert ends == [4, 8, 10, 14, 15, 19, 20, 24, 28, 30, 34, 38, 40, 44, 45, 47]
    # From the middle of a dispatch, as after a change of the setting, back into the same steps.
    assert 5 + steps_until_due(5, training, 4) == 8


def test_a_data_set_kept_on_the_device_trains_to_the_bits_of_one_that_is_read(tmp_path):
    data = dataclasses.replace(
        DATA, min_n_context=2, min_n_key=2, train_source="dataset", data_dir=str(tmp_path / "data")
    )
    create_dataset(Plan(data, n_train_per_pair=9), report=lambda line: None)
    for most in (0, 1):
        kept = dataclasses.replace(data, keep_on_device_mib=most)
        train(tiny_experiment(data=kept, num_steps=6), tmp_path / str(most), model=TinyModel())
    assert_same_bits(tmp_path / "0", tmp_path / "1")
