"""Whole runs of a tiny model: what they leave behind, what they refuse, how they stop."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hax_jax.config import ConfigError
from hax_jax.data import make_split
from hax_jax.training import (
    CheckpointError,
    NonFiniteError,
    TokenFunction,
    TrainingError,
    load,
    score,
    train,
)
from hax_jax.training.evaluate import Evaluator
from hax_jax.training.metrics import read_metrics
from hax_jax.training.workdir import RunFolder
from tests.training.test_step import Breaking
from tests.training.tiny import (
    VOCAB_SIZE,
    TinyModel,
    full_disk_at,
    lines_without_timing,
    tiny_experiment,
    tiny_hax_model,
)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its folder, its result, and the module it was given."""
    folder, model = tmp_path_factory.mktemp("run") / "new" / "folder", TinyModel()
    return folder, train(tiny_experiment(), folder, model=model), model


def test_run_leaves_everything_that_is_promised(finished):
    folder, result, _ = finished
    assert result.stopped == "finished"
    assert result.steps == 12
    stored = json.loads((folder / "config.json").read_text())
    assert stored["experiment"] == tiny_experiment().to_dict()
    assert json.loads((folder / "result.json").read_text()) == dataclasses.asdict(result)
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [4, 8, 12]
    assert [line["step"] for line in lines if line["kind"] == "test"] == [12]
    assert sorted(int(path.name) for path in (folder / "checkpoints").iterdir()) == [6, 9, 12]
    rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
    np.testing.assert_allclose(rates, [0.01, *[0.02] * 5], rtol=1e-6)


def test_best_is_by_validation_and_is_what_is_tested(finished):
    folder, result, _ = finished
    valid = {line["step"]: line["accuracy"] for line in read_metrics(folder) if line["kind"] == "valid"}
    assert result.best_valid_accuracy == max(valid.values())
    # Of equal accuracies the first counts.
    assert result.best_step == min(step for step, x in valid.items() if x == max(valid.values()))
    trained = load(folder, model=TinyModel(seed=5))
    assert trained.step == result.best_step
    scores = score(trained, "test", tiny_experiment().data)
    assert (scores.accuracy, scores.loss) == (result.test_accuracy, result.test_loss)
    assert scores.table() == result.test_by_size
    assert result.test_by_size["num_items"] == [[3, 3], [3, 3]]
    mean = np.mean(result.test_by_size["accuracy"])
    np.testing.assert_allclose(mean, result.test_accuracy, rtol=1e-6)
    assert load(folder, checkpoint="latest", model=TinyModel()).step == 12


def test_module_given_is_not_changed(finished):
    given, fresh = (jax.tree.leaves(nnx.state(model)) for model in (finished[2], TinyModel()))
    for mine, other in zip(given, fresh, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_finished_run_started_again_only_reports(finished, capsys):
    folder, result, _ = finished
    before = files_of(folder)
    assert train(tiny_experiment(), folder, model=TinyModel()) == result
    assert "finished before" in capsys.readouterr().out
    assert files_of(folder) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 3}, "seed=0 (here 3)"),
        ({"learning_rate": 0.1, "num_steps": 9}, "training.num_steps=12 (here 9), training.learning_rate="),
    ],
)
def test_folder_of_another_run_is_refused_by_field(finished, change, named):
    before = files_of(finished[0])
    with pytest.raises(ConfigError) as error:
        train(tiny_experiment(**change), finished[0], model=TinyModel())
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert files_of(finished[0]) == before


def test_folder_of_another_model_is_refused(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"module='TinyModel' \(here 'Breaking'\)"):
        train(tiny_experiment(), finished[0], model=Breaking("loss"))
    # A module of the same name but another size passes config.json; its checkpoints do not fit.
    interrupted = tiny_experiment(num_steps=50)
    _interrupt_at(3, interrupted, tmp_path / "w")
    with pytest.raises(ConfigError, match=r"params/embedding='float32\[20, 8\]' \(here 'float32\[20, 4\]'\)"):
        train(interrupted, tmp_path / "w", model=TinyModel(width=4))


def test_damaged_config_file_and_strange_folders_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"format_version": 1, "exp')
    with pytest.raises(ConfigError, match=r"config\.json is readable"):
        train(tiny_experiment(), tmp_path, model=TinyModel())
    (tmp_path / "config.json").write_text('{"format_version": 7}')
    with pytest.raises(ConfigError, match="format version 7"):
        train(tiny_experiment(), tmp_path, model=TinyModel())
    (tmp_path / "config.json").unlink()
    (tmp_path / "best" / "100").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        train(tiny_experiment(), tmp_path, model=TinyModel())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="a folder that can be written"):
        train(tiny_experiment(), tmp_path / "file", model=TinyModel())


