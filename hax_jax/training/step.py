"""One training step and one evaluation step, as pure functions to be compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from hax_jax.config import TrainingConfig
from hax_jax.data.batch import Batch
from hax_jax.training.adapter import apply, logits_and_gate_loss
from hax_jax.training.flat import FlatStructure
from hax_jax.training.optimizer import learning_rate_schedule, make_optimizer
from hax_jax.training.recall import visible_shares
from hax_jax.training.state import BAD_PARTS, SUMMED, ModelStructure, Purpose, TrainState, buffers_of

Sums = dict[str, Any]


@jax.named_scope("loss")
def token_losses(logits: Float[Array, "b s v"], batch: Batch) -> Float[Array, "b s"]:
    """Cross-entropy, -log softmax(logits)[target] in nats, at scored positions; 0 elsewhere.

    Args:
      logits: of all positions (b, t, v), or of `batch.scored` alone (m, s, v).
      batch: what was predicted.
    """
    targets, scored = _targets(logits, batch)
    return jnp.where(scored, _cross_entropy(logits, targets), 0.0)


@jax.custom_vjp
def _cross_entropy(logits, targets):
    """logsumexp(logits) - logits[target]; the gradient, softmax - 1 at the target, waits for no loss."""
    # A sum over a comparison is one pass; picking one entry is a gather.
    picked = jnp.where(_is_target(logits, targets), logits, 0.0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _is_target(logits, targets):
    return targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)


def _cross_entropy_forward(logits, targets):
    return _cross_entropy(logits, targets), (logits, targets)


def _cross_entropy_backward(saved, d_loss):
    logits, targets = saved
    # Behind a barrier a softmax from the logits on is one kernel, and not the loss' kernels and one more.
    probabilities = jax.nn.softmax(jax.lax.optimization_barrier(logits), axis=-1)
    return (probabilities - _is_target(logits, targets)) * d_loss[..., None], None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


@jax.named_scope("loss")
def sequence_accuracy(logits: Float[Array, "b s v"], batch: Batch) -> Float[Array, " b"]:
    """Share of a sequence's scored positions whose most probable token is the target; 0 for filler items.

    `logits` as in `token_losses`.
    """
    targets, scored = _targets(logits, batch)
    right = scored & (jnp.argmax(logits, axis=-1) == targets)
    return right.sum(-1, dtype=jnp.float32) / jnp.maximum(scored.sum(-1, dtype=jnp.float32), 1.0)


def make_train_step(
    structure: ModelStructure | FlatStructure,
    optimizer: optax.GradientTransformation,
    training: TrainingConfig,
    peak: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """The update of a run: train_step(state, batches) -> (state, metrics).

    loss = cross-entropy averaged over all scored positions + `gate_loss_weight` * gate loss. `batches` is a
    `Batch` with a leading axis of grad_accumulation_steps; their losses are joined so that the gradient is
    that of one batch of all their rows. An update whose loss or gradient is not finite is
    refused: the state stays the last good one, the batch is skipped and counted, and the step counts as made.
    The refusal after `max_refused_updates` of them ends the run: from then on nothing changes any more.

    Metrics are means since the last log step, which the state carries, so that a resumed run logs the same
    numbers: `loss` is the cross-entropy alone, `gate_loss` the unweighted gate loss, `tokens` the tokens of
    an update that are not padding; refused updates are left out of them (NaN where all were refused).
    `learning_rate` is that of this update, `refused` and `bad_step` are the state's.

    Args:
      structure: the module without its arrays.
      optimizer: from gradients to updates.
      training: the other settings.
      peak: as in `learning_rate_schedule`, for the metrics.

    Returns:
      A pure function, to be compiled with its first argument donated. It may be called in a loop.
    """
    gradient = jax.grad(_make_objective(structure, training), has_aux=True)

    def train_step(state, batches):
        key = jax.random.fold_in(jax.random.fold_in(state.key, Purpose.TRAIN), state.step)
        if training.grad_accumulation_steps == 1:
            batch = jax.tree.map(lambda x: x[0], batches)
            grads, (parts, buffers) = gradient(
                state.params, state.buffers, batch, jax.random.fold_in(key, 0), _num_scored(batch)
            )
        else:
            grads, parts, buffers = _accumulate(gradient, state, batches, key)
        with jax.named_scope("update"):
            parts |= {"grad_norm": optax.global_norm(grads), "steps": jnp.float32(1.0)}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        parts = {name: x.astype(jnp.float32) for name, x in parts.items()}
        new = dataclasses.replace(
            state, params=optax.apply_updates(state.params, updates), buffers=buffers, opt_state=opt_state
        )
        finite = jnp.isfinite(parts["loss"] + parts["gate_loss"] + parts["grad_norm"]) & _all_finite(buffers)
        new = _accept_or_refuse(finite, new, state, parts, training)
        return new, metrics_of(training, new, peak)

    return train_step


def metrics_of(training: TrainingConfig, state: TrainState, peak: Any = None) -> Sums:
    """The metrics of the last update, from the state after it; see `make_train_step`.

    Args:
      training: the settings.
      state: after at least one update.
      peak: as in `learning_rate_schedule`.
    """
    metrics = {name: state.sums[name] / state.sums["steps"] for name in SUMMED if name != "steps"}
    # The rate was that of the updates before this one. It was made and counts now; or it was refused; or its
    # refusal ended the run, and not even the step was made.
    ended, skipped = state.bad_step == state.step, state.bad_step == state.step - 1
    before = jnp.where(ended, 1, jnp.where(skipped, 0, -1))
    schedule = learning_rate_schedule(training, peak)
    metrics["learning_rate"] = schedule(state.step - state.refused + before)
    return metrics | {"refused": state.refused, "bad_step": state.bad_step}


def make_rated_step(
    structure: ModelStructure | FlatStructure, training: TrainingConfig
) -> Callable[..., tuple[TrainState, Sums]]:
    """As `make_train_step`, with the rate as an argument: step(state, batches, peak).

    Under `jax.vmap` over states and rates it is the update of a population. The rate `peak` is an argument
    for a single run too, because a compiler folds constants, and rounds them, as it sees fit.
    """

    def rated_step(state, batches, peak):
        optimizer = make_optimizer(training, peak)
        return make_train_step(structure, optimizer, training, peak)(state, batches)

    return rated_step


def make_eval_step(structure: ModelStructure) -> Callable[..., Sums]:
    """The scoring of a batch: eval_step(params, buffers, key, batch, totals) -> totals with the batch added.

    The totals stay on the device: `loss` (summed over scored positions), `num_scored`, and by n_context and
    n_key, (max_n_context + 1, max_n_key + 1) each, `accuracy` (summed over sequences) and `num_items`.
    Where they hold `recall`, the shares of `recall.visible_shares` are added to it. Filler rows add nothing.
    """

    def eval_step(params, buffers, key, batch, totals):
        model = structure.merge(params, buffers)
        output = apply(model, batch, key, train=False)
        logits, _ = _at_scored(output, batch)
        rows, columns = totals["num_items"].shape
        # Matmuls of 0/1 matrices, for sums in a fixed order; a scatter would add in any order on a GPU.
        by_context = jax.nn.one_hot(batch.n_context, rows, dtype=jnp.float32)
        by_key = jax.nn.one_hot(batch.n_key, columns, dtype=jnp.float32)

        def table(values):
            return jnp.einsum("bc,b,bk->ck", by_context, values, by_key, precision=jax.lax.Precision.HIGHEST)

        seen = {}
        if "recall" in totals:
            seen["recall"] = totals["recall"] + visible_shares(model, output, batch)
        return seen | {
            "loss": totals["loss"] + token_losses(logits, batch).sum(),
            "num_scored": totals["num_scored"] + _num_scored(batch, least=0.0),
            "accuracy": totals["accuracy"] + table(sequence_accuracy(logits, batch)),
            "num_items": totals["num_items"] + table((batch.item_weight > 0).astype(jnp.float32)),
        }

    return eval_step


def _make_objective(
    structure: ModelStructure | FlatStructure, training: TrainingConfig
) -> Callable[..., Any]:
    """What is differentiated: a batch's part of the loss, with its metrics and the model's new buffers."""

    def objective(params, buffers, batch, key, num_scored):
        model = structure.merge(params, buffers)
        logits, gate_loss = _at_scored(apply(model, batch, key, train=True), batch)
        parts = {
            "loss": token_losses(logits, batch).sum() / num_scored,
            "gate_loss": gate_loss / training.grad_accumulation_steps,
            "accuracy": _mean_accuracy(logits, batch) / training.grad_accumulation_steps,
            "tokens": jnp.sum(batch.padding_mask, dtype=jnp.float32),
        }
        return parts["loss"] + training.gate_loss_weight * parts["gate_loss"], (parts, buffers_of(model))

    return objective


def _accumulate(gradient, state, batches, key):
    """Sums gradients and metrics over the leading axis of `batches`, one batch after the other."""
    num_scored = jax.lax.map(lambda batch: _num_scored(batch, least=0.0), batches).sum()
    num_scored = jnp.maximum(num_scored, 1.0)

    def of_batch(buffers, index, batch):
        batch_key = jax.random.fold_in(key, index)
        grads, (parts, buffers) = gradient(state.params, buffers, batch, batch_key, num_scored)
        return _at_least_float32(grads), parts, buffers

    def add(carry, inputs):
        grads, parts, buffers = of_batch(carry[-1], *inputs)
        return (*jax.tree.map(jnp.add, carry[:-1], (grads, parts)), buffers), None

    indices = jnp.arange(jax.tree.leaves(batches)[0].shape[0])
    first = jax.tree.map(lambda x: x[0], (indices, batches))
    shapes = jax.eval_shape(of_batch, state.buffers, *first)[:-1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, (*zeros, state.buffers), (indices, batches))
    return total


def _at_least_float32(tree):
    """Sums of many gradients are kept in float32 even where the gradients are bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


