"""The map to and from the original's state dict."""

import jax
import numpy as np
import pytest
from flax import nnx

from hax_jax.config import ModelConfig
from hax_jax.interop.state_dict import StateDictError, load_state_dict, state_dict
from hax_jax.models import build_model

SMALL = {"hidden_size": 16, "state_size": 4, "num_heads": 4, "head_dim": 8, "vocab_size": 40}
CONFIGS = [
    ModelConfig(arch="mamba", sparse_arch="sign_bin_lsh+key_selection", **SMALL),
    ModelConfig(arch="mamba2", sparse_arch="sliding_window", **SMALL),
    ModelConfig(arch="mamba2", **SMALL),
    ModelConfig(arch="samba", attention_heads=2, mlp_size=24, num_layers=4, **SMALL),
]


def model(config: ModelConfig, seed: int) -> nnx.Module:
    return build_model(config, rngs=nnx.Rngs(seed))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.arch}-{config.sparse_arch}")
def test_a_round_trip_gives_the_same_bits(config):
    weights = state_dict(model(config, 0))
    other = model(config, 1)
    load_state_dict(other, weights)
    again = state_dict(other)
    assert list(again) == list(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(again[name], array)
    # And the parameters themselves are those of the first model.
    first, second = (jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (model(config, 0), other))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["A_mamba2_hax.npz", "A_mamba_dilated.npz", "B_samba.npz", "B_mamba2.npz"])
def test_names_and_shapes_are_the_originals(golden, name):
    from hax_jax.interop.golden.files import GoldenFile, model_config

    file = GoldenFile(golden.path(name))
    ours = state_dict(model(model_config(file.meta, "float32"), 0))
    assert set(ours) == set(file.meta["parameter_names"])
    for parameter, array in file.group("param/").items():
        assert ours[parameter].shape == array.shape, parameter


def test_what_does_not_fit_is_named_and_changes_nothing():
    config = CONFIGS[1]
    target = model(config, 0)
    before = state_dict(target)
    weights = dict(before)
    del weights["layers.0.mixer.E"]
    weights["layers.0.mixer.dx_proj_1.weight"] = np.zeros((2, 2), np.float32)
    weights["norm_f.weight"] = np.zeros(3, np.float32)
    said = (
        r"missing layers\.0\.mixer\.E; unexpected layers\.0\.mixer\.dx_proj_1\.weight; "
        r"norm_f\.weight has shape \(3,\), expected \(16,\)"
    )
    with pytest.raises(StateDictError, match=said):
        load_state_dict(target, weights)
    for name, array in state_dict(target).items():
        np.testing.assert_array_equal(array, before[name])
