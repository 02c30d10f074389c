"""What the golden files do not show: initial values, the command, bfloat16, and the step that is timed."""

import json

import numpy as np
import pytest
import torch

from experiments.pytorch_baseline import run
from experiments.pytorch_baseline.attention import running_top
from experiments.pytorch_baseline.kernels import PLAIN, Kernels
from experiments.pytorch_baseline.models import LanguageModel
from experiments.pytorch_baseline.settings import Settings
from experiments.pytorch_baseline.speed import TimedStep
from experiments.pytorch_baseline.tests import golden_data
from experiments.pytorch_baseline.training import build

CPU = torch.device("cpu")
# The original's counts, which reference tables of the paper's sizes give.
COUNTS = {
    ("mamba", "sign_bin_lsh+key_selection"): 86_658,
    ("mamba2", "sign_bin_lsh+key_selection"): 100_594,
    ("mamba", "sliding_window"): 82_368,
    ("mamba2", "sliding_window"): 83_824,
    ("samba", None): 131_360,
}


def settings(arch, sparse_arch):
    if arch == "samba":
        return Settings(arch=arch, hidden_size=32, num_layers=4, state_size=16, initializer_range=0.02)
    return Settings(arch=arch, sparse_arch=sparse_arch, state_size=16 if arch == "mamba" else 32)


@pytest.mark.parametrize(("arch", "sparse_arch"), COUNTS)
def test_parameter_counts_are_the_originals(arch, sparse_arch):
    model = LanguageModel(settings(arch, sparse_arch), Kernels(False, CPU, torch.float32))
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[arch, sparse_arch]


def test_initial_values():
    torch.manual_seed(0)
    for arch in ("mamba", "mamba2"):
        model = LanguageModel(settings(arch, "key_selection"), Kernels(False, CPU, torch.float32))
        model.requires_grad_(False)
        mixer = model.layers[0].mixer
        assert abs(float(model.embeddings.weight.std()) - 0.1) < 0.005
        assert abs(float(mixer.in_proj.weight.std()) - 0.1) < 0.005
        assert not mixer.dx_proj_1.bias.any() and bool((mixer.E == 1).all())
        bias = mixer.dt_proj.bias if arch == "mamba" else mixer.dt_bias
        steps = torch.nn.functional.softplus(bias)
        assert float(steps.min()) >= 0.001 and float(steps.max()) <= 0.1 * (1 + 1e-5)
    bound = 128**-0.5 * 2**-0.5
    assert 0.95 * bound < float(mixer.out_proj.weight.abs().max()) <= bound
    assert not mixer.conv1d.bias.any()


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="'window' is none of them"):
        Settings(sparse_arch="full+window")


def test_running_top_counts_keys_in_the_prefix():
    scores = torch.tensor([[3.0, 1.0, 2.0, 5.0]])
    want = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert running_top(scores, 2)[0].int().tolist() == want


def test_weights_that_do_not_fit_are_named():
    arrays = golden_data.load("A_mamba2_hax.npz")
    weights = {"embeddings.weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(RuntimeError, match=r"norm_f\.weight"):
        build(golden_data.meta(arrays), weights, CPU, torch.float32)


def test_the_command_takes_the_steps_of_a_file(tmp_path, capsys):
    arrays = golden_data.load("E_train_mamba2_hax.npz")
    short = ("sequences", "mask", "rand/")
    arrays = {name: x[:1] if name.startswith(short) else x for name, x in arrays.items()}
    inputs, outputs = tmp_path / "inputs.npz", tmp_path / "torch.npz"
    np.savez(inputs, allow_pickle=False, **arrays)
    assert run.main([str(inputs), str(outputs)]) == 0
    assert f"ssd: {PLAIN}" in capsys.readouterr().out
    results = np.load(outputs)
    assert abs(float(results["loss"][0]) - float(arrays["loss"][0])) < 2e-5
    assert json.loads(str(results["info_json"]))["dtype"] == "float32"
    assert len(str(results["exchange_sha256"])) == 64
    assert run.main([str(tmp_path / "none.npz"), str(outputs)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("arch", "sparse_arch"), [("mamba", "sign_bin_lsh+key_selection"), ("mamba2", "full"), ("samba", None)]
)
def test_a_step_is_taken_in_bfloat16(arch, sparse_arch):
    config = {"num_hidden_layers": 2, "hidden_size": 32, "state_size": 8, "num_heads": 4, "num_hash": 3}
    optimizer = {"lr": 1e-2, "weight_decay": 0.01, "betas": [0.9, 0.999], "eps": 1e-8}
    meta = {
        "base_arch": arch,
        "sparse_arch": sparse_arch,
        "optimizer": optimizer,
        "gate_loss_weight": 0.1,
        "config": {**config, "sparse_keys": 4, "mlp_size": 32},
    }
    generator = np.random.default_rng(0)
    tokens = generator.integers(10, 90, (2, 20))
    real = np.arange(20) < np.array([[20], [15]])
    timed = TimedStep(meta, tokens, tokens, real, real, "cpu")
    weight = timed._model.embeddings.weight
    before = weight.detach().clone()
    timed.step()
    timed.wait()
    assert weight.dtype == torch.bfloat16 and bool(torch.isfinite(weight).all())
    assert bool((weight != before).any())
    assert timed.peak_bytes() == 0
