"""Groups A and B: whole models, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hax_jax.data.batch import Batch
from hax_jax.interop.golden.files import Check, GoldenFile, largest, model_config
from hax_jax.interop.state_dict import load_state_dict, rename
from hax_jax.layers import RoutingDraws
from hax_jax.models import LanguageModel, ModelOutput, build_model
from hax_jax.training.state import split_model
from hax_jax.training.step import sequence_accuracy, token_losses

# What the golden files' README suggests for float32: absolute for activations of order 1, relative to a
# tensor's largest entry for gradients.
ACTIVATION, LOSS, GRADIENT, GRADIENT_FLOOR = 2e-5, 5e-6, 2e-5, 1e-7
# The float64 files and we differ in the order of sums alone.
DOUBLE = 1e-9

# Mathematically zero (the ranking loss sees differences of scores only): rounding noise on both sides.
NO_GRADIENT = "dx_proj_3.bias"


def make_model(golden: GoldenFile, params: dict[str, np.ndarray], precision: str) -> LanguageModel:
    """The model that a golden file describes, in parity routing, with the given original weights."""
    model = build_model(model_config(golden.meta, precision), rngs=nnx.Rngs(0))
    load_state_dict(model, params)
    return model


def make_batch(tokens, targets, score_mask, padding_mask) -> Batch:
    """A Batch of a golden file's arrays."""
    rows = tokens.shape[0]
    return Batch(
        tokens=jnp.asarray(tokens, jnp.int32),
        targets=jnp.asarray(targets, jnp.int32),
        score_mask=jnp.asarray(score_mask, bool),
        padding_mask=jnp.asarray(padding_mask, bool),
        n_context=jnp.ones(rows, jnp.int32),
        n_key=jnp.ones(rows, jnp.int32),
        item_weight=jnp.ones(rows, jnp.float32),
    )


def make_draws(golden: GoldenFile, prefix: str, num_layers: int, dtype, step: int | None = None):
    """The random arrays that the original used, one RoutingDraws a layer."""

    def array(name):
        if name not in golden:
            return None
        values = golden[name] if step is None else golden[name][step]
        return jnp.asarray(values, dtype)

    return tuple(
        RoutingDraws(array(f"{prefix}layer{i}/hash_proj"), array(f"{prefix}layer{i}/noise"))
        for i in range(num_layers)
    )


def make_objective(structure, buffers, gate_loss_weight: float, train: bool):
    """objective(params, batch, draws) -> loss, (cross-entropy, gate loss, accuracy, model output)."""

    def objective(params, batch, draws):
        output = structure.merge(params, buffers)(
            batch.tokens, padding_mask=batch.padding_mask, draws=draws, train=train
        )
        loss = token_losses(output.logits, batch).sum() / batch.score_mask.sum()
        accuracy = sequence_accuracy(output.logits, batch).mean()
        return loss + gate_loss_weight * output.gate_loss, (loss, output.gate_loss, accuracy, output)

    return objective


def check_model(golden: GoldenFile) -> list[Check]:
    """Compares everything that a file of group A or B holds: both modes, gradients where it has them."""
    return _compare(golden, reference=golden, precision="float32")


def check_gradients(golden: GoldenFile) -> list[Check]:
    """Compares a `_grad` file of group B; inputs come from its partner."""
    return _compare(golden.partner("grad"), reference=golden, precision="float32")


def check_double(golden: GoldenFile) -> list[Check]:
    """Compares a `_float64` file of group A in float64; inputs come from its partner."""
    with jax.enable_x64(True):
        return _compare(golden.partner("float64"), reference=golden, precision="float64")


def _compare(inputs: GoldenFile, reference: GoldenFile, precision: str) -> list[Check]:
    model = make_model(inputs, inputs.group("param/"), precision)
    structure, params, buffers = split_model(model)
    batch = make_batch(inputs["inputs"], inputs["labels"], inputs["mask"], inputs["attn_mask"])
    scale = 1.0 if precision == "float32" else DOUBLE / ACTIVATION
    dtype = jnp.dtype(precision)
    checks: list[Check] = []
    for mode in ("train", "eval"):
        expected = reference.group(f"{mode}/")
        gradients = reference.group("grad/") if mode == "train" else {}
        if not expected and not gradients:
            continue
        objective = make_objective(structure, buffers, inputs.meta["gate_loss_weight"], mode == "train")
        draws = make_draws(inputs, f"{mode}/rand/", len(model.layers), dtype)
        if gradients:
            run = jax.jit(jax.value_and_grad(objective, has_aux=True))
            (_, (loss, gate_loss, accuracy, output)), grads = run(params, batch, draws)
            checks.append(gradient_check(rename(model, grads), gradients, scale))
        else:
            _, (loss, gate_loss, accuracy, output) = jax.jit(objective)(params, batch, draws)
        checks += _check_scalars(mode, expected, loss, gate_loss, accuracy, scale)
        checks += _check_arrays(mode, expected, output, inputs["attn_mask"].astype(bool), scale)
    return checks


