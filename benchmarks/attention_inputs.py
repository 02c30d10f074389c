"""Inputs of the attention benchmark: random ones, and those that are made to hurt."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.specs import AttentionShape

RANDOM = "random"
# What each does to the kernels: all keys of a row compete for the same hash bucket; one key has every query
# as its reader through hashing; each new key is selected and soon gone; the first keys are selected for
# good; the same through ties alone.
HURTING = ("one_bucket", "one_key", "rising", "falling", "equal")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """One set of arguments.

    Attributes:
      q, k: (b, t, n) bfloat16.
      v: (b, t, e) bfloat16.
      d_out: (b, t, e) bfloat16, the gradient of the output.
      scores: (b, t) float32, what key selection ranks by.
      projection: (n, r) float32, the hash projection.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    scores: jax.Array
    projection: jax.Array


def make(kind: str, shape: AttentionShape, seed: int) -> Inputs:
    """Draws a set of inputs of the kind 'random' or one of `HURTING`, on the device."""
    projection = np.random.default_rng(0).standard_normal((shape.key_width, shape.num_hash))
    # What is drawn is cleared of all that the projection sees, then moved to where every sign is positive:
    # codes are as wanted, and scores stay as random as they were.
    basis = np.linalg.qr(projection)[0]
    positive = projection @ np.linalg.solve(projection.T @ projection, np.ones(shape.num_hash))
    nothing = np.zeros_like(positive)
    moves = {"one_bucket": (positive, positive, positive), "one_key": (positive, positive, -positive)}
    if kind not in moves:
        basis = np.zeros_like(basis)
    # Scores: a share of noise, a slope over the position, and what the first key has beyond them. In
    # 'one_key' that keeps key selection from showing it.
    of_scores = {
        "one_key": (1, 0, -1e3),
        "rising": (0, 1, 0),
        "falling": (0, -1, 0),
        "equal": (0, 0, 0),
    }
    arrays = (
        projection,
        basis,
        np.stack(moves.get(kind, (nothing,) * 3)),
        of_scores.get(kind, (1, 0, 0)),
    )
    return _make(jax.random.key(seed), *(jnp.asarray(x, jnp.float32) for x in arrays), shape)


@functools.partial(jax.jit, static_argnums=5)
def _make(
    key: jax.Array,
    projection: jax.Array,
    basis: jax.Array,
    moves: jax.Array,
    of_scores: jax.Array,
    shape: AttentionShape,
) -> Inputs:
    keys = jax.random.split(key, 5)
    size = (shape.batch, shape.length)
    q, k = (jax.random.normal(x, (*size, shape.key_width)) for x in keys[:2])
    v, d_out = (jax.random.normal(x, (*size, shape.value_width), jnp.bfloat16) for x in keys[2:4])
    is_first = jnp.arange(shape.length) == 0
    exact = jax.lax.Precision.HIGHEST
    q, k = (x - jnp.matmul(jnp.matmul(x, basis, precision=exact), basis.T, precision=exact) for x in (q, k))
    q, k = q + moves[0], k + jnp.where(is_first[:, None], moves[1], moves[2])
    noise, slope, first = of_scores
    position = jnp.arange(shape.length, dtype=jnp.float32)
    scores = noise * jax.random.normal(keys[4], size) + slope * position + jnp.where(is_first, first, 0)
    return Inputs(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), v, d_out, scores, projection)


def visible_pairs(count: jax.Array, expiry: jax.Array, size: int) -> dict[str, int]:
    """(query, key) pairs that hashing shows, and that key selection shows; some may be in both."""
    lifetime = np.asarray(expiry, np.int64) - np.arange(expiry.shape[1])
    return {
        "hashing": int(np.minimum(np.asarray(count, np.int64), size).sum()),
        "selection": int(np.maximum(lifetime, 0).sum()),
    }