@jax.named_scope("update")
def _accept_or_refuse(
    finite, new: TrainState, old: TrainState, parts: Sums, training: TrainingConfig
) -> TrainState:
    """`new` with its metrics where `finite`, else `old` with the refusal counted; see `make_train_step`."""
    runs = old.refused <= training.max_refused_updates
    accepted, skipped = finite & runs, ~finite & runs
    refused = old.refused + skipped
    kept = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)
    starts = runs & (old.step % training.log_every_steps == 0)
    sums = {
        name: jnp.where(starts, 0.0, old.sums[name]) + jnp.where(accepted, parts[name], 0.0)
        for name in SUMMED
    }
    return dataclasses.replace(
        kept,
        # The step of the refusal that ends the run is not made: its number is that of the state kept.
        step=old.step + (refused <= training.max_refused_updates),
        sums=sums,
        refused=refused,
        bad_step=jnp.where(skipped, old.step, old.bad_step),
        bad_parts={name: jnp.where(skipped, parts[name], old.bad_parts[name]) for name in BAD_PARTS},
    )


def _all_finite(arrays: dict[str, Any]):
    """Whether no number among the arrays is infinite or undefined."""
    finite = jnp.asarray(True)
    for array in arrays.values():
        if jnp.issubdtype(array.dtype, jnp.floating):
            finite &= jnp.all(jnp.isfinite(array))
    return finite


