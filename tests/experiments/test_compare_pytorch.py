"""The comparison with PyTorch where there is no PyTorch: exchange, decisions, report, figure, table."""

import concurrent.futures
import dataclasses
import json
import time

import numpy as np
import pytest

from experiments import compare_pytorch, plot_pytorch, results
from experiments.comparison import exchange, ours, readme, report
from experiments.pytorch_baseline.settings import Settings
from hax_jax.config import ConfigError, Experiment, ModelConfig
from tests.configs.rows import ROWS
from tests.training.tiny import DATA, VOCAB_SIZE, tiny_experiment

GOLDEN = "E_train_mamba2_hax.npz"


def run(*arguments) -> int:
    return compare_pytorch.main(["compare_pytorch.py", *map(str, arguments)])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_model_is_described_in_the_originals_words(row):
    experiment = row.experiment()
    model = experiment.model
    settings = Settings.from_meta(exchange._describe(experiment))
    assert settings.sources == model.sources
    names = {field.name for field in dataclasses.fields(Settings)} - {"sparse_arch", "chunk_size"}
    # What an architecture lacks is not described.
    if model.arch != "samba":
        names -= {"attention_heads", "attention_window", "rope_theta", "mlp_size"}
    if model.arch != "mamba2":
        names -= {"num_heads", "head_dim", "n_groups"}
    for name in names:
        assert getattr(settings, name) == getattr(model, name), name


def small_experiment():
    model = ModelConfig(
        hidden_size=16, head_dim=4, state_size=4, vocab_size=VOCAB_SIZE, sparse_keys=4,
        sparse_arch="sign_bin_lsh+key_selection",
    )  # fmt: skip
    return dataclasses.replace(tiny_experiment(data=DATA), model=model)


def test_the_start_is_that_of_a_run(tmp_path):
    experiment = small_experiment()
    start = exchange.from_experiment(experiment, 3)
    assert (start.model.routing, start.model.precision) == ("parity", "float32")
    arrays, length = start.arrays, DATA.padded_length - 1
    assert arrays["sequences"].shape == arrays["mask"].shape == (3, 8, length + 1)
    assert arrays["rand/layer1/hash_proj"].shape == (3, 4, 8)
    assert arrays["rand/layer1/noise"].shape == (3, 8, length)
    assert not np.array_equal(arrays["rand/layer0/noise"][0], arrays["rand/layer1/noise"][0])
    assert not np.array_equal(arrays["rand/layer0/noise"][0], arrays["rand/layer0/noise"][1])
    np.testing.assert_allclose(arrays["lr"], [0, 0.01, 0.02])
    # The same start has the same bytes, and the result of another one is refused.
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    digest = exchange.write(arrays, first)
    assert exchange.write(exchange.from_experiment(experiment, 3).arrays, second) == digest
    np.savez(tmp_path / "torch.npz", exchange_sha256=np.array("0" * 64))
    with pytest.raises(ConfigError, match="it belongs to another one"):
        exchange.read_result(tmp_path / "torch.npz", digest)
    (tmp_path / "torch.npz").write_bytes(first.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"a whole \.npz file"):
        exchange.read_result(tmp_path / "torch.npz", digest)


def test_a_golden_file_goes_round(golden):
    arrays = golden.load(GOLDEN)
    start = exchange.from_golden(golden.path(GOLDEN), 23)
    assert start.num_steps == 23
    np.testing.assert_array_equal(start.arrays["sequences"][20:], arrays["sequences"][:3])
    np.testing.assert_array_equal(start.arrays["rand/layer1/noise"][22], arrays["rand/layer1/noise"][2])
    assert list(start.arrays["lr"][18:]) == [*arrays["lr"][18:], *[arrays["lr"][-1]] * 3]
    with pytest.raises(ConfigError, match="a golden file of group E"):
        exchange.from_golden(golden.path("C_ranking_loss.npz"), 2)


