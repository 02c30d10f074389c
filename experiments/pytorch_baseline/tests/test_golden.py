"""The baseline against the original's golden arrays: the tolerances are those that hax_jax is held to."""

import numpy as np
import pytest
import torch

from experiments.pytorch_baseline.attention import Draws, ranking_loss
from experiments.pytorch_baseline.kernels import Kernels
from experiments.pytorch_baseline.models import RMSNorm, WindowAttention
from experiments.pytorch_baseline.settings import Settings
from experiments.pytorch_baseline.tests import golden_data
from experiments.pytorch_baseline.training import build, group, losses, train

CPU = torch.device("cpu")
SPARSE = (
    "mamba_dilated",
    "mamba_hax",
    "mamba_key_selection",
    "mamba_sign_bin_lsh",
    "mamba_sliding_window",
    "mamba_sliding_window_and_dilated",
    "mamba2_dilated",
    "mamba2_full",
    "mamba2_hax",
    "mamba2_key_selection",
    "mamba2_sign_bin_lsh",
    "mamba2_sliding_window",
    "mamba2_sliding_window_and_sink",
)
MODELS = (*(f"A_{name}.npz" for name in SPARSE), "B_mamba2.npz", "B_samba.npz")
DOUBLE = ("A_mamba_hax_float64.npz", "A_mamba2_hax_float64.npz")

ACTIVATION, LOSS, GRADIENT, GRADIENT_FLOOR = 2e-5, 5e-6, 2e-5, 1e-7
# Mathematically zero: the ranking loss sees differences of scores only.
NO_GRADIENT = "dx_proj_3.bias"


def draws_of(arrays, mode, num_layers, dtype):
    def tensor(name):
        return torch.from_numpy(arrays[name]).to(dtype) if name in arrays else None

    prefix = f"{mode}/rand/layer"
    return [Draws(tensor(f"{prefix}{i}/hash_proj"), tensor(f"{prefix}{i}/noise")) for i in range(num_layers)]


def run(arrays, mode, dtype):
    """The model of a file on its batch; returns model, output, loss, accuracy."""
    meta = golden_data.meta(arrays)
    model, _ = build(meta, group(arrays, "param/"), CPU, dtype)
    tokens, targets = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("inputs", "labels"))
    score, valid = (torch.from_numpy(arrays[name].astype(bool)) for name in ("mask", "attn_mask"))
    draws = draws_of(arrays, mode, meta["num_layers"], dtype)
    output = model(tokens, valid, draws=draws, train=mode == "train", collect=True)
    loss, accuracy = losses(output.logits, targets, score)
    if mode == "train":
        (loss + meta["gate_loss_weight"] * output.gate_loss).backward()
    return model, output, loss.detach(), accuracy


def check_gradients(model, expected, scale=1.0):
    assert expected
    got = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert set(got) == set(expected)
    for name, want in expected.items():
        if not name.endswith(NO_GRADIENT):
            allowed = scale * (GRADIENT * np.abs(want).max() + GRADIENT_FLOOR)
            error = float(np.abs(got[name] - want).max())
            assert error <= allowed, name


def check_layer(layer, expected, valid):
    """Everything that a file holds of one layer, at real positions; how many things that were."""
    by_time = {"V": "V", "attn_states": "attn_states"}
    compared = 0
    for name, want in expected.items():
        if name == "mask_bits":
            want = np.unpackbits(want, axis=-1, count=valid.shape[1]).astype(bool)
            got = np.broadcast_to(layer["mask"].numpy(), want.shape)
            assert (got == want)[valid].all(), name
        elif name in ("query_bin", "key_bin"):
            assert (layer[name].numpy() == want)[valid].all(), name
        elif name in ("selected_score", "selected_target"):
            size = max(1.0, float(np.abs(want).max()))
            assert np.abs(layer[name].numpy() - want).max() <= ACTIVATION * size, name
        elif name == "layer_gate_loss":
            assert abs(float(layer[name]) - float(want)) <= LOSS
        else:
            got = layer[name].numpy()
            want = np.moveaxis(want, 1, 2) if name in by_time else want
            assert np.abs(got - want)[valid].max() <= ACTIVATION, name
        compared += 1
    return compared


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_the_originals(name, mode):
    arrays = golden_data.load(name)
    model, output, loss, accuracy = run(arrays, mode, torch.float32)
    valid = arrays["attn_mask"].astype(bool)
    expected = group(arrays, f"{mode}/")
    assert abs(float(loss) - float(expected["loss"])) <= LOSS
    assert abs(float(accuracy) - float(expected["acc"])) <= 1e-6
    for key, got in (("last_hidden_state", output.hidden), ("logits", output.logits)):
        if key in expected:
            assert np.abs(got.detach().numpy() - expected[key])[valid].max() <= ACTIVATION, key
    compared = 0
    for index, layer in enumerate(output.layers):
        compared += check_layer(layer, group(expected, f"layer{index}/"), valid)
    assert compared or name.startswith("B_")
    if mode == "train":
        assert abs(float(output.gate_loss.detach()) - float(expected["gate_loss"])) <= LOSS
        partner = name.replace(".npz", "_grad.npz")
        gradients = group(arrays, "grad/") or group(golden_data.load(partner), "grad/")
        check_gradients(model, gradients)


