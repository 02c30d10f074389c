"""The map to and from the original's state dict."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from hax_jax.config import ModelConfig
from hax_jax.interop.state_dict import StateDictError, entries, load_state_dict, state_dict
from hax_jax.models import build_model
from tests.configs.rows import ROWS, Row

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


# What the original calls the parameters of a layer, and their shapes with the default sizes of each base.
OF_MAMBA = {
    "norm.weight": (64,),
    "mixer.A_log": (128, 16),
    "mixer.D": (128,),
    "mixer.conv1d.weight": (128, 1, 4),
    "mixer.conv1d.bias": (128,),
    "mixer.in_proj.weight": (256, 64),
    "mixer.x_proj.weight": (40, 128),
    "mixer.dt_proj.weight": (128, 8),
    "mixer.dt_proj.bias": (128,),
    "mixer.out_proj.weight": (64, 128),
}
OF_MAMBA2 = {
    "norm.weight": (64,),
    "mixer.A_log": (8,),
    "mixer.D": (8,),
    "mixer.dt_bias": (8,),
    "mixer.conv1d.weight": (192, 1, 4),
    "mixer.conv1d.bias": (192,),
    "mixer.in_proj.weight": (328, 64),
    "mixer.norm.weight": (128,),
    "mixer.out_proj.weight": (64, 128),
}


def of_branch(state_size: int, scored: bool) -> dict[str, tuple[int, ...]]:
    width = 2 * state_size
    names = {"mixer.E": (128,), "mixer.xx_proj.weight": (width, 128)}
    for index, out in enumerate((width, width, 1) if scored else (), start=1):
        names |= {f"mixer.dx_proj_{index}.weight": (out, width), f"mixer.dx_proj_{index}.bias": (out,)}
    return names


def names_of(row: Row) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a row of Table 3 in the original; not of Samba and the doubled ones."""
    base, state_size = (OF_MAMBA, 16) if row.name.startswith("mamba_") else (OF_MAMBA2, 32)
    layer = dict(base)
    if "base" not in row.name:
        layer |= of_branch(state_size, scored=row.name.endswith(("key_selection", "hax")))
    found = {"embeddings.weight": (100, 64), "norm_f.weight": (64,)}
    for index in range(2):
        found |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return found


def abstract(row: Row, argument: str = "") -> Any:
    config = row.experiment(argument).model
    return nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_map_of_every_row_is_one_to_one(row):
    known = entries(abstract(row))
    assert len({entry.name for entry in known}) == len({entry.original_name for entry in known}) == len(known)
    assert sum(int(np.prod(entry.shape)) for entry in known) == row.num_parameters
    if row.name != "samba" and "double" not in row.name:
        assert {entry.original_name: entry.original_shape for entry in known} == names_of(row)
    generator = np.random.default_rng(0)
    for entry in known:
        ours = generator.standard_normal(entry.shape).astype(np.float32)
        again = entry.to_ours(entry.to_original(ours))
        assert again.tobytes() == ours.tobytes() and again.shape == entry.shape


def test_the_names_of_samba_are_the_originals():
    (row,) = (row for row in ROWS if row.name == "samba")
    names = {entry.original_name for entry in entries(abstract(row))}
    mlp = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")} | {"mlp_norm.weight"}
    mamba = {name for name in OF_MAMBA if name != "norm.weight"} | {"mixer_norm.weight"}
    attention = {f"mixer.{name}_proj.weight" for name in "qkvo"} | {"mixer_norm.weight"}
    of_layers = (mamba | mlp, attention | mlp) * 2
    want = {f"layers.{index}.{name}" for index, layer in enumerate(of_layers) for name in layer}
    assert names == want | {"embeddings.weight", "norm_f.weight"}
