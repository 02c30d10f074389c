"""Weights into a run's folder and out of it, through both formats, by the command."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import convert_checkpoint
from hax_jax.config import Experiment
from hax_jax.interop.checkpoint import export_weights, import_weights
from hax_jax.interop.files import read_weights, write_weights
from hax_jax.interop.state_dict import StateDictError, state_dict
from hax_jax.training import train
from hax_jax.training.initialise import build
from hax_jax.training.metrics import read_metrics
from tests.training.tiny import DATA

SIZES = {
    "hidden_size": 16,
    "state_size": 4,
    "num_heads": 4,
    "head_dim": 8,
    "vocab_size": 20,
    "num_layers": 2,
    "attention_heads": 2,
    "mlp_size": 24,
    "sparse_keys": 4,
}
MODELS = {
    "mamba2": {"arch": "mamba2", "sparse_arch": "sign_bin_lsh+key_selection"},
    "mamba": {"arch": "mamba", "sparse_arch": "key_selection+sliding_window", "routing": "parity"},
    "samba": {"arch": "samba"},
    "half": {"arch": "mamba2", "sparse_arch": "dilated", "precision": "bfloat16"},
}


def config_file(folder: pathlib.Path, name: str, seed: int = 3) -> pathlib.Path:
    """A config file of a tiny run."""
    experiment = Experiment(name=name, seed=seed, data=DATA).to_dict()
    experiment["model"] |= SIZES | MODELS[name]
    experiment["training"] |= {
        "batch_size": 2,
        "num_steps": 2,
        "eval_batch_size": 12,
        "tensorboard": False,
        "log_every_steps": 1,
        "warmup_steps": 0,
    }
    path = folder / f"{name}_config.py"
    path.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({experiment!r})\n"
    )
    return path


def experiment_of(name: str, seed: int = 3) -> Experiment:
    values = Experiment(name=name, seed=seed, data=DATA).to_dict()
    values["model"] |= SIZES | MODELS[name]
    return Experiment.from_dict(values)


def weights_of(name: str, seed: int = 8) -> dict[str, np.ndarray]:
    return state_dict(build(experiment_of(name, seed)))


def run(*arguments) -> int:
    return convert_checkpoint.main(["convert_checkpoint.py", *map(str, arguments)])


def assert_same(got, want) -> None:
    assert set(got) == set(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("name", MODELS)
def test_file_to_run_to_files_and_back_is_bit_exact(tmp_path, name, capsys):
    weights, config = weights_of(name), config_file(tmp_path, name)
    first, second, third = (tmp_path / x for x in ("a.pt", "b.safetensors", "c.pt"))
    write_weights(first, weights)
    assert run(first, tmp_path / "run", f"--config={config}") == 0
    assert f"tensors as step 0 of {name}, seed 3" in capsys.readouterr().out
    assert run(tmp_path / "run", second) == 0
    said = capsys.readouterr().out
    assert ("fixed hash projections have no place in it" in said) == (name == "mamba2")
    assert run(second, third) == 0
    for path in (second, third):
        assert_same(read_weights(path)[0], weights)
    # The safetensors file knows the settings of the run that it is out of.
    assert run(second, tmp_path / "again") == 0
    one, other = (export_weights(tmp_path / folder, "latest") for folder in ("run", "again"))
    assert one.experiment == other.experiment
    assert_same(other.weights, weights)


def test_the_projections_of_causal_routing_follow_from_the_seed(tmp_path):
    from hax_jax.training.restore import load

    experiment = experiment_of("mamba2")
    import_weights(weights_of("mamba2"), experiment, tmp_path / "run")
    got = load(tmp_path / "run", checkpoint="latest").buffers
    want = build(experiment).layers[0].mixer.hax.projection[...]
    np.testing.assert_array_equal(got["layers.0.mixer.hax.projection"], want)


def test_training_goes_on_from_imported_weights(tmp_path):
    # The cheapest to compile.
    values = experiment_of("mamba2").to_dict()
    values["model"] |= {"sparse_arch": "none", "num_layers": 1}
    values["training"] |= {
        "batch_size": 2,
        "num_steps": 1,
        "eval_batch_size": 12,
        "tensorboard": False,
        "log_every_steps": 1,
        "warmup_steps": 10,
    }
    experiment = Experiment.from_dict(values)
    weights = state_dict(build(dataclasses.replace(experiment, seed=8)))
    import_weights(weights, experiment, tmp_path)
    result = train(experiment, tmp_path)
    assert result.stopped == "finished" and result.steps == 1
    assert [line["step"] for line in read_metrics(tmp_path) if line["kind"] == "train"] == [1]
    # The first update of a warm-up has rate 0.
    assert_same(export_weights(tmp_path).weights, weights)


def test_what_does_not_fit_is_one_line_and_writes_nothing(tmp_path, capsys):
    weights, config = weights_of("mamba2"), config_file(tmp_path, "mamba2")
    del weights["norm_f.weight"]
    weights["layers.0.mixer.D"] = np.zeros(3, np.float32)
    weights["layers.9.mixer.D"] = np.zeros(3, np.float32)
    path, folder = tmp_path / "w.pt", tmp_path / "run"
    write_weights(path, weights)
    for target in (folder, tmp_path / "w.safetensors"):
        assert run(path, target, f"--config={config}") == 2
        (line,) = capsys.readouterr().err.splitlines()
        for part in (
            "missing norm_f.weight",
            "unexpected layers.9.mixer.D",
            "layers.0.mixer.D has shape (3,), expected (4,)",
        ):
            assert part in line
        assert not target.exists()


def test_rounding_is_refused_unless_allowed(tmp_path):
    experiment, weights = experiment_of("half"), weights_of("half")
    wide = {name: x.astype(np.float32) for name, x in weights.items()}
    # Numbers that bfloat16 holds come through, whatever their dtype.
    import_weights(wide, experiment, tmp_path / "exact")
    assert_same(export_weights(tmp_path / "exact").weights, weights)
    wide["norm_f.weight"] = wide["norm_f.weight"] + np.float32(1e-4)
    with pytest.raises(StateDictError, match=r"norm_f\.weight is float32 and would be rounded to bfloat16"):
        import_weights(wide, experiment, tmp_path / "rounded")
    assert not (tmp_path / "rounded").exists()
    import_weights(wide, experiment, tmp_path / "rounded", rounding=True)
    for bad, said in (
        (np.full(16, np.nan, np.float32), "must be finite"),
        (np.ones(16, np.int32), "must be of floating point"),
    ):
        with pytest.raises(StateDictError, match=said):
            import_weights(wide | {"norm_f.weight": bad}, experiment, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_prefixes_are_taken_off_files_and_put_on_those_of_runs(tmp_path, capsys):
    path, bare = tmp_path / "w.pt", tmp_path / "bare.safetensors"
    write_weights(path, {"backbone.a": np.ones(2, np.float32), "lm_head.weight": np.ones(1, np.float32)})
    assert run(path, bare, "--prefix=backbone.") == 0
    assert set(read_weights(bare)[0]) == {"a"}
    assert run(path, tmp_path / "x.pt", "--prefix=model.") == 2
    assert "no name begins with 'model.'" in capsys.readouterr().err
    import_weights(weights_of("samba"), experiment_of("samba"), tmp_path / "run")
    assert run(tmp_path / "run", tmp_path / "run.pt", "--prefix=model.") == 0
    assert set(read_weights(tmp_path / "run.pt")[0]) == {f"model.{name}" for name in weights_of("samba")}


def test_bad_input_is_one_line(tmp_path, capsys):
    path = tmp_path / "w.pt"
    write_weights(path, weights_of("samba"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    config = config_file(tmp_path, "samba")
    broken = tmp_path / "broken.safetensors"
    write_weights(broken, weights_of("samba"), {convert_checkpoint.EXPERIMENT: json.dumps({"name": 3})})
    for arguments, said in (
        ((path,), "command line"),
        ((path, path), "`TO` must be a file that is not there yet"),
        ((path, tmp_path / "run"), "`--config` must be"),
        ((tmp_path / "none.pt", tmp_path / "x.pt"), "cannot be read"),
        ((path, tmp_path / "full", f"--config={config}"), "must be a folder that is empty or not there"),
        ((tmp_path / "full", tmp_path / "x.pt"), "it has no config.json"),
        ((tmp_path / "full", tmp_path / "other"), "a file named .safetensors or .pt"),
        ((tmp_path / "full", tmp_path / "x.pt", f"--config={config}"), "left out, for a run knows its own"),
        ((broken, tmp_path / "run"), "its settings cannot be read"),
        ((path, tmp_path / "run", "--confg=x"), "--config"),
    ):
        assert run(*arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and said in line, line
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_whole_checkpoint_has_a_status_of_its_own(tmp_path, capsys):
    import_weights(weights_of("samba"), experiment_of("samba"), tmp_path / "run")
    for file in (tmp_path / "run" / "best").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert run(tmp_path / "run", tmp_path / "x.pt") == 1
    assert "No whole checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "x.pt").exists()
    assert jax.tree.leaves(export_weights(tmp_path / "run", "latest").weights)
