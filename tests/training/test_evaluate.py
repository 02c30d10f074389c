"""Scoring a finished run from the command line, and tables of other sizes in the ids of the training."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import evaluate
from hax_jax.config import ConfigError, ModelConfig
from hax_jax.data import make_split
from hax_jax.training import train
from hax_jax.training.relabel import RelabeledSplit, check_fits, new_names
from tests.training.tiny import DATA, VOCAB_SIZE, TinyModel, tiny_experiment

MODEL = ModelConfig(
    arch="mamba", vocab_size=VOCAB_SIZE, hidden_size=4, num_layers=1, state_size=2, time_step_rank=1,
    chunk_size=8,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose settings describe its model."""
    folder = tmp_path_factory.mktemp("run")
    settings = dataclasses.replace(tiny_experiment(num_steps=4, eval_every_steps=2), model=MODEL)
    return folder, train(settings, folder)


def test_repeats_the_scores_of_the_run(run, tmp_path, capsys):
    folder, result = run
    assert evaluate.main([str(folder), f"--json={tmp_path / 'scores.json'}"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["accuracy"], scores["loss"], scores["step"]) == (
        result.test_accuracy, result.test_loss, result.best_step
    )
    assert scores["by_size"] == result.test_by_size
    out = capsys.readouterr().out
    assert f"accuracy {100 * result.test_accuracy:.2f}%" in out
    assert "n_context  n_key     1     2" in out


def test_other_split_checkpoint_batch_and_sizes(run, tmp_path):
    folder, result = run

    def scores(*flags):
        assert evaluate.main([str(folder), f"--json={tmp_path / 'scores.json'}", *flags]) == 0
        return json.loads((tmp_path / "scores.json").read_text())

    valid = scores("--split=valid")
    assert valid["accuracy"] == result.best_valid_accuracy
    assert scores("--split=valid", "--batch_size=5")["accuracy"] == pytest.approx(valid["accuracy"], abs=1e-6)
    assert scores("--checkpoint=latest")["step"] == 4
    small = scores("--data.max_n_context=1", "--data.n_eval_per_pair=7")
    assert small["by_size"]["n_context"] == [1]
    assert small["by_size"]["num_items"] == [[7, 7]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "WORKDIR"),
        (["NOWHERE"], "no config.json"),
        (["RUN", "--split=train"], "`--split` must be valid or test"),
        (["RUN", "--checkpoint=last"], "one of best, latest"),
        (["RUN", "--batch_size=0"], "--batch_size"),
        (["RUN", "--data.max_n_key=999"], "the run's vocabulary, are enough"),
        (["RUN", "--data.max_n_key=x"], "max_n_key"),
        (["RUN", "--data.min_n_key=3"], "data.min_n_key"),
        (["RUN", "--data.eval_source=dataset"], "data.data_dir"),
        (["RUN", "--data.colour=3"], "data.colour"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, flags, message, capsys):
    places = {"RUN": str(run[0]), "NOWHERE": str(tmp_path / "nowhere")}
    assert evaluate.main([places.get(flag, flag) for flag in flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_run_without_a_whole_checkpoint_is_status_1(run, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((run[0] / "config.json").read_bytes())
    assert evaluate.main([str(tmp_path)]) == 1
    assert "No whole checkpoint" in capsys.readouterr().err


def test_run_of_a_module_of_its_own_is_explained(tmp_path, capsys):
    train(tiny_experiment(num_steps=1), tmp_path, model=TinyModel())
    assert evaluate.main([str(tmp_path)]) == 2
    assert "load(workdir, model=...)" in capsys.readouterr().err


def test_names_of_smaller_tables():
    """Ids 10-11 values, 12-13 keys, 14-15 contexts; with one key at most contexts begin at 13."""
    small = dataclasses.replace(DATA, max_n_key=1)
    np.testing.assert_array_equal(new_names(small, DATA), [*range(13), 14, 15])
    np.testing.assert_array_equal(new_names(DATA, DATA), range(16))


def test_names_of_larger_tables():
    """What the training knows keeps its ids; a third key and a third context get 16 and 17."""
    large = dataclasses.replace(DATA, max_n_key=3, max_n_context=3)
    np.testing.assert_array_equal(new_names(large, DATA), [*range(12), 12, 13, 16, 14, 15, 17])
    assert check_fits(large, DATA, vocab_size=18) == 2
    assert check_fits(DATA, DATA, vocab_size=16) == 0
    with pytest.raises(ConfigError, match=r"`data\.max_n_context` must be such that 17 token ids"):
        check_fits(large, DATA, vocab_size=17)


def test_relabelled_items_are_items_of_the_training_layout():
    """Tables that both tasks have are the same items but for the names of their contexts."""
    small = dataclasses.replace(DATA, max_n_key=1)
    split = make_split(small, "test")
    raw = next(split.iterator(6, repeat=False))
    own, renamed = split.materialize(raw), RelabeledSplit(split, small, DATA).materialize(raw)
    is_context = np.asarray(own.tokens) >= 13
    assert is_context.any()
    np.testing.assert_array_equal(np.asarray(renamed.tokens), np.asarray(own.tokens) + is_context)
    np.testing.assert_array_equal(renamed.tokens[:, 1:], renamed.targets[:, :-1])
    np.testing.assert_array_equal(renamed.score_mask, own.score_mask)
