"""Members of a population: what each would be alone, together in one program."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hax_jax.config import ConfigError, Experiment, ModelConfig, TrainingConfig
from hax_jax.training import NonFiniteError, load, train
from hax_jax.training.checkpoints import Checkpoints, host_arrays
from hax_jax.training.initialise import prepare
from hax_jax.training.members import write_member
from hax_jax.training.metrics import read_metrics
from hax_jax.training.optimizer import make_optimizer
from hax_jax.training.sharding import make_mesh
from tests.training.test_loop import _interrupt_at
from tests.training.tiny import VOCAB_SIZE, TinyModel, TinyOutput, lines_without_timing, tiny_experiment

SMALL = {"population_seeds": "3,0", "population_learning_rates": "0.02,0.005"}
# 12 updates of at most 0.02; matmuls of all members at once add up in another order.
TOLERANCE = 1e-5


def population(**training):
    return tiny_experiment(**{**SMALL, **training})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("population")
    return folder, train(population(), folder, model=TinyModel())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same members, each in a run of its own."""
    folders = {}
    for member in population().members:
        folders[member.name] = tmp_path_factory.mktemp("alone")
        train(member, folders[member.name], model=TinyModel())
    return folders


def newest(folder):
    return Checkpoints(folder, 1, print).newest()


