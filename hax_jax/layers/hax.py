"""The sparse attention branch: queries, keys, which keys are visible, and the attention over them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from hax_jax.config import ModelConfig
from hax_jax.layers import initializers
from hax_jax.layers.hash_loss import directions, hash_loss, sample_pairs, soft_bits
from hax_jax.layers.key_scorer import KeyScorer, gate_loss, sample_keys
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


# Beside the square of a query's or key's length, so that none divides by zero.
_TINY = 1e-6


class HashProjection(nnx.Variable):
    """A fixed random projection: saved with the model, never trained."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingDraws:
    """What differs from one call of one branch to the next: its random arrays, and how it hashes.

    Attributes:
      projection: (n, r) standard-normal hash projection; None for the branch's own fixed one.
      noise: (b, t) uniform numbers in [0, 1) that sample keys for the gate loss, in packed rows one for each
        position of the padded items (m, padded_length); None without that loss.
      pairs: (b, t) or (m, padded_length) likewise, uniform numbers that sample positions for the hash loss;
        None without that loss.
      hash_bits: () integer, how many of a sign code's bits count; all of them if None or larger.
    """

    projection: Float[Array, "n r"] | None = None
    noise: Float[Array, "b t"] | None = None
    pairs: Float[Array, "b t"] | None = None
    hash_bits: Int[Array, ""] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BranchOutput:
    """What a branch computed; all but `output` and the losses is there to be looked at.

    Attributes:
      output: (b, t, e), `attention` times the learned scale E.
      attention: (b, t, e).
      queries, keys: (b, t, n); the keys already divided by sqrt(n).
      values: (b, t, e), the branch's input.
      key_set: the visible keys; `key_set.sources` is in the order of `sparse_arch`.
      gate_loss: scalar, 0 without key selection or outside training.
      key_scores: (b, t), of packed rows as padded items (m, padded_length); None without key selection.
      sampled_scores, sampled_targets: (b, k), of packed rows (m, k); None where there is no gate loss.
      hash_loss: scalar; None where it was not asked for.
    """

    output: jax.Array
    attention: jax.Array
    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    key_set: KeySet
    gate_loss: jax.Array
    key_scores: jax.Array | None = None
    sampled_scores: jax.Array | None = None
    sampled_targets: jax.Array | None = None
    hash_loss: jax.Array | None = None


class _Scored(NamedTuple):
    """What the key scorer was given, and its scores; of packed rows as padded items where pads count."""

    keys: jax.Array
    summary: jax.Array
    scores: jax.Array


