"""Our side of the comparison: the same steps in JAX, each decision held against PyTorch's."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.comparison.exchange import Arrays, Exchange
from hax_jax.config import TrainingConfig
from hax_jax.data.batch import Batch
from hax_jax.interop.golden.models import make_batch, make_objective
from hax_jax.interop.state_dict import load_state_dict
from hax_jax.layers import RoutingDraws
from hax_jax.layers.routing import parity
from hax_jax.models import build_model
from hax_jax.ops import HashBuckets, Lifetimes
from hax_jax.training.optimizer import make_optimizer
from hax_jax.training.state import split_model

# In the order in which a layer makes them.
KINDS = ("query_code", "key_code", "lifetime", "ranking")


@dataclasses.dataclass(frozen=True)
class Run:
    """What our steps gave.

    Attributes:
      curves: `loss`, `gate_loss`, `acc` before each update.
      first_difference: the first decision that PyTorch made otherwise, None if all were the same.
      differing_steps: number of steps with such a decision.
    """

    curves: dict[str, list[float]]
    first_difference: dict[str, Any] | None
    differing_steps: int


def train(exchange: Exchange, theirs: Arrays) -> Run:
    """Takes the steps of an exchange and compares every decision with those in `theirs`."""
    curves: dict[str, list[float]] = {"loss": [], "gate_loss": [], "acc": []}
    first, differing = None, 0
    for step, (scalars, decided, details) in enumerate(steps(exchange)):
        for name, value in zip(curves, scalars, strict=True):
            curves[name].append(float(value))
        found = first_difference(decided, theirs, step)
        differing += found is not None
        if first is None and found is not None:
            first = found | {"margin": margin(exchange, found, details[found["layer"]])}
    return Run(curves, first, differing)


def steps(exchange: Exchange) -> Iterator[tuple[Any, dict[str, jax.Array], list[dict[str, jax.Array]]]]:
    """Takes the steps one by one: loss, gate loss and accuracy, the decisions, what decided in each layer."""
    step_of, params, opt_state = _make_step(exchange)
    for step in range(exchange.num_steps):
        rate = jnp.float32(exchange.arrays["lr"][step])
        params, opt_state, *found = step_of(params, opt_state, *_inputs(exchange, step), rate)
        yield tuple(found)


def _make_step(exchange: Exchange):
    model = build_model(exchange.model, rngs=nnx.Rngs(0))
    prefix = "init/"
    weights = {name[len(prefix) :]: x for name, x in exchange.arrays.items() if name.startswith(prefix)}
    load_state_dict(model, weights)
    structure, params, buffers = split_model(model)
    objective = make_objective(structure, buffers, exchange.meta["gate_loss_weight"], train=True)
    wanted = exchange.meta["optimizer"]
    # A rate of 1 and no decay inside; both are applied from the exchange's own rate of each step.
    optimizer = make_optimizer(
        TrainingConfig(
            learning_rate=1.0,
            warmup_steps=0,
            weight_decay=0.0,
            adam_b1=wanted["betas"][0],
            adam_b2=wanted["betas"][1],
            adam_eps=wanted["eps"],
        )
    )

    @jax.jit
    def step(params, opt_state, batch, draws, rate):
        (_, (loss, gate_loss, accuracy, output)), grads = jax.value_and_grad(objective, has_aux=True)(
            params, batch, draws
        )
        moves, opt_state = optimizer.update(grads, opt_state, params)
        updates = jax.tree.map(lambda m, p: rate * (m - wanted["weight_decay"] * p), moves, params)
        branches = [layer.branch for layer in output.layers]
        decided = decisions(branches, batch, draws)
        details = [_details(branch) for branch in branches]
        scalars = (loss, gate_loss, accuracy)
        return optax.apply_updates(params, updates), opt_state, scalars, decided, details

    return step, params, optimizer.init(params)


def _inputs(exchange: Exchange, step: int) -> tuple[Batch, tuple[RoutingDraws, ...]]:
    arrays = exchange.arrays
    sequences, mask = arrays["sequences"][step], arrays["mask"][step]
    tokens = sequences[:, :-1]
    batch = make_batch(tokens, sequences[:, 1:], mask[:, :-1], tokens != exchange.model.pad_token_id)

    def drawn(layer, name):
        array = arrays.get(f"rand/layer{layer}/{name}")
        return None if array is None else jnp.asarray(array[step])

    draws = tuple(
        RoutingDraws(drawn(layer, "hash_proj"), drawn(layer, "noise"))
        for layer in range(exchange.model.num_layers)
    )
    return batch, draws


def decisions(branches, batch: Batch, draws) -> dict[str, jax.Array]:
    """The discrete decisions of a forward pass as integers, in the baseline's form.

    Per layer: `query_code`, `key_code` (b, t); `lifetime` (b, t), how many of the real queries see a key
    through key selection; `ranking` (b, k), the positions sampled for the gate loss, best target first.
    Pads, which end a row, have -1.
    """
    valid = batch.padding_mask
    position = jnp.arange(valid.shape[1], dtype=jnp.int32)
    num_valid = valid.sum(-1, dtype=jnp.int32)[:, None]
    found = {}
    for index, branch in enumerate(branches):
        for source in branch.key_set.sources if branch is not None else ():
            if isinstance(source, HashBuckets):
                found[f"layer{index}/query_code"] = jnp.where(valid, source.query_code, -1)
                found[f"layer{index}/key_code"] = jnp.where(valid, source.key_code, -1)
            elif isinstance(source, Lifetimes):
                lifetime = jnp.maximum(jnp.minimum(source.expiry, num_valid) - position, 0)
                found[f"layer{index}/lifetime"] = jnp.where(valid, lifetime, -1)
        if branch is not None and branch.sampled_targets is not None:
            count = branch.sampled_targets.shape[1]
            sampled = jax.lax.top_k(jnp.where(valid, draws[index].noise, -1), count)[1]
            order = jnp.argsort(-branch.sampled_targets, axis=1, stable=True)
            found[f"layer{index}/ranking"] = jnp.take_along_axis(sampled, order, axis=1)
    return found


def _details(branch) -> dict[str, jax.Array]:
    """The numbers that decide."""
    if branch is None:
        return {}
    found = {"queries": branch.queries, "keys": branch.keys, "targets": branch.sampled_targets}
    return {name: x for name, x in (found | {"scores": branch.key_scores}).items() if x is not None}


def first_difference(decided, theirs: Arrays, step: int) -> dict[str, Any] | None:
    """The first decision of a step that differs: by layer, then kind, row and position."""
    layers = sorted({int(name.split("/")[0].removeprefix("layer")) for name in decided})
    for layer in layers:
        for kind in KINDS:
            name = f"layer{layer}/{kind}"
            if name not in decided:
                continue
            ours, other = np.asarray(decided[name]), theirs[f"decisions/{name}"][step]
            places = np.argwhere(ours != other)
            if len(places):
                row, position = (int(x) for x in places[0])
                return {
                    "step": step,
                    "layer": layer,
                    "kind": kind,
                    "row": row,
                    "position": position,
                    "jax": int(ours[row, position]),
                    "torch": int(other[row, position]),
                    "count_in_step": len(places),
                }
    return None


def margin(exchange: Exchange, found: dict[str, Any], details) -> float | None:
    """How far the number that decided was from the other decision, on our side; None if that is no number."""
    row, position = found["row"], found["position"]
    drawn = f"rand/layer{found['layer']}/"
    if found["kind"] in ("query_code", "key_code"):
        vectors = details["queries" if found["kind"] == "query_code" else "keys"]
        hashed = np.asarray(parity.hash_features(jnp.asarray(vectors)))[row, position]
        hashed = hashed @ exchange.arrays[f"{drawn}hash_proj"][found["step"]]
        if "argmax_lsh" in exchange.model.sources:
            return float(abs(hashed[found["jax"]] - hashed[found["torch"]]))
        bits = found["jax"] ^ found["torch"]
        return float(min(abs(x) for bit, x in enumerate(hashed) if bits >> bit & 1))
    if found["kind"] == "lifetime":
        # The first query that sees the key on one side only.
        query = position + min(found["jax"], found["torch"])
        scores = np.asarray(details["scores"])[row, : query + 1]
        others = np.sort(np.delete(scores, position))[::-1]
        return float(abs(scores[position] - others[exchange.model.keys_per_source - 1]))
    noise = exchange.arrays[f"{drawn}noise"][found["step"]][row]
    count = details["targets"].shape[1]
    real = exchange.arrays["sequences"][found["step"]][row, :-1] != exchange.model.pad_token_id
    sampled = list(np.argsort(-np.where(real, noise, -1), kind="stable")[:count])
    targets = np.asarray(details["targets"])[row]
    if found["torch"] not in sampled:
        return None
    return float(abs(targets[sampled.index(found["jax"])] - targets[sampled.index(found["torch"])]))