def test_a_comparison_across_two_environments(tmp_path, monkeypatch, capsys):
    """PyTorch's part is played by our own numbers, one decision and one loss changed."""
    folder, out, config = tmp_path / "exchange", tmp_path / "out.json", tmp_path / "config.py"
    settings = dataclasses.replace(small_experiment(), name="small").to_dict()
    settings["model"]["num_layers"] = 1
    config.write_text(
        f"import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({settings!r})\n"
    )
    command = (f"--config={config}", "--steps=2", f"--exchange={folder}", f"--out={out}", "--timing=off")
    assert run(*command) == compare_pytorch.WAITING
    assert f"run.py {folder / 'inputs.npz'}" in capsys.readouterr().out

    start = exchange.from_experiment(Experiment.from_dict(settings), 2)
    found = list(ours.steps(start))
    curves = np.array([[float(x) for x in scalars] for scalars, _, _ in found])
    theirs = {name: curves[:, index] for index, name in enumerate(("loss", "gate_loss", "acc"))}
    for name in found[0][1]:
        theirs[f"decisions/{name}"] = np.stack([np.asarray(decided[name]) for _, decided, _ in found])
    assert {name.split("/")[-1] for name in theirs if "/" in name} == set(ours.KINDS)
    theirs["loss"][1] += 0.25
    theirs["decisions/layer0/key_code"][1, 2, 3] ^= 1
    theirs["decisions/layer0/lifetime"][1, 0, 0] += 1
    told = {"device": "cpu: x", "dtype": "float32", "kernels": {}, "versions": {"torch": "9.9"}}
    theirs["info_json"] = np.array(json.dumps(told))
    theirs["exchange_sha256"] = np.array(exchange.sha256(folder / "inputs.npz"))
    np.savez(folder / "torch.npz", **theirs)

    # The same steps once more, without compiling them again.
    monkeypatch.setattr(ours, "steps", lambda start: iter(found))
    assert run(*command) == compare_pytorch.DONE
    result = report.read(out)
    first = result["curves"]["first_difference"]
    assert {"step": 1, "layer": 0, "kind": "key_code", "row": 2, "position": 3}.items() <= first.items()
    assert first["jax"] ^ first["torch"] == 1 and 0 < first["margin"] < 3
    assert result["curves"]["steps_with_other_decisions"] == 1
    assert result["curves"]["largest_difference"]["loss"] == 0.25
    assert result["curves"]["largest_difference_before"] == {"loss": 0, "gate_loss": 0, "acc": 0}
    assert result["versions"]["torch"] == "9.9" and result["timing"] is None
    assert "--exchange" not in result["command"] and "--out" not in result["command"]
    assert "first decision that differs: step 1, layer 0, key_code of row 2" in capsys.readouterr().out
    assert out.with_suffix(".svg").exists()


def test_the_command_that_is_told_names_no_places():
    argv = ["x", "--golden=/some/where/E.npz", "--steps=2", "--out", "/some/where", "--torch_python=/a/b"]
    assert compare_pytorch._told(argv) == "python experiments/compare_pytorch.py --golden=E.npz --steps=2"


def test_a_comparison_waits_for_its_turn(tmp_path):
    turn = tmp_path / "turn"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(compare_pytorch._hold, turn)
        while not (tmp_path / "turn.ready").exists():
            time.sleep(0.01)
        assert not waiting.done()
        turn.touch()
        waiting.result(timeout=20)
    compare_pytorch._hold(None)


def test_margins_are_distances_to_the_boundary():
    model = ModelConfig(sparse_arch="key_selection", sparse_keys=2, routing="parity")
    noise = np.array([[[0.1, 0.9, 0.5, 0.7]]], np.float32)
    arrays = {"sequences": np.full((1, 1, 5), 9, np.uint8), "rand/layer0/noise": noise}
    start = exchange.Exchange("x", "x", model, arrays)
    place = {"step": 0, "layer": 0, "row": 0}
    details = {"scores": np.array([[3.0, 1.0, 2.0, 5.0]]), "targets": np.array([[4.0, 2.5, 2.0]])}
    # Key 1 is among the best two of 0..1; at query 2 it is second best to 2.0 by 1.
    lifetime = {"kind": "lifetime", "position": 1, "jax": 1, "torch": 2}
    assert ours.margin(start, place | lifetime, details) == 1.0
    # Samples by noise: 1, 3, 2, with targets 4, 2.5, 2.
    ranking = {"kind": "ranking", "position": 1, "jax": 3, "torch": 2}
    assert ours.margin(start, place | ranking, details) == 0.5
    assert ours.margin(start, place | ranking | {"torch": 0}, details) is None


