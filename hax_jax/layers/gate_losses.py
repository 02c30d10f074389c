"""The gate losses of several branches at once: a kernel for each of them becomes one for all."""

import dataclasses
from collections.abc import Sequence as Several
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from hax_jax.layers.key_scorer import KeyScorer, gate_loss, sample_keys
from hax_jax.layers.sequence import Sequence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
    """What a branch's key scorer was given; of packed rows as padded items where pads count.

    Attributes:
      keys: (b, t, n), already divided by sqrt(n).
      summary: (b, t, n), of the queries so far.
    """

    keys: jax.Array
    summary: jax.Array


class GateLoss(NamedTuple):
    """A branch's gate loss, and the scores (m, k) and targets (m, k) of the keys that it sampled."""

    loss: jax.Array
    scores: jax.Array
    targets: jax.Array


def gate_losses(
    scorers: Several[KeyScorer],
    queries: Several[jax.Array],
    scored: Several[Scored],
    noise: Several[jax.Array],
    *,
    num_samples: int,
    rule: ModuleType,
    sequence: Sequence,
) -> list[GateLoss]:
    """The gate loss of each branch, with a gradient for its scorer alone.

    Args:
      scorers: one a branch, all of one form.
      queries: (b, t, n) each.
      scored: what each scorer was given.
      noise: (m, t) each, the larger the sooner a key is sampled; of padded items where rows are packed.
      num_samples: keys sampled of an item.
      rule: the routing, one of `routing.RULES`.
      sequence: the rows.
    """

    queries, scored, noise = lax.stop_gradient((list(queries), list(scored), list(noise)))
    items = sequence if sequence.packing is None else Sequence(sequence.packing.is_token)
    arrays = list(zip(queries, scored, _sample(noise, num_samples, items), strict=True))

    def of_branch(scorer, queries, scored, sampled):
        return _gate_loss(scorer, queries, scored, sampled, rule, sequence, items)

    if len(arrays) == 1:
        return [of_branch(scorers[0], *arrays[0])]
    graphdef = nnx.graphdef(scorers[0])
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    with jax.named_scope("gate_loss"):
        stacked = stack([nnx.state(scorer) for scorer in scorers]), *stack(arrays)
    found = jax.vmap(lambda state, *arrays: of_branch(nnx.merge(graphdef, state), *arrays))(*stacked)
    return [jax.tree.map(lambda x, i=index: x[i], found) for index in range(len(arrays))]


@jax.named_scope("gate_loss")
def _sample(noise: list[jax.Array], num_samples: int, items: Sequence) -> list[jax.Array]:
    """The sampled positions (m, k) of each branch, by one sort.

    With the items outermost: of an axis of branches before them the compiler would gather all items on every
    device to sort them there.
    """
    count, mask = len(noise), items.padding_mask
    rows = jnp.stack(noise, axis=1).reshape(-1, noise[0].shape[1])
    sampled = sample_keys(rows, num_samples, None if mask is None else jnp.repeat(mask, count, axis=0))
    return list(jnp.moveaxis(sampled.reshape(-1, count, sampled.shape[1]), 1, 0))


def _gate_loss(scorer, queries, scored, sampled, rule, sequence, items) -> GateLoss:
    packing = sequence.packing
    if packing is not None:
        queries = packing.to_items(queries)
    with jax.named_scope("gate_loss"):
        keys, summary = (
            packing.at(x, sampled)
            if packing is not None and not rule.PADS_COUNT
            else jnp.take_along_axis(x, sampled[..., None], axis=1)
            for x in (scored.keys, scored.summary)
        )
    scores = scorer(keys, summary)
    loss, targets = gate_loss(
        scores,
        sampled,
        queries,
        keys,
        counts=rule.counts_for_gate_loss(items, queries.shape[:2]),
        segment_ids=items.segment_ids,
    )
    return GateLoss(loss, scores, targets)