class HaxBranch(nnx.Module):
    """Sparse attention over keys chosen by position, by hash code or by score.

    [k, q] = v W, k divided by sqrt(n); out = softmax(q k^T over visible keys) v E, one head over the whole
    width. It takes and returns vectors of one width, so it fits into any model as a layer.

    Args:
      width: e, the width of its inputs and outputs.
      config: only what concerns the branch is read: `key_size` or else `state_size` (n), `sparse_arch`,
        `sparse_keys`, `num_hash`, `data_max_length`, `query_key`, `unit_norm`, `projection`, `centring`,
        `hash_loss_keys`, `routing`, `precision`, `implementation`, `initializer_range`.
      rngs: `rngs.params()` gives the initial values' keys.

    Source: HAX (arXiv 2507.00449), section 4.
    """

    def __init__(self, width: int, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.precision = Precision.named(config.precision)
        n, scale = config.key_width, config.initializer_range
        columns = n if config.query_key == "shared" else 2 * n
        self.key_query_proj = Linear(width, columns, scale=scale, precision=self.precision, rngs=rngs)
        if config.query_key == "tied_init":
            kernel = self.key_query_proj.kernel
            kernel[...] = jnp.tile(kernel[:, :n], 2)
        self.output_scale = nnx.Param(jnp.ones(width, self.precision.param))
        if "key_selection" in config.sources:
            self.scorer = KeyScorer(n, scale=scale, precision=self.precision, rngs=rngs)
        if config.hashes and not self._rule.FRESH_PROJECTION:
            draw = initializers.orthogonal if config.projection == "orthogonal" else jax.random.normal
            fixed = draw(rngs.params(), (n, config.num_hash), jnp.dtype(jnp.float32))
            if config.projection == "learned":
                # Of keys and of queries, equal at first; the last row is what each product has to exceed.
                both = jnp.stack([jnp.pad(fixed, ((0, 1), (0, 0)))] * 2)
                self.projection: nnx.Variable = nnx.Param(both.astype(self.precision.param))
            else:
                self.projection = HashProjection(fixed)

    @property
    def _rule(self):
        return RULES[self.config.routing]

    @property
    def needs_key(self) -> tuple[bool, bool]:
        """Whether a call draws random numbers: outside training, and in training."""
        fresh = self.config.hashes and self._rule.FRESH_PROJECTION
        return fresh, fresh or "key_selection" in self.config.sources

    @jax.named_scope("draw")
    def draw(
        self, key: jax.Array | None, batch: int, length: int, train: bool, hash_loss: bool = False
    ) -> RoutingDraws:
        """Draws the random arrays of one call from `key`, which may be None where `needs_key` says so.

        With `hash_loss`, for which a key is needed too, the call will compute that loss.

        Raises:
          ValueError: no key where one is needed.
        """
        if not self.needs_key[train] and not hash_loss:
            return RoutingDraws()
        if key is None:
            raise ValueError(
                f"`key` must be a PRNG key with train={train} and routing={self.config.routing!r}, got None; "
                "the branch draws random numbers there"
            )
        config = self.config
        projection_key, noise_key = jax.random.split(key)
        projection = noise = pairs = None
        if config.hashes and self._rule.FRESH_PROJECTION:
            projection = jax.random.normal(projection_key, (config.key_width, config.num_hash), jnp.float32)
        if train and "key_selection" in config.sources:
            noise = jax.random.uniform(noise_key, (batch, length), jnp.float32)
        if hash_loss:
            # Apart from the two keys above, which stay what they are without this loss.
            pairs = jax.random.uniform(jax.random.fold_in(key, 2), (batch, length), jnp.float32)
        return RoutingDraws(projection, noise, pairs)

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
        with causal routing. With `train` the gate loss is computed, with `draws.pairs` the hash loss.
        """
        sequence = sequence or Sequence()
        draws = draws or RoutingDraws()
        keys, queries = self._keys_and_queries(v)
        key_set, scored = self._choose_keys(queries, keys, sequence, draws)

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
            implementation=self.config.op_implementation,
        )[:, :, 0]
        if packed and self._rule.EMPTY_ROWS == "uniform":
            attention = self._uniform_where_empty(attention, queries, keys, v, key_set, sequence)
        output = (attention * self.output_scale[...]).astype(self.precision.inner)
        result = BranchOutput(output, attention, queries, keys, v, key_set, jnp.zeros(()))
        if draws.pairs is not None:
            loss = self._hash_loss(result, sequence, draws.pairs)
            result = dataclasses.replace(result, hash_loss=loss)
        if scored is None:
            return result
        key_scores = scored.scores
        if sequence.packing is not None and not self._rule.PADS_COUNT:
            key_scores = sequence.packing.to_items(key_scores)
        result = dataclasses.replace(result, key_scores=key_scores)
        return self._with_gate_loss(result, scored, sequence, draws) if train else result

    def _keys_and_queries(self, v: Float[Array, "b t e"]) -> tuple[Float[Array, "b t n"], ...]:
        """Keys, already divided by sqrt(n), and queries."""
        n, inner = self.config.key_width, self.precision.inner
        parts = self.key_query_proj.split(v, *[n] * (self.key_query_proj.kernel.shape[1] // n))
        if self.config.unit_norm:
            parts = tuple(x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _TINY) for x in parts)
        # One matrix gives one array, which is both.
        keys, queries = parts[0].astype(inner), parts[-1].astype(inner)
        return keys * n**-0.5, queries

    def _to_project(self, index, x, draws):
        """What is projected of keys (index 0) or queries (1), centred already, and the directions."""
        if self.config.projection == "learned":
            x = directions(x)
            return jnp.pad(x, ((0, 0), (0, 0), (0, 1)), constant_values=1), self.projection[index]
        projection = draws.projection if draws.projection is not None else self._fixed_projection()
        return self._rule.hash_features(x.astype(projection.dtype)), projection

    def _codes(self, name, index, x, sequence, draws):
        """The hash codes of keys (index 0) or queries (1), and the number of codes that there are."""
        hash_of, codes_of = _HASHES[name]
        if self.config.centring == "running":
            x = x - segments.running_mean(x, sequence.segment_ids)
        x, projection = self._to_project(index, x, draws)
        code = hash_of(x, projection)
        if draws.hash_bits is not None and name == "sign_bin_lsh":
            # Keys are integers: fewer bits are larger buckets, at the same shapes.
            code = code & ~(-1 << jnp.clip(draws.hash_bits, 0, self.config.num_hash))
        return code, codes_of(projection.shape[1])

    def _choose_keys(self, queries, keys, sequence, draws):
        """The key set, and what the scorer did where key selection is one of its sources."""
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
        scored = None
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
                (key_code, num_codes), (query_code, _) = (
                    self._codes(name, index, x, sequence, draws) for index, x in enumerate((keys, queries))
                )
                query_code, key_code = to_rows(query_code), to_rows(key_code)
                counts_and_orders = bucket_orders(
                    query_code, key_code, segment_ids=ids, num_codes=num_codes, implementation=chosen
                )
                sources.append(
                    HashBuckets(
                        size, query_code, counts_and_orders[0], key_code, counts_and_orders[1], num_codes
                    )
                )
            else:
                summary = rule.query_summary(queries, sequence)
                # Gradients come through the few scores that the gate loss samples, and are made anew there.
                scored = _Scored(keys, summary, lax.stop_gradient(self.scorer(keys, summary)))
                expiry, alive = key_lifetimes_and_alive(
                    to_rows(scored.scores), size, segment_ids=ids, implementation=chosen
                )
                sources.append(Lifetimes(size, expiry, alive))
        return KeySet(tuple(sources)), scored

    def _fixed_projection(self) -> jax.Array:
        if self._rule.FRESH_PROJECTION:
            raise ValueError(
                f"`draws.projection` must be an array with routing={self.config.routing!r}, got None; pass "
                "`draws=branch.draw(key, batch, length, train)`"
            )
        return self.projection[...]

    def _with_gate_loss(
        self, result: BranchOutput, scored: _Scored, sequence: Sequence, draws: RoutingDraws
    ) -> BranchOutput:
        if draws.noise is None:
            raise ValueError(
                "`draws.noise` must be an array in training with key selection, got None; pass "
                "`draws=branch.draw(key, batch, length, train=True)`"
            )
        packing, queries = sequence.packing, lax.stop_gradient(result.queries)
        if packing is not None:
            queries = packing.to_items(queries)
            sequence = Sequence(packing.is_token)
        with jax.named_scope("gate_loss"):
            sampled = sample_keys(draws.noise, self.config.keys_per_source, sequence.padding_mask)
            keys, summary = (
                packing.at(x, sampled)
                if packing is not None and not self._rule.PADS_COUNT
                else jnp.take_along_axis(x, sampled[..., None], axis=1)
                for x in (scored.keys, scored.summary)
            )
        scores = self.scorer(keys, summary)
        loss, targets = gate_loss(
            scores,
            sampled,
            queries,
            keys,
            counts=self._rule.counts_for_gate_loss(sequence, queries.shape[:2]),
            segment_ids=sequence.segment_ids,
        )
        return dataclasses.replace(result, gate_loss=loss, sampled_scores=scores, sampled_targets=targets)

    def _hash_loss(self, result: BranchOutput, sequence: Sequence, noise: jax.Array) -> jax.Array:
        """The hash loss of a sample of pairs.

        Its gradient reaches learned directions alone, and where they are fixed the map to keys and queries.
        """
        pairs, learned = sample_pairs(noise, sequence), self.config.projection == "learned"
        # Made anew of inputs held constant: the layers before learn from the task what to put there.
        vectors = self._keys_and_queries(pairs.take(lax.stop_gradient(result.values)))
        bits = []
        for index, x in enumerate(lax.stop_gradient(vectors) if learned else vectors):
            if self.config.centring == "running":
                everywhere = lax.stop_gradient((result.keys, result.queries)[index])
                x = x - pairs.take(segments.running_mean(everywhere, sequence.segment_ids))
            x, projection = self._to_project(index, x, RoutingDraws())
            bits.append(soft_bits(x if learned else directions(x), projection))
        key_bits, query_bits = bits
        keys, queries = vectors
        budget = min(self.config.hash_loss_keys, self.config.keys_per_source)
        return hash_loss(queries, keys, query_bits, key_bits, pairs, budget)

    def _uniform_where_empty(self, attention, queries, keys, v, key_set, sequence):
        """Fault 3 of the original, of which the op knows only in rows of one item each."""
        seen = parity.sees_a_key(key_set)
        if seen is None:
            return attention
        items = (x.astype(self.precision.matmul) for x in (queries, keys, v))
        to_items = sequence.packing.to_items
        uniform = parity.uniform_attention(*map(to_items, items))
        return jnp.where(seen[..., None], attention, sequence.packing.to_rows(uniform))
