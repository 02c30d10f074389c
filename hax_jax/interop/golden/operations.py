"""Group C: single operations in float64, with all gradients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hax_jax.config import ModelConfig
from hax_jax.interop.golden.files import Check, GoldenError, GoldenFile, largest
from hax_jax.layers import Sequence, WindowAttention
from hax_jax.layers.norms import rms_norm
from hax_jax.ops import causal_conv1d, gated_rms_norm, ranking_loss, selective_scan, ssd

DOUBLE = 1e-10
# The library built the rotation tables in float32.
ROTARY = 2e-6


def check_operation(golden: GoldenFile, implementation: str | None = None) -> list[Check]:
    """Recomputes one operation, its extra outputs and its gradients; tells which from the arrays it holds."""
    with jax.enable_x64(True):
        if "pred" in golden:
            return _check_ranking_loss(golden)
        function, tolerance = _function(golden, implementation)
        inputs = {name: jnp.asarray(x, jnp.float64) for name, x in golden.group("in/").items()}

        def run(arguments):
            outputs = function(arguments)
            return (outputs["y"] * golden["cotangent"]).sum(), outputs

        (_, outputs), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(inputs)
        checks = [
            Check(name, _error(outputs[name], want), tolerance) for name, want in golden.group("out/").items()
        ]
        worst = largest(_error(grads[name], want) for name, want in golden.group("grad/").items())
        return [*checks, Check("gradients", worst, tolerance)]


def _error(got, want: np.ndarray) -> float:
    """Largest difference relative to the largest entry, or absolute where entries are below 1."""
    return float(np.abs(np.asarray(got) - want).max() / max(1.0, np.abs(want).max()))


def _function(golden: GoldenFile, implementation: str | None) -> tuple[Callable, float]:
    names = set(golden.group("in/"))
    if {"delta", "u"} <= names:
        return lambda x: _selective_scan(x, implementation), DOUBLE
    if {"dt", "dt_bias"} <= names:
        return lambda x: _ssd(x, implementation), DOUBLE
    if "q_proj" in names:
        return lambda x: _window_attention(x, golden, implementation), ROTARY
    if {"x", "weight", "bias"} <= names:
        return lambda x: _conv(x, implementation), DOUBLE
    if {"x", "z", "weight"} <= names:
        return lambda x: _gated_rms_norm(x, golden, implementation), DOUBLE
    if {"x", "weight"} <= names:
        return lambda x: {"y": rms_norm(x["x"], x["weight"], float(golden["eps"]))}, DOUBLE
    raise GoldenError(f"{golden.path}: inputs {sorted(names)} are those of no known operation")


def _selective_scan(x, implementation):
    time_first = {name: jnp.swapaxes(x[name], 1, 2) for name in ("u", "delta", "z", "B", "C")}
    dt = jax.nn.softplus(time_first["delta"] + x["delta_bias"])
    y, state = selective_scan(
        time_first["u"], dt, x["A"], time_first["B"], time_first["C"], D=x["D"], implementation=implementation
    )
    return {"y": jnp.swapaxes(y * jax.nn.silu(time_first["z"]), 1, 2), "last_state": state}


def _ssd(x, implementation):
    dt = jax.nn.softplus(x["dt"] + x["dt_bias"])
    y, state = ssd(x["x"], dt, x["A"], x["B"], x["C"], D=x["D"], chunk_size=32, implementation=implementation)
    return {"y": y, "final_state": state}


def _gated_rms_norm(x, golden: GoldenFile, implementation):
    eps = float(golden["eps"])
    return {"y": gated_rms_norm(x["x"], x["z"], x["weight"], eps, implementation=implementation)}


def _conv(x, implementation):
    y = causal_conv1d(jnp.swapaxes(x["x"], 1, 2), x["weight"].T, x["bias"], implementation=implementation)
    return {"y": jnp.swapaxes(y, 1, 2)}


def _window_attention(x, golden: GoldenFile, implementation):
    config = ModelConfig(
        arch="samba",
        hidden_size=x["x"].shape[-1],
        attention_heads=int(golden["num_heads"]),
        attention_window=int(golden["window_size"]),
        rope_theta=float(golden["rope_theta"]),
        precision="float64",
        implementation=implementation or "auto",
    )
    layer = WindowAttention(config, rngs=nnx.Rngs(0))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(layer, name).kernel = nnx.Param(x[name].T)
    sequence = Sequence(padding_mask=jnp.asarray(golden["attn_mask"], bool))
    return {"y": layer(x["x"], sequence)}


def _check_ranking_loss(golden: GoldenFile) -> list[Check]:
    pred, target = (jnp.asarray(golden[name], jnp.float64) for name in ("pred", "target"))
    loss, grad = jax.value_and_grad(ranking_loss)(pred, target)
    return [
        Check("loss", _error(loss, golden["loss"]), DOUBLE),
        Check("gradients", _error(grad, golden["grad_pred"]), DOUBLE),
    ]