def test_second_run_in_a_folder_is_refused(tmp_path):
    message = f"process {os.getpid()} on .* is training in it"
    with RunFolder(tmp_path, tiny_experiment()), pytest.raises(ConfigError, match=message):
        train(tiny_experiment(), tmp_path, model=TinyModel())
    with RunFolder(tmp_path, tiny_experiment()):
        pass


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_loss_is_skipped_and_counted_then_stops_with_a_report(tmp_path, where, capsys):
    settings = tiny_experiment(
        checkpoint_every_steps=1, eval_every_steps=100, log_every_steps=1, max_refused_updates=2
    )
    for _ in range(2):
        # The second start goes on from the last good state and comes to the same end.
        with pytest.raises(NonFiniteError) as error:
            train(settings, tmp_path, model=Breaking(where))
        message = str(error.value)
        assert "at step 4 (loss" in message and "3 refused updates" in message
        assert "the last good checkpoint is of step 4" in message
        assert "learning_rate" in message and "\n" not in message
        report = json.loads((tmp_path / "non_finite.json").read_text())
        assert (report["refused_updates"], report["last_refused_step"]) == (3, 4)
        assert report["items_there"] == {"split": "train", "first": 32, "count": 8}
        assert "nan" in report["computed_there"].values() or "inf" in report["computed_there"].values()
    said = capsys.readouterr().out
    assert "step 2: the loss or a gradient was infinite or not a number; the update was refused" in said
    assert "(2 so far, at most 2)" in said
    assert [line["refused"] for line in read_metrics(tmp_path)] == [0, 0, 1, 2]
    assert not (tmp_path / "result.json").exists()
    trained = load(tmp_path, checkpoint="latest", model=Breaking(where))
    assert np.isfinite(trained.params["weight"]).all()


