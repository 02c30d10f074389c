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

    def of_branch(scorer, queries, scored, noise):
        queries, scored, noise = lax.stop_gradient((queries, scored, noise))
        return _gate_loss(scorer, queries, scored, noise, num_samples, rule, sequence)

    arrays = list(zip(queries, scored, noise, strict=True))
    if len(arrays) == 1:
        return [of_branch(scorers[0], *arrays[0])]
    graphdef = nnx.graphdef(scorers[0])
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    with jax.named_scope("gate_loss"):
        stacked = stack([nnx.state(scorer) for scorer in scorers]), *stack(arrays)
    found = jax.vmap(lambda state, *arrays: of_branch(nnx.merge(graphdef, state), *arrays))(*stacked)
    return [jax.tree.map(lambda x, i=index: x[i], found) for index in range(len(arrays))]


def _gate_loss(scorer, queries, scored, noise, num_samples, rule, sequence) -> GateLoss:
    packing = sequence.packing
    if packing is not None:
        queries = packing.to_items(queries)
        sequence = Sequence(packing.is_token)
    with jax.named_scope("gate_loss"):
        sampled = sample_keys(noise, num_samples, sequence.padding_mask)
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
        counts=rule.counts_for_gate_loss(sequence, queries.shape[:2]),
        segment_ids=sequence.segment_ids,
    )
    return GateLoss(loss, scores, targets)
