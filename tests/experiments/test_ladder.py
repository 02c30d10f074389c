"""The ladder's experiments: settings that hold together, and files that keep what a run measured."""

import json

import pytest

from experiments import ladder
from hax_jax import training


@pytest.mark.parametrize("variant", ladder.VARIANTS)
def test_every_variant_is_a_whole_experiment_with_a_prediction(variant):
    options = ladder._options(["ladder.py", f"--variant={variant}", "--rung=8", "--seeds=0,1,2"])
    experiment = ladder.settings(options)
    assert experiment.name == f"8x8_{variant}"
    assert experiment.data.num_pairs == 1 and experiment.data.max_n_key == 8
    assert len(experiment.members) == 3
    assert ladder.VARIANTS[variant].prediction.endswith(".")


def test_a_run_is_kept_with_its_curves(tmp_path, monkeypatch):
    small = {
        "hidden_size": 8,
        "head_dim": 8,
        "num_heads": 2,
        "state_size": 4,
        "sparse_keys": 8,
        "num_layers": 1,
    }
    monkeypatch.setitem(ladder.VARIANTS, "hax", ladder.Variant("Nothing in two steps.", model=small))
    out = tmp_path / "small.json"
    flags = ["--rung=2", "--steps=2", "--seeds=3", "--batch_size=2", "--precision=float32", f"--out={out}"]
    assert ladder.main(["ladder.py", *flags]) == 0
    result = json.loads(out.read_text())
    assert result["step"] == [1, 2] and result["prediction"] == "Nothing in two steps."
    (member,) = result["members"]
    assert member["seed"] == 3
    assert {"accuracy", "loss", "recall/1/sign_bin_lsh", "reach/any/any"} <= set(member["curve"])
    assert {len(values) for values in member["curve"].values()} == {2}
    assert result["config"]["model"]["sparse_keys"] == 8
    (layer,) = member["buckets"]
    # Half of the 8 keys are hashing's.
    assert 0 <= layer["seen"] <= 4 and 0 <= layer["empty"] <= 1


def test_a_run_that_was_stopped_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *_: training.RunResult("interrupted", 1))
    out = tmp_path / "small.json"
    assert ladder.main(["ladder.py", f"--out={out}"]) == 143
    assert not out.exists()


def test_unknown_variants_are_one_line(capsys):
    assert ladder.main(["ladder.py", "--variant=magic"]) == 2
    assert "one of hax, base" in capsys.readouterr().err
    assert ladder.main(["ladder.py", "--list"]) == 0
    assert "bits4: 16 buckets" in capsys.readouterr().out
