"""Group E: training steps with AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hax_jax.config import TrainingConfig
from hax_jax.interop.golden.files import Check, GoldenFile, largest
from hax_jax.interop.golden.models import make_batch, make_draws, make_model, make_objective, wrong_mask_rows
from hax_jax.interop.state_dict import rename
from hax_jax.training.optimizer import learning_rate_schedule, make_optimizer
from hax_jax.training.state import split_model

LOSS, PARAMETER = 2e-5, 5e-5
# Their gradients are rounding noise, which Adam turns into steps.
UNDETERMINED = ("dx_proj_3.bias", "dx_proj_2.bias")


def check_trajectory(golden: GoldenFile) -> list[Check]:
    """Trains from the file's initial weights on its batches and random arrays, and compares every step."""
    meta = golden.meta
    model = make_model(golden, golden.group("init/"), "float32")
    structure, params, buffers = split_model(model)
    training = _training_config(meta)
    optimizer, schedule = make_optimizer(training), learning_rate_schedule(training)
    objective = make_objective(structure, buffers, meta["gate_loss_weight"], train=True)

    @jax.jit
    def step(params, opt_state, batch, draws):
        (_, (loss, gate_loss, accuracy, output)), grads = jax.value_and_grad(objective, has_aux=True)(
            params, batch, draws
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        key_sets = [layer.branch.key_set for layer in output.layers if layer.branch is not None]
        return optax.apply_updates(params, updates), opt_state, (loss, gate_loss, accuracy, key_sets)

    opt_state = optimizer.init(params)
    num_steps = golden["sequences"].shape[0]
    got: dict[str, list[float]] = {"loss": [], "gate_loss": [], "acc": [], "lr": []}
    mask_steps = 0
    for index in range(num_steps):
        batch, valid = _batch(golden, index, meta["config"]["pad_token_id"])
        draws = make_draws(golden, "rand/", len(model.layers), jnp.float32, step=index)
        params, opt_state, (loss, gate_loss, accuracy, key_sets) = step(params, opt_state, batch, draws)
        for name, value in (
            ("loss", loss),
            ("gate_loss", gate_loss),
            ("acc", accuracy),
            ("lr", schedule(index)),
        ):
            got[name].append(float(value))
        bits = [golden[f"mask_bits/layer{i}"][index] for i in range(len(key_sets))]
        mask_steps += any(wrong_mask_rows(k, b, valid) for k, b in zip(key_sets, bits, strict=True))

    final = rename(model, params)
    worst = largest(
        float(np.abs(final[name] - want).max())
        for name, want in golden.group("final/").items()
        if not name.endswith(UNDETERMINED)
    )
    # A single prediction more or less moves an accuracy by at least 1 / (rows * scored positions).
    limits = {"loss": LOSS, "gate_loss": LOSS, "acc": 1e-6, "lr": 1e-6 * float(golden["lr"].max())}
    checks = [
        Check(name, float(np.abs(np.asarray(got[name]) - golden[name]).max()), limit)
        for name, limit in limits.items()
    ]
    return [
        *checks,
        Check("steps with another mask", float(mask_steps), 0.0),
        Check("parameters", worst, PARAMETER),
    ]


def _training_config(meta) -> TrainingConfig:
    optimizer = meta["optimizer"]
    return TrainingConfig(
        learning_rate=optimizer["lr"],
        warmup_steps=meta["warmup_step"],
        weight_decay=optimizer["weight_decay"],
        adam_b1=optimizer["betas"][0],
        adam_b2=optimizer["betas"][1],
        adam_eps=optimizer["eps"],
    )


def _batch(golden: GoldenFile, index: int, pad: int):
    sequences, mask = golden["sequences"][index], golden["mask"][index]
    valid = sequences[:, :-1] != pad
    return make_batch(sequences[:, :-1], sequences[:, 1:], mask[:, :-1], valid), valid
