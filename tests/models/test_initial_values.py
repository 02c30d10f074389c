"""The original's initial values, by their statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hax_jax.config import ConfigError, ModelConfig
from hax_jax.layers import Precision
from hax_jax.models import build_model
from hax_jax.ops import dispatch
from hax_jax.training.state import split_model

HAX = "sign_bin_lsh+key_selection"


def parameters(**fields) -> dict[str, np.ndarray]:
    model = build_model(ModelConfig(**fields), rngs=nnx.Rngs(0))
    return {name: np.asarray(value) for name, value in split_model(model)[1].items()}


def assert_normal(x: np.ndarray, scale: float) -> None:
    assert abs(x.std() / scale - 1) < 5 / np.sqrt(2 * x.size)
    assert abs(x.mean()) < 5 * scale / np.sqrt(x.size)


def assert_uniform(x: np.ndarray, bound: float) -> None:
    assert np.abs(x).max() <= bound
    assert abs(x.std() / (bound / np.sqrt(3)) - 1) < 5 / np.sqrt(2 * x.size)


def assert_time_steps(bias: np.ndarray) -> None:
    step = np.log1p(np.exp(bias.astype(np.float64)))
    assert (step > 0.00099).all() and (step < 0.101).all()
    assert step.min() < 0.02 and step.max() > 0.005


def test_mamba2():
    p = parameters(arch="mamba2", sparse_arch=HAX)
    mixer = "layers.0.mixer."
    for name in ("in_proj.kernel", "hax.key_query_proj.kernel", "hax.scorer.layers.0.kernel", "conv.weight"):
        assert_normal(p[mixer + name], 0.1)
    assert_normal(p["embeddings.embedding"], 0.1)
    assert_uniform(p[mixer + "out_proj.kernel"], 128**-0.5 / 2**0.5)
    np.testing.assert_allclose(np.exp(p[mixer + "A_log"]), np.arange(1, 9), rtol=1e-6)
    assert_time_steps(p[mixer + "dt_bias"])
    for name in ("D", "norm.weight", "hax.output_scale"):
        assert (p[mixer + name] == 1).all()
    for name in ("conv.bias", "hax.scorer.layers.0.bias", "hax.scorer.layers.2.bias"):
        assert (p[mixer + name] == 0).all()


def test_mamba():
    p = parameters(arch="mamba", state_size=16, sparse_arch=HAX)
    mixer = "layers.1.mixer."
    for name in ("in_proj.kernel", "x_proj.kernel", "out_proj.kernel", "hax.key_query_proj.kernel"):
        assert_normal(p[mixer + name], 0.1)
    assert_uniform(p[mixer + "conv.weight"], 0.5)
    assert_uniform(p[mixer + "conv.bias"], 0.5)
    assert_uniform(p[mixer + "dt_proj.kernel"], 8**-0.5)
    assert_time_steps(p[mixer + "dt_proj.bias"])
    np.testing.assert_allclose(np.exp(p[mixer + "A_log"]), np.tile(np.arange(1, 17), (128, 1)), rtol=1e-6)


def test_samba():
    p = parameters(arch="samba", hidden_size=32, state_size=16, num_layers=4, initializer_range=0.02)
    assert_normal(p["embeddings.embedding"], 0.02)
    for name in (
        "layers.0.mixer.out_proj.kernel",
        "layers.1.mixer.q_proj.kernel",
        "layers.3.mlp.down_proj.kernel",
    ):
        assert_normal(p[name], 0.02)
    assert_uniform(p["layers.2.mixer.conv.weight"], 0.5)


@pytest.mark.parametrize(
    ("precision", "param", "matmul", "logits"),
    [
        ("default", "float32", "bfloat16", "float32"),
        ("float32", "float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16", "float32"),
    ],
)
def test_precisions(precision, param, matmul, logits):
    config = ModelConfig(hidden_size=16, head_dim=4, state_size=8, sparse_arch=HAX, precision=precision)
    model = build_model(config, rngs=nnx.Rngs(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {param}
    assert Precision.named(precision).matmul == matmul
    rows = jnp.arange(20, dtype=jnp.int32)[None]
    output = model(rows, key=jax.random.key(0), train=True)
    assert output.logits.dtype == logits and np.isfinite(output.logits).all()
    assert output.gate_loss.dtype == np.float32


def test_kernels_by_name_need_a_device_that_runs_them(monkeypatch):
    monkeypatch.setattr(dispatch, "missing_for_mosaic_gpu", lambda: "needs a GPU")
    config = ModelConfig(implementation="mosaic_gpu")
    with pytest.raises(ConfigError, match=r"model\.implementation.*'mosaic_gpu', which needs a GPU"):
        build_model(config, rngs=nnx.Rngs(0))