@pytest.mark.parametrize("name", DOUBLE)
def test_in_float64_the_models_agree_to_rounding(name):
    reference, arrays = golden_data.load(name), golden_data.load(name.replace("_float64", ""))
    valid = arrays["attn_mask"].astype(bool)
    for mode in ("train", "eval"):
        model, output, loss, _ = run(arrays, mode, torch.float64)
        expected = group(reference, f"{mode}/")
        assert abs(float(loss) - float(expected["loss"])) <= 1e-9
        assert abs(float(output.gate_loss.detach()) - float(expected["gate_loss"])) <= 1e-9
        hidden = output.hidden.detach().numpy()
        assert np.abs(hidden - expected["last_hidden_state"])[valid].max() <= 1e-9
        if mode == "train":
            check_gradients(model, group(reference, "grad/"), scale=1e-9 / ACTIVATION)


def test_a_batch_of_one_is_not_masked():
    arrays = golden_data.load("A_mamba2_hax_batch1_eval.npz")
    _, output, loss, accuracy = run(arrays, "eval", torch.float32)
    expected, valid = group(arrays, "eval/"), arrays["attn_mask"].astype(bool)
    assert abs(float(loss) - float(expected["loss"])) <= LOSS
    assert abs(float(accuracy) - float(expected["acc"])) <= 1e-6
    compared = sum(
        check_layer(layer, group(expected, f"layer{index}/"), valid)
        for index, layer in enumerate(output.layers)
    )
    assert compared


def test_twenty_training_steps():
    arrays = golden_data.load("E_train_mamba2_hax.npz")
    results = train(arrays)
    for name in ("loss", "gate_loss"):
        assert np.abs(results[name] - arrays[name]).max() <= 2e-5, name
    assert np.abs(results["acc"] - arrays["acc"]).max() <= 1e-6
    for name, want in group(arrays, "final/").items():
        # Adam turns these biases' rounding noise into steps.
        if not name.endswith(("dx_proj_3.bias", "dx_proj_2.bias")):
            assert np.abs(results[f"final/{name}"] - want).max() <= 5e-5, name
    decided = {name for name in results if name.startswith("decisions/")}
    kinds = ("query_code", "key_code", "lifetime", "ranking")
    assert decided == {f"decisions/layer{i}/{kind}" for i in range(2) for kind in kinds}


class TestOperations:
    """Group C, in float64 with every gradient."""

    def check(self, name, function, tolerance=1e-10):
        arrays = golden_data.load(name)
        inputs = {key: torch.tensor(x, requires_grad=True) for key, x in group(arrays, "in/").items()}
        outputs = function(inputs, arrays)
        for key, want in group(arrays, "out/").items():
            if key in outputs:
                error = np.abs(outputs[key].detach().numpy() - want).max()
                assert error <= tolerance * max(1.0, np.abs(want).max()), key
        (outputs["y"] * torch.from_numpy(arrays["cotangent"])).sum().backward()
        for key, want in group(arrays, "grad/").items():
            error = np.abs(inputs[key].grad.numpy() - want).max()
            assert error <= tolerance * max(1.0, np.abs(want).max()), key

    kernels = Kernels(False, CPU, torch.float64)

    def test_causal_conv1d(self):
        def run(x, _):
            y = self.kernels.causal_conv1d(x["x"].transpose(1, 2), x["weight"][:, None], x["bias"])
            return {"y": y.transpose(1, 2)}

        self.check("C_causal_conv_silu.npz", run)

    def test_selective_scan(self):
        def run(x, _):
            u, delta, z, B, C = (x[name].transpose(1, 2) for name in ("u", "delta", "z", "B", "C"))
            y = self.kernels.selective_scan(u, delta, x["delta_bias"], x["A"], B, C, x["D"], z)
            return {"y": y.transpose(1, 2)}

        self.check("C_selective_scan.npz", run)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_ssd(self, groups):
        def run(x, _):
            names = ("x", "dt", "dt_bias", "A", "B", "C", "D")
            return {"y": self.kernels.ssd(**{name: x[name] for name in names}, chunk_size=32)}

        self.check(f"C_ssd_groups{groups}.npz", run)

    def test_gated_norm(self):
        def run(x, arrays):
            return {"y": self.kernels.gated_rms_norm(x["x"], x["z"], x["weight"], float(arrays["eps"]))}

        self.check("C_rmsnorm_gated.npz", run)

    def test_norm(self):
        def run(x, arrays):
            norm = RMSNorm(x["x"].shape[-1], float(arrays["eps"]))
            return {"y": torch.func.functional_call(norm, {"weight": x["weight"]}, x["x"])}

        self.check("C_rmsnorm.npz", run)

    def test_window_attention(self):
        def run(x, arrays):
            settings = Settings(
                arch="samba",
                hidden_size=x["x"].shape[-1],
                attention_heads=int(arrays["num_heads"]),
                attention_window=int(arrays["window_size"]),
                rope_theta=float(arrays["rope_theta"]),
            )
            layer = WindowAttention(settings, self.kernels)
            weights = {f"{name}.weight": x[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
            mask = torch.from_numpy(arrays["attn_mask"].astype(bool))
            y, _ = torch.func.functional_call(layer, weights, (x["x"], mask, None, False, None))
            return {"y": y}

        # The rotation tables are float32.
        self.check("C_window_attention.npz", run, tolerance=2e-6)

    def test_ranking_loss(self):
        arrays = golden_data.load("C_ranking_loss.npz")
        predicted = torch.tensor(arrays["pred"], dtype=torch.float64, requires_grad=True)
        loss = ranking_loss(predicted, torch.tensor(arrays["target"], dtype=torch.float64))
        loss.backward()
        assert abs(float(loss) - float(arrays["loss"])) <= 1e-10
        assert np.abs(predicted.grad.numpy() - arrays["grad_pred"]).max() <= 1e-10
