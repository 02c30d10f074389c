"""The sparse attention branch: queries, keys, which keys are visible, and the attention over them."""

import dataclasses
from collections.abc import Sequence as Several

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from hax_jax.config import ModelConfig
from hax_jax.layers.gate_losses import Scored, gate_losses
from hax_jax.layers.key_scorer import KeyScorer
from hax_jax.layers.linear import Linear
from hax_jax.layers.precision import Precision
from hax_jax.layers.routing import RULES, parity
from hax_jax.layers.sequence import Sequence
from hax_jax.ops import (
    Dilated,
    Full,
    HashBuckets,
    KeySet,
    Lifetimes,
    Sink,
    SlidingWindow,
    argmax_hash,
    bucket_orders,
    key_lifetimes_and_alive,
    segments,
    sign_hash,
    sparse_attention,
)
from hax_jax.ops.sparse_attention.key_set import Source

# The op, and the number of codes that so many projections make.
_HASHES = {
    "sign_bin_lsh": (sign_hash, lambda columns: 1 << columns),
    "argmax_lsh": (argmax_hash, lambda columns: columns),
}


class HashProjection(nnx.Variable):
    """A fixed random projection: saved with the model, never trained."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingDraws:
    """The random arrays of one call of one branch.

    Attributes:
      projection: (n, r) standard-normal hash projection; None for the branch's own fixed one.
      noise: (b, t) uniform numbers in [0, 1) that sample keys for the gate loss, in packed rows one for each
        position of the padded items (m, padded_length); None without that loss.
    """

    projection: Float[Array, "n r"] | None = None
    noise: Float[Array, "b t"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BranchOutput:
    """What a branch computed; all but `output` and `gate_loss` is there to be looked at.

    Attributes:
      output: (b, t, e), `attention` times the learned scale E.
      attention: (b, t, e).
      queries, keys: (b, t, n); the keys already divided by sqrt(n).
      values: (b, t, e), the branch's input.
      key_set: the visible keys; `key_set.sources` is in the order of `sparse_arch`.
      gate_loss: scalar, 0 without key selection or outside training.
      key_scores: (b, t), of packed rows as padded items (m, padded_length); None without key selection.
      scored: what the key scorer was given, for `with_gate_losses`; None without key selection.
      sampled_scores, sampled_targets: (b, k), of packed rows (m, k); None where there is no gate loss.
    """

    output: jax.Array
    attention: jax.Array
    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    key_set: KeySet
    gate_loss: jax.Array
    key_scores: jax.Array | None = None
    scored: Scored | None = None
    sampled_scores: jax.Array | None = None
    sampled_targets: jax.Array | None = None


class HaxBranch(nnx.Module):
    """Sparse attention over keys chosen by position, by hash code or by score.

    [k, q] = v W, k divided by sqrt(n); out = softmax(q k^T over visible keys) v E, one head over the whole
    width. It takes and returns vectors of one width, so it fits into any model as a layer.

    Args:
      width: e, the width of its inputs and outputs.
      config: only what concerns the branch is read: `state_size` (n), `sparse_arch`, `sparse_keys`,
        `num_hash`, `data_max_length`, `routing`, `precision`, `implementation`, `initializer_range`.
      rngs: `rngs.params()` gives the initial values' keys.

    Source: HAX (arXiv 2507.00449), section 4.
    """

    def __init__(self, width: int, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.precision = Precision.named(config.precision)
        n, scale = config.state_size, config.initializer_range
        self.key_query_proj = Linear(width, 2 * n, scale=scale, precision=self.precision, rngs=rngs)
        self.output_scale = nnx.Param(jnp.ones(width, self.precision.param))
        if "key_selection" in config.sources:
            self.scorer = KeyScorer(n, scale=scale, precision=self.precision, rngs=rngs)
        if self._hashes and not self._rule.FRESH_PROJECTION:
            projection = jax.random.normal(rngs.params(), (n, config.num_hash), jnp.float32)
            self.projection = HashProjection(projection)

    @property
    def _rule(self):
        return RULES[self.config.routing]

    @property
    def _hashes(self) -> bool:
        return any(source in _HASHES for source in self.config.sources)

    @property
    def needs_key(self) -> tuple[bool, bool]:
        """Whether a call draws random numbers: outside training, and in training."""
        fresh = self._hashes and self._rule.FRESH_PROJECTION
        return fresh, fresh or "key_selection" in self.config.sources

    @jax.named_scope("draw")
    def draw(self, key: jax.Array | None, batch: int, length: int, train: bool) -> RoutingDraws:
        """Draws the random arrays of one call from `key`, which may be None where `needs_key` says so.

        Raises:
          ValueError: no key where one is needed.
        """
        if not self.needs_key[train]:
            return RoutingDraws()
        if key is None:
            raise ValueError(
                f"`key` must be a PRNG key with train={train} and routing={self.config.routing!r}, got None; "
                "the branch draws random numbers there"
            )
        config = self.config
        projection_key, noise_key = jax.random.split(key)
        projection = noise = None
        if self._hashes and self._rule.FRESH_PROJECTION:
            projection = jax.random.normal(projection_key, (config.state_size, config.num_hash), jnp.float32)
        if train and "key_selection" in config.sources:
            noise = jax.random.uniform(noise_key, (batch, length), jnp.float32)
        return RoutingDraws(projection, noise)

    @jax.named_scope("hax")
    def __call__(
        self,
        v: Float[Array, "b t e"],
        sequence: Sequence | None = None,
        *,
        draws: RoutingDraws | None = None,
        train: bool = False,
    ) -> BranchOutput:
        """Attends within v (b, t, e).

        `draws` are the call's random arrays (see `draw`); None draws nothing, which is right outside training
        with causal routing. With `train` the gate loss is computed.
        """
        sequence = sequence or Sequence()
        draws = draws or RoutingDraws()
        n, inner = self.config.state_size, self.precision.inner
        keys, queries = (part.astype(inner) for part in self.key_query_proj.split(v, n, n))
        keys = keys * n**-0.5
        key_set, scored, key_scores = self._choose_keys(queries, keys, sequence, draws)

        head = lambda x: x.astype(self.precision.matmul)[:, :, None]  # noqa: E731
        packed = sequence.packing is not None
        attention = sparse_attention(
            head(queries),
            head(keys),
            head(v),
            key_set,
            segment_ids=sequence.segment_ids,
            scale=1.0,
            empty_rows="zero" if packed else self._rule.EMPTY_ROWS,
            dtype=inner,
            implementation=self.config.op_implementation,
        )[:, :, 0]
        if packed and self._rule.EMPTY_ROWS == "uniform":
            attention = self._uniform_where_empty(attention, queries, keys, v, key_set, sequence)
        output = (attention * self.output_scale[...]).astype(self.precision.inner)
        if scored is not None and sequence.packing is not None and not self._rule.PADS_COUNT:
            key_scores = sequence.packing.to_items(key_scores)
        result = BranchOutput(output, attention, queries, keys, v, key_set, jnp.zeros(()), key_scores, scored)
        return with_gate_losses([self], [result], [draws], sequence)[0] if train else result

    def _choose_keys(self, queries, keys, sequence, draws):
        """The key set, and where key selection is a source what its scorer was given and said."""
        # Which keys are visible is a matter of integers: no gradient passes.
        queries, keys = lax.stop_gradient((queries, keys))
        config, rule, ids = self.config, self._rule, sequence.segment_ids
        size, chosen = config.keys_per_source, config.op_implementation
        batch, length = queries.shape[:2]
        position = segments.positions(segments.as_array(ids, (batch, length)))
        packing = sequence.packing
        # Statistics that pads are part of are taken of the padded form, in which pads are zeros.
        to_rows = lambda x: x  # noqa: E731
        if packing is not None and rule.PADS_COUNT:
            to_rows = packing.to_rows
            queries, keys = packing.to_items(queries), packing.to_items(keys)
        scored = key_scores = None
        sources: list[Source] = []
        for name in config.sources:
            if name == "full":
                sources.append(Full())
            elif name == "sliding_window":
                sources.append(SlidingWindow(size))
            elif name == "sink":
                sources.append(Sink(size, position))
            elif name == "dilated":
                sources.append(Dilated(config.dilation, position))
            elif name in _HASHES:
                projection = draws.projection if draws.projection is not None else self._fixed_projection()
                hash_of, codes_of = _HASHES[name]
                num_codes = codes_of(projection.shape[1])
                query_code, key_code = (
                    to_rows(hash_of(rule.hash_features(x.astype(projection.dtype)), projection))
                    for x in (queries, keys)
                )
                counts_and_orders = bucket_orders(
                    query_code, key_code, segment_ids=ids, num_codes=num_codes, implementation=chosen
                )
                sources.append(
                    HashBuckets(
                        size, query_code, counts_and_orders[0], key_code, counts_and_orders[1], num_codes
                    )
                )
            else:
                summary = rule.query_summary(queries, sequence, self.precision.matmul, chosen)
                scored = Scored(keys, summary)
                # Gradients come through the few scores that the gate loss samples, and are made anew there.
                key_scores = self.scorer.held_constant(keys, summary, implementation=chosen)
                expiry, alive = key_lifetimes_and_alive(
                    to_rows(key_scores), size, segment_ids=ids, implementation=chosen
                )
                sources.append(Lifetimes(size, expiry, alive))
        return KeySet(tuple(sources)), scored, key_scores

    def _fixed_projection(self) -> jax.Array:
        if self._rule.FRESH_PROJECTION:
            raise ValueError(
                f"`draws.projection` must be an array with routing={self.config.routing!r}, got None; pass "
                "`draws=branch.draw(key, batch, length, train)`"
            )
        return self.projection[...]

    def _uniform_where_empty(self, attention, queries, keys, v, key_set, sequence):
        """Fault 3 of the original, of which the op knows only in rows of one item each."""
        seen = parity.sees_a_key(key_set)
        if seen is None:
            return attention
        items = (x.astype(self.precision.matmul) for x in (queries, keys, v))
        to_items = sequence.packing.to_items
        uniform = parity.uniform_attention(*map(to_items, items))
        return jnp.where(seen[..., None], attention, sequence.packing.to_rows(uniform))


def with_gate_losses(
    branches: Several[HaxBranch],
    results: Several[BranchOutput],
    draws: Several[RoutingDraws],
    sequence: Sequence,
) -> list[BranchOutput]:
    """The results of branches of one configuration, with the gate losses of those that have key selection.

    A model that calls its branches with train=False and all their results with this one function at the end
    gets what train=True gives it, for fewer kernels.

    Args:
      branches: in the model's order.
      results: what each returned.
      draws: what each was given.
      sequence: the rows they worked on.

    Raises:
      ValueError: no noise in `draws`.
    """
    scored = {place: result.scored for place, result in enumerate(results) if result.scored is not None}
    if not scored:
        return list(results)
    noise = [drawn for place in scored if (drawn := draws[place].noise) is not None]
    if len(noise) < len(scored):
        raise ValueError(
            "`draws.noise` must be an array in training with key selection, got None; pass "
            "`draws=branch.draw(key, batch, length, train=True)`"
        )
    config = branches[min(scored)].config
    losses = gate_losses(
        [branches[place].scorer for place in scored],
        [results[place].queries for place in scored],
        list(scored.values()),
        noise,
        num_samples=config.keys_per_source,
        rule=RULES[config.routing],
        sequence=sequence,
    )
    with_losses = list(results)
    for place, found in zip(scored, losses, strict=True):
        with_losses[place] = dataclasses.replace(
            results[place], gate_loss=found.loss, sampled_scores=found.scores, sampled_targets=found.targets
        )
    return with_losses