def test_run_with_skipped_batches_finishes_and_says_how_many(tmp_path):
    sums = _batch_sums(tiny_experiment(), steps=(3, 8))
    result = train(tiny_experiment(), tmp_path, model=Breaking("loss", sums))
    assert (result.stopped, result.steps, result.refused_updates) == ("finished", 12, 2)
    lines = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert [line["refused"] for line in lines] == [0, 1, 1, 1, 2, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert not (tmp_path / "non_finite.json").exists()


def _batch_sums(settings, steps):
    """The token sums of the batches of these steps, by which `Breaking` knows them."""
    split = make_split(settings.data, "train")
    batches = split.iterator(settings.training.batch_size, repeat=True)
    raws = [next(batches) for _ in range(max(steps) + 1)]
    return [int(jax.jit(split.materialize)(raws[step]).tokens.sum()) for step in steps]


def _interrupt_at(step, settings, folder, number=signal.SIGTERM, model=None):
    """Runs until an evaluation, at which the process gets a signal."""
    original = Evaluator.__call__
    calls = []

    def call(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return original(self, *arguments, **keywords)

    Evaluator.__call__ = call
    try:
        return train(settings, folder, model=model or TinyModel())
    finally:
        Evaluator.__call__ = original


@pytest.fixture
def heeds_interrupts():
    """A process that a shell began in the background ignores SIGINT, and a run leaves that so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_an_evaluation_saves_and_the_evaluation_is_made_up_for(tmp_path, number, heeds_interrupts):
    before = signal.getsignal(number)
    whole = train(tiny_experiment(), tmp_path / "whole", model=TinyModel())
    broken = _interrupt_at(2, tiny_experiment(), tmp_path / "broken", number)
    assert (broken.stopped, broken.steps, broken.test_accuracy) == ("interrupted", 8, None)
    assert signal.getsignal(number) is before
    assert not (tmp_path / "broken" / "result.json").exists()
    assert [line["step"] for line in read_metrics(tmp_path / "broken") if line["kind"] == "valid"] == [4]
    assert train(tiny_experiment(), tmp_path / "broken", model=TinyModel()) == whole
    assert lines_without_timing(tmp_path / "broken") == lines_without_timing(tmp_path / "whole")


def test_signal_in_the_test_repeats_it(tmp_path):
    whole = train(tiny_experiment(), tmp_path / "whole", model=TinyModel())
    assert _interrupt_at(4, tiny_experiment(), tmp_path / "broken").stopped == "interrupted"
    assert train(tiny_experiment(), tmp_path / "broken", model=TinyModel()) == whole


def test_damaged_newest_checkpoint_is_passed_over_with_the_same_bits_at_the_end(tmp_path, capsys):
    whole = train(tiny_experiment(), tmp_path / "whole", model=TinyModel())
    _interrupt_at(2, tiny_experiment(), tmp_path / "broken")
    (tmp_path / "broken" / "checkpoints" / "8" / "meta" / "metadata").write_text("{}")
    for file in (tmp_path / "broken" / "best").rglob("*.json"):
        file.write_bytes(b"")
    assert train(tiny_experiment(), tmp_path / "broken", model=TinyModel()) == whole
    said = capsys.readouterr().out
    assert "checkpoints/8 is damaged" in said
    assert "going on from step 6" in said
    assert lines_without_timing(tmp_path / "broken") == lines_without_timing(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "broken" / "set_aside").iterdir()] == ["checkpoints-8-0"]


def test_damaged_best_gives_way_to_the_one_before_and_none_whole_is_an_error(tmp_path, capsys):
    settings = tiny_experiment()
    result = train(settings, tmp_path, model=TinyModel())
    (tmp_path / "result.json").unlink()
    older, newer = sorted((tmp_path / "best").iterdir(), key=lambda path: int(path.name))
    assert int(newer.name) == result.best_step
    (newer / "meta" / "metadata").write_text("{}")
    again = train(settings, tmp_path, model=TinyModel())
    assert again.best_step == int(older.name)
    valid = {line["step"]: line["accuracy"] for line in read_metrics(tmp_path) if line["kind"] == "valid"}
    assert again.best_valid_accuracy == valid[again.best_step]
    assert f"best/{result.best_step} is damaged" in capsys.readouterr().out

    (tmp_path / "result.json").unlink()
    (older / "meta" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match="checkpoint=latest"):
        train(settings, tmp_path, model=TinyModel())


def test_full_disk_for_metrics_is_a_training_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hax_jax.training.metrics.MetricsWriter.write", full)
    with pytest.raises(TrainingError, match="No space left on device"):
        train(tiny_experiment(), tmp_path, model=TinyModel())


@pytest.mark.parametrize("seeds", ["", "0,1"])
def test_a_run_has_finished_only_when_its_last_checkpoint_is_on_the_disk(tmp_path, seeds):
    settings = tiny_experiment(num_steps=4, checkpoint_every_steps=2, population_seeds=seeds)
    with full_disk_at(4), pytest.raises(CheckpointError, match="No space left on device"):
        train(settings, tmp_path, model=TinyModel())
    assert not (tmp_path / "result.json").exists()

    assert train(settings, tmp_path, model=TinyModel()).stopped == "finished"
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_model_of_the_settings_trains_and_is_restored(tmp_path):
    settings = dataclasses.replace(tiny_experiment(num_steps=2), model=tiny_hax_model())
    result = train(settings, tmp_path)
    trained = load(tmp_path)
    assert score(trained, "test", settings.data).accuracy == result.test_accuracy
    assert trained.model(jnp.ones((1, 5), jnp.int32)).logits.shape == (1, 5, VOCAB_SIZE)
    assert all(line["gate_loss"] > 0 for line in read_metrics(tmp_path) if line["kind"] == "train")


def test_plain_function_trains(tmp_path):
    def bigrams(params, tokens):
        return params["table"][tokens] + params["bias"][0]

    params = {"table": jnp.zeros((VOCAB_SIZE, VOCAB_SIZE)), "bias": [jnp.zeros(VOCAB_SIZE)]}
    result = train(tiny_experiment(learning_rate=0.3), tmp_path, model=TokenFunction(bigrams, params))
    assert result.stopped == "finished"
    losses = [line["loss"] for line in read_metrics(tmp_path) if line["kind"] == "train"]
    # From the uniform guess over 20 tokens towards that over the 2 values.
    np.testing.assert_allclose(losses[0], np.log(20), atol=0.5)
    assert losses[-1] < 1.2


def test_function_gets_what_it_asks_for():
    asked = {}

    def function(params, tokens, padding_mask, train):
        asked.update(padding_mask=padding_mask, train=train)
        return params[0][tokens]

    module = TokenFunction(function, [jnp.ones((4, 4))])
    mask = jnp.ones((1, 2), bool)
    logits = module(jnp.zeros((1, 2), jnp.int32), padding_mask=mask, key=jax.random.key(0), train=True)
    assert logits.shape == (1, 2, 4)
    assert asked == {"padding_mask": mask, "train": True}
    inner = nnx.Embed(4, 4, rngs=nnx.Rngs(0))
    wrapped = TokenFunction(lambda module, tokens: module(tokens), inner)
    np.testing.assert_array_equal(wrapped(jnp.arange(4)[None])[0], inner.embedding[...])
