"""The loss on hash codes: against plain loops, and that following it makes the right codes agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hax_jax.config import ModelConfig
from hax_jax.layers import HaxBranch, Sequence
from hax_jax.layers.hash_loss import (
    SAMPLES,
    Pairs,
    directions,
    hash_loss,
    sample_pairs,
    soft_bits,
    wanted,
)
from hax_jax.ops import sign_hash


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _all_pairs(batch: int, length: int, ids=None) -> Pairs:
    """The pairs of a sample that holds every position."""
    noise = -jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32), (batch, length))
    return sample_pairs(noise + length, Sequence(segment_ids=ids))


def test_soft_bits_have_the_signs_of_the_code():
    x, projection = _normal(0, 2, 50, 8), _normal(1, 8, 5)
    bits = soft_bits(directions(x), projection)
    np.testing.assert_array_equal(((bits > 0) << jnp.arange(5)).sum(-1), sign_hash(x, projection))
    np.testing.assert_allclose(soft_bits(directions(7 * x), projection), bits, atol=1e-5)
    np.testing.assert_array_equal(jax.grad(lambda x: directions(x).sum())(jnp.zeros((1, 1, 8))), 0)


@pytest.mark.parametrize("length", [20, SAMPLES + 30])
def test_pairs_are_of_real_positions_of_one_segment_the_key_before_the_query(length):
    real = jnp.arange(length)[None] < jnp.array([length - 3, length // 2])[:, None]
    ids = jnp.where(real, jnp.arange(length) // 9, -1)
    noise = jax.random.uniform(jax.random.key(0), (2, length))
    pairs = sample_pairs(noise, Sequence(real, ids))
    place = np.asarray(pairs.take(jnp.broadcast_to(jnp.arange(length)[:, None], (2, length, 1))))[..., 0]
    assert place.shape == (2, min(length, SAMPLES))
    real, ids = np.asarray(real), np.asarray(ids)
    for row in range(2):
        at, is_real = place[row], real[row, place[row]]
        assert len(set(at)) == len(at)
        together = ids[row, at][:, None] == ids[row, at]
        expected = (at[:, None] > at) & together & is_real[:, None] & is_real
        np.testing.assert_array_equal(pairs.earlier[row], expected)
        np.testing.assert_array_equal(pairs.num_earlier[row, is_real], at[is_real] % 9)


def test_wanted_and_loss_are_what_loops_make_of_them():
    length, n, budget = 12, 4, 3
    q, k = 3 * _normal(0, 1, length, n), 3 * _normal(1, 1, length, n)
    bits = [np.asarray(jnp.tanh(_normal(seed, 1, length, 3))) for seed in (2, 3)]
    pairs = _all_pairs(1, length)
    targets = np.zeros((length, length))
    # The first position has no earlier key, so it asks for nothing.
    scores = (np.asarray(q[0]) - np.asarray(q[0, 1:]).mean(0)) @ np.asarray(k[0]).T
    total = 0.0
    for i in range(1, length):
        weight = np.exp(scores[i, :i]) / np.exp(scores[i, :i]).sum()
        targets[i, :i] = np.minimum(1, budget * weight)
        for j in range(i):
            p = np.prod([(1 + 0.98 * bits[0][0, i, r] * bits[1][0, j, r]) / 2 for r in range(3)])
            total -= targets[i, j] * np.log(p) + (1 - targets[i, j]) * np.log(1 - p)
    np.testing.assert_allclose(wanted(q, k, pairs, budget)[0], targets, atol=1e-5)
    loss = hash_loss(q, k, *map(jnp.asarray, bits), pairs, budget)
    np.testing.assert_allclose(loss, total / targets.sum(), rtol=1e-5)


def test_a_sample_stands_for_all_keys():
    """Of flat attention every earlier key gets its share of the budget, however few are sampled."""
    length = 4 * SAMPLES
    noise = jax.random.uniform(jax.random.key(0), (1, length))
    pairs = sample_pairs(noise, Sequence())
    flat = jnp.zeros((1, SAMPLES, 4))
    target = np.asarray(wanted(flat, flat, pairs, 8))
    last = int(np.argmax(pairs.num_earlier))
    share = 8 / float(pairs.num_earlier[0, last])
    seen = target[0, last][np.asarray(pairs.earlier[0, last])]
    np.testing.assert_allclose(seen, share, rtol=1e-5)


def test_an_item_without_pairs_costs_nothing():
    x = _normal(0, 2, 1, 4)
    grads = jax.grad(lambda x: hash_loss(x, x, jnp.tanh(x), jnp.tanh(x), _all_pairs(2, 1), 4))(x)
    assert hash_loss(x, x, jnp.tanh(x), jnp.tanh(x), _all_pairs(2, 1), 4) == 0
    np.testing.assert_array_equal(grads, 0)


@functools.cache
def _trained() -> tuple[np.ndarray, ...]:
    """Whose codes agree, of 12 queries and 12 keys that match one by one, before and after training."""
    config = ModelConfig(
        sparse_arch="sign_bin_lsh",
        sparse_keys=2,
        num_hash=4,
        state_size=16,
        projection="learned",
        precision="float32",
    )
    branch = HaxBranch(16, config, rngs=nnx.Rngs(0))
    # Position i of the second half matches position i of the first. Features are stretched in the one and
    # shrunk in the other: attention's scores are as if they were not, codes differ.
    first = _normal(4, 1, 12, 8)
    v = jnp.concatenate([jnp.pad(first, ((0, 0), (0, 0), pad)) for pad in ((0, 8), (8, 0))], axis=1)
    kernel, stretch = _normal(5, 8, 16), jnp.exp(_normal(6, 16))
    both = jnp.zeros((16, 32)).at[:8, :16].set(kernel / stretch).at[8:, 16:].set(kernel * stretch)
    branch.key_query_proj.kernel[...] = both
    graphdef, params, rest = nnx.split(branch, nnx.Param, ...)
    draws = branch.draw(jax.random.key(0), 1, 24, True, hash_loss=True)
    optimizer = optax.adam(3e-2)

    def loss(params):
        out = nnx.merge(graphdef, params, rest)(v, draws=draws, train=True)
        (buckets,) = out.key_set.sources
        return out.hash_loss, buckets.query_code[0, 12:, None] == buckets.key_code[0, None, :12]

    @jax.jit
    def step(params, state):
        (_, alike), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, alike

    state, found = optimizer.init(params), []
    for _ in range(200):
        params, state, alike = step(params, state)
        found.append(np.asarray(alike))
    return found[0], found[-1]


def test_following_the_loss_makes_matching_codes_agree_and_others_differ():
    before, after = _trained()
    match = np.eye(12, dtype=bool)
    assert before[match].mean() < 0.5 and after[match].mean() > 0.7
    assert after[~match].mean() < 0.1


@pytest.mark.parametrize(("projection", "learns"), [("normal", "key_query_proj"), ("learned", "projection")])
def test_learned_directions_alone_learn_from_it_or_the_map_to_keys_and_queries(projection, learns):
    config = ModelConfig(
        sparse_arch="sign_bin_lsh+key_selection",
        sparse_keys=4,
        state_size=8,
        num_hash=3,
        projection=projection,
    )
    branch = HaxBranch(6, config, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(branch, nnx.Param, ...)
    v = _normal(0, 2, 10, 6)
    draws = branch.draw(jax.random.key(1), 2, 10, True, hash_loss=True)
    same = branch.draw(jax.random.key(1), 2, 10, True)
    # What else is drawn stays what it is without the loss.
    np.testing.assert_array_equal(draws.noise, same.noise)
    assert same.pairs is None and branch(v, draws=same, train=True).hash_loss is None

    def loss(params, v):
        return nnx.merge(graphdef, params, rest)(v, draws=draws, train=True).hash_loss

    of_params, of_input = jax.grad(loss, argnums=(0, 1))(params, v)
    largest = {
        jax.tree_util.keystr(path): float(jnp.abs(x).max())
        for path, x in jax.tree_util.tree_leaves_with_path(of_params)
    }
    assert {name for name, value in largest.items() if value > 0} == {
        name for name in largest if learns in name
    }
    np.testing.assert_array_equal(of_input, 0)