def result_of(name: str, timed: bool) -> dict:
    """A comparison as the command writes it."""
    labels = (
        ("torch", "parity", 0, 20.0), ("jax", "parity", 0, 10.0), ("jax", "causal", 0, 4.0),
        ("jax", "causal", 2048, 2.0),
    )  # fmt: skip
    timing = [
        {
            "framework": framework, "routing": routing, "packing": packing, "step_ms": step,
            "label": f"{framework}, {routing}, {packing}",
            "peak_gib": 1.5, "tokens_per_s": 10**6, "implementation": {"ssd": "mamba_ssm 2", "conv": "c 1"},
        }
        for framework, routing, packing, step in labels
    ]  # fmt: skip
    timing.append({"framework": "jax", "routing": "x", "label": "broken", "error": "out of memory"})
    first = {
        "step": 2, "layer": 0, "kind": "lifetime", "row": 0, "position": 3, "jax": 1, "torch": 2,
        "margin": 1e-7, "count_in_step": 1,
    }  # fmt: skip
    curve = {"loss": [3.0, 2.0, 1.0], "gate_loss": [0.7] * 3, "acc": [0.1] * 3}
    largest = {"loss": 1e-3, "gate_loss": 0.0, "acc": 0.0}
    return {
        "format_version": 1, "task": "pytorch", "name": name, "origin": "seed 0", "command": "python x",
        "commit": "0123456789", "device": {"kind": "NVIDIA H200", "count": 1}, "model": {},
        "versions": {"jax": "1", "torch": "2"}, "batch": {"size": 64, "length": 1057},
        "timing": timing if timed else None,
        "curves": {
            "steps": 3, "precision": "float32", "routing": "parity", "torch": curve,
            "jax": {**curve, "loss": [3.0, 2.0, 1.001]}, "largest_difference": largest,
            "largest_difference_before": dict.fromkeys(largest, 1e-6), "steps_with_other_decisions": 1,
            "first_difference": first if timed else None, "steps_before_first_difference": 2,
        },
    }  # fmt: skip


@pytest.mark.parametrize("timed", [True, False])
def test_a_figure_is_drawn_from_the_json_alone(tmp_path, timed):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(result_of("a", timed)))
    assert plot_pytorch.main(["plot_pytorch.py", str(path)]) == 0
    text = path.with_suffix(".svg").read_text()
    assert ("20.00 ms, 1.50 GiB" in text) == timed
    assert ("selected" in text or "lifetime, layer 0" in text) == timed
    assert plot_pytorch.main(["plot_pytorch.py", str(path), f"--out={tmp_path / 'b.svg'}"]) == 0
    assert (tmp_path / "b.svg").read_text() == text


def test_the_table_of_the_readme(tmp_path):
    folder = tmp_path / report.FOLDER
    folder.mkdir(parents=True)
    assert readme.section(tmp_path) is None
    for name, timed in (("a_cpu", False), ("z_gpu", True)):
        (folder / f"{name}.json").write_text(json.dumps(result_of(name, timed)))
    text = readme.section(tmp_path)
    assert text is not None
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert rows[0] == (
        "| [`z_gpu`](results/pytorch/z_gpu.json) | 3 | 1.0e-06, then 1.0e-03 "
        "| step 2: selected key, 1e-07 from its boundary "
        "| 20.00 ms | 10.00 ms (2.0x) | 4.00 ms (5.0x) | 2.00 ms (10.0x) "
        "| 1.50 / 1.50 / 1.50 / 1.50 GiB |"
    )
    assert rows[1] == "| [`a_cpu`](results/pytorch/a_cpu.json) | 3 | 1.0e-03 | none |  |  |  |  |  |"
    assert "kernels: ssd by mamba_ssm 2; conv by c 1." in text
    assert "broken could not be timed: out of memory." in text
    (folder / "a_cpu.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"a whole comparison.*a_cpu"):
        readme.section(tmp_path)


def test_bad_input_is_one_line(golden, tmp_path, capsys):
    path = golden.path(GOLDEN)
    for arguments, said in (
        ((), "--config"),
        ((f"--golden={path}", "--config=configs/samba.py"), "nothing beside --golden"),
        ((f"--golden={path}", "--steps=0"), "`--steps` must be"),
        ((f"--golden={tmp_path / 'none.npz'}",), "no such file"),
        ((f"--golden={path}", "--steps=1", "--torch_python=no_such_python"), "an interpreter"),
    ):
        assert run(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and said in line, line


PUBLISHED = sorted((results.CHECKOUT / report.FOLDER).glob("*.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_what_is_published_keeps_to_the_goals(path):
    result = report.read(path)
    curves = result["curves"]
    same = curves["steps_before_first_difference"]
    gaps = report.differences(result, "loss")
    if result["device"]["kind"] == "cpu":
        assert same >= 20 and max(gaps[:20]) <= 2e-5
    assert max(gaps[:same], default=0.0) <= 1e-3
    assert same == curves["steps"] or curves["first_difference"]["step"] == same
    assert path.with_suffix(".svg").exists()
    assert result["commit"]
    # Relative paths alone: a place on one machine helps nobody else.
    assert not any(word.startswith("/") or "=/" in word for word in result["command"].split())


def test_a_golden_start_is_among_what_is_published():
    starts = [report.read(path)["origin"] for path in PUBLISHED]
    assert any(GOLDEN in start for start in starts)