def gradient_check(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], scale: float) -> Check:
    """The worst gradient, its error relative to the tensor's largest entry."""
    worst = 0.0
    for name, want in expected.items():
        if name.endswith(NO_GRADIENT):
            continue
        allowed_size = np.abs(want).max() + GRADIENT_FLOOR / GRADIENT
        worst = np.maximum(worst, np.abs(got[name] - want).max() / allowed_size)
    return Check("gradients", float(worst), scale * GRADIENT)


def _check_scalars(mode, expected, loss, gate_loss, accuracy, scale) -> list[Check]:
    # One prediction more or less changes an accuracy by far more than this.
    limits = {"loss": (loss, LOSS * scale), "gate_loss": (gate_loss, LOSS * scale), "acc": (accuracy, 1e-6)}
    return [
        Check(f"{mode}/{name}", abs(float(got) - float(expected[name])), tolerance)
        for name, (got, tolerance) in limits.items()
        if name in expected
    ]


def _check_arrays(mode: str, expected, output: ModelOutput, valid: np.ndarray, scale: float) -> list[Check]:
    tolerance = ACTIVATION * scale
    checks = [
        Check(f"{mode}/{name}", largest_difference(getattr(output, ours), expected[name], valid), tolerance)
        for name, ours in (("last_hidden_state", "hidden"), ("logits", "logits"))
        if name in expected
    ]
    by_quantity: dict[str, list[tuple[float, float]]] = {}
    for index, layer in enumerate(output.layers):
        prefix = f"layer{index}/"
        layer_expected = {
            name.removeprefix(prefix): x for name, x in expected.items() if name.startswith(prefix)
        }
        for quantity, error, limit in _layer_errors(layer, layer_expected, valid, tolerance, LOSS * scale):
            by_quantity.setdefault(quantity, []).append((error, limit))
    for quantity, found in by_quantity.items():
        checks.append(Check(f"{mode}/{quantity}", largest(error for error, _ in found), found[0][1]))
    return checks


def _layer_errors(layer, expected, valid, tolerance, loss_tolerance):
    """Yields (quantity, error, tolerance) of what a file holds of one layer."""
    if "mixer_out" in expected:
        yield "mixer_out", largest_difference(layer.mixer, expected["mixer_out"], valid), tolerance
    branch = layer.branch
    if branch is None:
        return
    floats = {"Q2": branch.queries, "K2": branch.keys, "key_score": branch.key_scores}
    for name, got in floats.items():
        if name in expected:
            yield name, largest_difference(got, expected[name], valid), tolerance
    for name, got in (("V", branch.values), ("attn_states", branch.attention)):
        if name in expected:
            by_time = np.moveaxis(expected[name], 1, 2)
            yield name, largest_difference(got, by_time, valid), tolerance
    for source in branch.key_set.sources:
        for name, attribute in (("query_bin", "query_code"), ("key_bin", "key_code")):
            if name in expected and hasattr(source, attribute):
                wrong = (np.asarray(getattr(source, attribute)) != expected[name]) & valid
                yield name, float(wrong.sum()), 0.0
    if "mask_bits" in expected:
        yield "mask", float(wrong_mask_rows(branch.key_set, expected["mask_bits"], valid)), 0.0
    for name, got in (("selected_score", branch.sampled_scores), ("selected_target", branch.sampled_targets)):
        if name in expected:
            # Targets are sums over up to t queries, so their rounding grows with them.
            size = max(1.0, float(np.abs(expected[name]).max()))
            yield name, float(np.abs(np.asarray(got) - expected[name]).max()) / size, tolerance
    if "layer_gate_loss" in expected:
        yield (
            "layer_gate_loss",
            abs(float(branch.gate_loss) - float(expected["layer_gate_loss"])),
            loss_tolerance,
        )


def wrong_mask_rows(key_set, mask_bits: np.ndarray, valid: np.ndarray) -> int:
    """Number of real query rows whose visible keys differ."""
    length = valid.shape[1]
    position = jnp.arange(length, dtype=jnp.int32)
    got = np.broadcast_to(np.asarray(key_set.tile(position, position)), (valid.shape[0], length, length))
    want = np.unpackbits(mask_bits, axis=-1, count=length).astype(bool)
    return int(((got != want).any(-1) & valid).sum())


def largest_difference(got, want: np.ndarray, valid: np.ndarray) -> float:
    """Largest absolute difference at real positions."""
    return float(np.abs(np.asarray(got) - want)[valid].max())
