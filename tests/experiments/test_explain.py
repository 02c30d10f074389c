"""Looking into a trained model: the numbers hang together, and the figure and the page show them."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from experiments import explain, plot_explained, results, science_tables
from hax_jax.config import DataConfig, ModelConfig
from hax_jax.data.joint_recall import SEPARATOR
from hax_jax.models import build_model
from hax_jax.training import Trained
from hax_jax.training.state import split_model
from tests.training.tiny import tiny_experiment

MODEL = ModelConfig(
    vocab_size=30,
    hidden_size=8,
    state_size=4,
    num_heads=2,
    head_dim=8,
    chunk_size=16,
    num_hash=2,
    sparse_keys=8,
    sparse_arch="sign_bin_lsh+key_selection",
    precision="float32",
)
DATA = DataConfig(min_n_context=2, max_n_context=3, min_n_key=2, max_n_key=2, n_value=2, n_eval_per_pair=1)


@pytest.fixture(scope="module")
def explained():
    """What the script finds in a model that was never trained."""
    settings = dataclasses.replace(tiny_experiment(data=DATA), model=MODEL)
    trained = Trained(settings, 2, *split_model(build_model(MODEL, rngs=nnx.Rngs(0))))
    options = argparse.Namespace(n_context=3, n_key=2, items=1, batch_size=1)
    with pytest.MonkeyPatch.context() as patch:
        # One that fits the vocabulary and one that does not.
        patch.setattr(explain, "LARGER", ((4, 3), (32, 32)))
        return {"name": "tiny", "step": 2, **explain.explain(trained, options)}


def test_the_item_is_whole_and_what_it_sees_is_causal(explained):
    item = explained["item"]
    tokens = item["tokens"]
    assert len(item["query"]) == len(item["answer"]) == len(item["right"]) == 6
    for query, answer in zip(item["query"], item["answer"], strict=True):
        assert answer < tokens.index(SEPARATOR) < query
        assert tokens[answer - 1] == tokens[query]
    for layer in item["visible"]:
        for shown in layer:
            for query, keys in zip(item["query"], shown, strict=True):
                assert len(keys) <= 4 and all(key <= query for key in keys)


def test_numbers_are_shares_and_parts_are_those_of_the_model(explained):
    result = explained
    assert np.shape(result["offsets"]["visible"]) == (2, 2, len(explain.OFFSETS))
    assert np.min(result["offsets"]["visible"]) >= 0 and np.max(result["offsets"]["visible"]) <= 1
    assert 0 < np.max(result["offsets"]["weight"]) <= 1
    for weight in np.asarray(result["kinds"]["weight"]):
        # Causal routing sees no token of a later kind, and a row without a key weighs nothing.
        assert weight[0, 0] <= 1 and weight[0, 1:].max() == 0 and weight[2:5, 5:].max() == 0
        assert weight.sum(1).max() == pytest.approx(1, abs=1e-3)
    for layer in result["buckets"]:
        # Every token but the last lies in some bucket.
        assert sum(layer["occupancy"]) == pytest.approx(31, abs=0.1)
    assert list(result["ablations"]["accuracy"]) == [
        "as trained",
        "without the branch of layer 1",
        "without the branch of layer 2",
        "without both branches",
        "other hash projections",
        "a constant for the branch of layer 1",
        "constants for both branches",
    ]
    (larger,) = result["larger"]
    assert (larger["n_context"], larger["never_trained"], larger["num_items"]) == (4, 2, 1)
    assert set(explain.FIELDS) <= set(result)


def test_it_is_drawn_and_told(explained, tmp_path):
    source, out = tmp_path / "tiny.json", tmp_path / "tiny.svg"
    source.write_text(results.to_text({"format_version": results.FORMAT_VERSION, **explained}))
    assert plot_explained.main(["plot_explained.py", str(source), f"--out={out}"]) == 0
    assert "other hash projections" in out.read_text()
    text = science_tables.explained(explained)
    assert "| as trained |" in text and "| 4 x 3 | " in text


def test_a_model_without_sources_is_refused(tmp_path, capsys):
    assert explain.main(["explain.py", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_runs_by_routing_precision_and_rate_are_those_of_one_seed_and_length(tmp_path):
    def model(routing, precision, sparse="sign_bin_lsh+key_selection"):
        return {"arch": "mamba2", "sparse_arch": sparse, "routing": routing, "precision": precision}

    def run(**own):
        valid = {"step": [10_000, 40_000], "accuracy": [0.25, 0.5]}
        return {"curve": {"valid": valid}, "test": {"accuracy": 0.75}, **own}

    def write(path, **content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    alone, table = tmp_path / "results" / "joint_recall", tmp_path / "results" / "table3" / "parity_40000"
    assert science_tables.precision(tmp_path) is None
    training = {"learning_rate": 0.002}
    config = {"model": model("causal", "bfloat16"), "seed": 0, "training": training}
    write(alone / "one.json", config=config, steps=40_000, **run())
    write(alone / "longer.json", config=config, steps=80_000, **run())
    write(alone / "other_seed.json", config={**config, "seed": 1}, steps=40_000, **run())
    plain = {"model": model("causal", "bfloat16", "none"), "seed": 0, "training": training}
    write(alone / "plain.json", config=plain, steps=40_000, **run())
    # A cell's settings have no rate: its runs have.
    cell = {"model": model("parity", "bfloat16"), "training": {}}
    runs = [run(seed=1, learning_rate=0.002), *(run(seed=0, learning_rate=rate) for rate in (0.003, 0.001))]
    write(table / "hax.json", config=cell, steps=40_000, runs=runs)
    lines = science_tables.precision(tmp_path).strip().splitlines()
    assert lines[2:] == [
        "| causal | bfloat16 | 0.002 | [`one`](../results/joint_recall/one.json) | 25.0% | 75.0% |",
        "| parity | bfloat16 | 0.001 | [`hax`](../results/table3/parity_40000/hax.json) | 25.0% | 75.0% |",
        "| parity | bfloat16 | 0.003 | [`hax`](../results/table3/parity_40000/hax.json) | 25.0% | 75.0% |",
    ]


def test_ladder_rows_say_what_was_predicted(tmp_path):
    folder = tmp_path / "results" / "ladder"
    folder.mkdir(parents=True)
    curve = {"accuracy": [0.1, 0.5], "recall/any/sign_bin_lsh": [0.0, 0.25]}
    members: list[dict] = [{"seed": s, "accuracy": x, "curve": curve} for s, x in ((0, 0.5), (1, 0.7))]
    result = {"prediction": "It works.", "step": [1, 2000], "members": members}
    (folder / "4x4_hax.json").write_text(json.dumps(result))
    text = science_tables.ladder(tmp_path)
    assert "| 2,000 | 2 | 60.0% (50.0 to 70.0) | 25.0% |  |  | It works. |" in text
    for member, seen in zip(members, (2.0, 4.5), strict=True):
        member["buckets"] = [{"seen": seen, "empty": 0.0}]
    (folder / "4x4_hax.json").write_text(json.dumps(result))
    assert "| 25.0% |  | 3.2 | It works. |" in science_tables.ladder(tmp_path)