def _at_scored(output: Any, batch: Batch):
    """Logits at the batch's scored positions, item by item where it knows them so, and the gate loss."""
    logits, gate_loss = logits_and_gate_loss(output)
    if batch.scored is not None and logits.shape[:2] != batch.scored.position.shape:
        logits = batch.scored.take(logits, batch.packing)
    return logits, gate_loss


def _targets(logits, batch: Batch):
    """The targets that belong to logits, and which of them count; both (b, t) or, of scored ones, (m, s)."""
    if batch.scored is None or logits.shape[:2] != batch.scored.position.shape:
        return batch.targets, batch.score_mask & (batch.item_weight > 0)[:, None]
    targets = batch.scored.take(batch.targets, batch.packing)
    return targets, batch.scored.used & (batch.item_weight > 0)[:, None]


def counted(batch: Batch) -> Batch:
    """The batch with `num_scored`: known ahead, the gradient of the loss does not wait for the loss."""
    return dataclasses.replace(batch, num_scored=_num_scored(batch, least=0.0))


def _num_scored(batch: Batch, least: float = 1.0):
    if batch.num_scored is not None:
        return jnp.maximum(batch.num_scored, least)
    scored = batch.score_mask if batch.scored is None else batch.scored.used
    counts = scored & (batch.item_weight > 0)[:, None]
    return jnp.maximum(counts.sum(dtype=jnp.float32), least)


def _mean_accuracy(logits, batch: Batch):
    items = jnp.maximum((batch.item_weight > 0).sum(dtype=jnp.float32), 1.0)
    return sequence_accuracy(logits, batch).sum() / items