def assert_close_lines(lines, wanted):
    assert [(line["step"], line["kind"], line.keys()) for line in lines] == [
        (line["step"], line["kind"], line.keys()) for line in wanted
    ]
    for line, other in zip(lines, wanted, strict=True):
        for name, value in line.items():
            if name != "kind":
                np.testing.assert_allclose(value, other[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_each_member_is_the_run_that_it_is_alone(finished, alone):
    folder, result = finished
    for member in population().members:
        mine, other = folder / "members" / member.name, alone[member.name]
        assert json.loads((mine / "config.json").read_text()) == json.loads(
            (other / "config.json").read_text()
        )
        assert_close_lines(lines_without_timing(mine), lines_without_timing(other))
        for kind in ("checkpoints", "best"):
            got, wanted = newest(mine / kind), newest(other / kind)
            assert (got.step, got.arrays.keys()) == (wanted.step, wanted.arrays.keys())
            for name, array in wanted.arrays.items():
                np.testing.assert_allclose(
                    got.arrays[name], array, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name
                )
        found, wanted = (json.loads((x / "result.json").read_text()) for x in (mine, other))
        assert (found["best_step"], found["stopped"]) == (wanted["best_step"], "finished")
        np.testing.assert_allclose(found["test_accuracy"], wanted["test_accuracy"], atol=1e-6)
    assert len({entry["test_loss"] for entry in result.members}) == 4


def test_members_are_every_rate_with_every_seed():
    rates_and_seeds = [(m.training.learning_rate, m.seed) for m in population().members]
    assert rates_and_seeds == [(0.02, 3), (0.02, 0), (0.005, 3), (0.005, 0)]
    assert [m.name for m in population(population_learning_rates="").members] == [
        "tiny_lr0.02_seed3",
        "tiny_lr0.02_seed0",
    ]
    assert all(m.members == () for m in population().members)
    assert Experiment().members == ()


def test_result_is_the_mean_and_the_spread_of_the_members(finished):
    folder, result = finished
    accuracies = [member["test_accuracy"] for member in result.members]
    np.testing.assert_allclose(result.test_accuracy, np.mean(accuracies))
    np.testing.assert_allclose(result.test_accuracy_std, np.std(accuracies, ddof=1))
    assert json.loads((folder / "result.json").read_text()) == dataclasses.asdict(result)
    assert train(population(), folder, model=TinyModel()) == result


def test_a_member_is_loaded_as_any_run(finished):
    folder, result = finished
    entry = result.members[2]
    trained = load(folder / "members" / entry["name"], model=TinyModel())
    assert trained.step == entry["best_step"]
    assert trained.experiment.seed == 3 and trained.experiment.training.learning_rate == 0.005


def test_interrupted_population_ends_with_the_same_bits(finished, tmp_path):
    folder, result = finished
    assert _interrupt_at(2, population(), tmp_path).stopped == "interrupted"
    assert train(population(), tmp_path, model=TinyModel()) == result
    assert lines_without_timing(tmp_path) == lines_without_timing(folder)
    got, wanted = newest(tmp_path / "checkpoints"), newest(folder / "checkpoints")
    for name, array in wanted.arrays.items():
        np.testing.assert_array_equal(got.arrays[name], array, err_msg=name)


def test_a_member_of_an_unfinished_population_goes_on_alone(alone, tmp_path):
    _interrupt_at(2, population(), tmp_path / "all")
    member = population().members[1]
    write_member(tmp_path / "all", 1, tmp_path / "one")
    result = train(member, tmp_path / "one", model=TinyModel())
    assert result.steps == 12
    assert_close_lines(lines_without_timing(tmp_path / "one"), lines_without_timing(alone[member.name]))
    with pytest.raises(ConfigError, match=r"`member` must be 0\.\.3, got 4"):
        write_member(tmp_path / "all", 4, tmp_path / "other")
    with pytest.raises(ConfigError, match="this is no population"):
        write_member(alone[member.name], 0, tmp_path / "other")


class Fragile(nnx.Module):
    """Its loss is not a number once its weights have moved far."""

    def __init__(self):
        self.weight = nnx.Param(jnp.zeros((4, VOCAB_SIZE)))

    def __call__(self, tokens, *, padding_mask, key, train):
        far = jnp.max(jnp.abs(self.weight[...])) > 0.5
        return TinyOutput(self.weight[...][tokens % 4], jnp.where(far & train, jnp.nan, 0.0))


def test_a_member_that_is_not_finite_stops_alone_and_is_counted(tmp_path, capsys):
    settings = population(
        population_seeds="", population_learning_rates="0.3,0.01", max_refused_updates=1, log_every_steps=1
    )
    result = train(settings, tmp_path, model=Fragile())
    broken, whole = result.members
    assert (broken["stopped"], broken["refused_updates"], broken["test_accuracy"]) == ("non-finite", 2, None)
    assert (whole["stopped"], whole["refused_updates"]) == ("finished", 0)
    assert result.test_accuracy == whole["test_accuracy"] and result.test_accuracy_std is None
    assert result.refused_updates == 2
    said = capsys.readouterr().out
    assert "tiny_lr0.3_seed0 stopped: " in said and "; 1 stopped on the way" in said
    steps = {
        member: [line["step"] for line in read_metrics(tmp_path) if line.get("member") == member]
        for member in (0, 1)
    }
    assert max(steps[1]) == 12 and max(steps[0]) < 12
    folder = tmp_path / "members" / "tiny_lr0.3_seed0"
    assert (folder / "non_finite.json").exists() and not (folder / "result.json").exists()


def test_population_without_a_member_left_ends(tmp_path):
    settings = population(population_learning_rates="0.3", max_refused_updates=0)
    with pytest.raises(NonFiniteError, match="All 2 members stopped"):
        train(settings, tmp_path, model=Fragile())


def test_members_begin_as_they_do_alone():
    model = ModelConfig(
        arch="mamba",
        vocab_size=VOCAB_SIZE,
        hidden_size=4,
        num_layers=1,
        state_size=2,
        time_step_rank=1,
        sparse_arch="sign_bin_lsh",
        num_hash=2,
    )
    experiment = dataclasses.replace(population(), model=model)
    mesh = make_mesh()
    optimizer = make_optimizer(experiment.training)
    together = prepare(experiment, None, optimizer, mesh).make()
    for index, member in enumerate(experiment.members):
        other = prepare(member, None, optimizer, mesh).make()
        mine, wanted = host_arrays(together), host_arrays(other)
        for name, array in wanted.items():
            np.testing.assert_array_equal(mine[name][index], array, err_msg=name)


@pytest.mark.parametrize("value", ["0,0", "a", "1.5", "-1", "0,", " "])
def test_seeds_that_make_no_sense_are_refused(value):
    with pytest.raises(ConfigError, match=r"`training\.population_seeds` must be up to 100 integers in 0"):
        TrainingConfig(population_seeds=value)
