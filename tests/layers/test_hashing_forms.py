"""Forms of the branch's hashing that the original does not have: what each of them does."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hax_jax.config import ConfigError, ModelConfig
from hax_jax.layers import HaxBranch, Sequence
from hax_jax.layers.hax import RoutingDraws
from hax_jax.layers.initializers import orthogonal
from hax_jax.ops import KeySet, segments, sign_hash

WIDTH, N, LENGTH = 12, 8, 30
BASE = ModelConfig(sparse_arch="sign_bin_lsh", sparse_keys=4, state_size=N, num_hash=5, precision="float32")
OTHERS = {
    "key_size": 3,
    "query_key": "shared",
    "unit_norm": True,
    "projection": "orthogonal",
    "centring": "running",
}


def _branch(**changes) -> HaxBranch:
    return HaxBranch(WIDTH, dataclasses.replace(BASE, **changes), rngs=nnx.Rngs(0))


def _input(seed: int = 0) -> jax.Array:
    # Off the origin, as the outputs of SiLU are.
    return 0.5 + jax.random.normal(jax.random.key(seed), (2, LENGTH, WIDTH))


def test_tied_matrices_start_equal_and_shared_ones_are_one():
    separate, tied, shared = (_branch(query_key=form) for form in ("separate", "tied_init", "shared"))
    assert separate.key_query_proj.kernel.shape == tied.key_query_proj.kernel.shape == (WIDTH, 2 * N)
    assert shared.key_query_proj.kernel.shape == (WIDTH, N)
    # Keys start as they do without it.
    np.testing.assert_array_equal(tied.key_query_proj.kernel[:, :N], separate.key_query_proj.kernel[:, :N])
    for branch in (tied, shared):
        out = branch(_input())
        np.testing.assert_allclose(out.queries, out.keys * N**0.5, rtol=1e-6)
        (buckets,) = out.key_set.sources
        np.testing.assert_array_equal(buckets.query_code, buckets.key_code)
    out = separate(_input())
    assert np.abs(out.queries - out.keys * N**0.5).max() > 0.1


def test_unit_norm_makes_scores_cosines():
    plain, unit = _branch()(_input()), _branch(unit_norm=True)(_input())
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (plain.queries, plain.keys))
    scores = np.einsum("bin,bjn->bij", unit.queries, unit.keys)
    np.testing.assert_allclose(scores, N**0.5 * np.einsum("bin,bjn->bij", q, k), atol=1e-4)
    # Signs, and with them codes, do not change.
    for a, b in zip(jax.tree.leaves(plain.key_set), jax.tree.leaves(unit.key_set), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("n", "r"), [(8, 5), (8, 8), (3, 8)])
def test_orthogonal_directions(n, r):
    columns = orthogonal(jax.random.key(0), (n, r), jnp.dtype(jnp.float32))
    assert columns.shape == (n, r)
    for begin in range(0, r, n):
        block = columns[:, begin : begin + n]
        np.testing.assert_allclose(block.T @ block, n * np.eye(block.shape[1]), atol=1e-4)
    assert _branch(projection="orthogonal", num_hash=r).projection.shape == (N, r)


def test_learned_directions_start_as_fixed_ones():
    fixed, learned = _branch(), _branch(projection="learned")
    assert learned.projection.shape == (2, N + 1, 5)
    for a, b in zip(*(jax.tree.leaves(x(_input()).key_set) for x in (fixed, learned)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_centring_takes_off_the_mean_so_far_of_the_segment():
    branch = _branch(centring="running")
    ids = jnp.broadcast_to(jnp.arange(LENGTH) // 11, (2, LENGTH))
    out = branch(_input(), Sequence(segment_ids=ids))
    (buckets,) = out.key_set.sources
    x = np.asarray(out.queries, np.float64)
    for begin in range(0, LENGTH, 11):
        part = x[:, begin : begin + 11]
        mean = np.cumsum(part, 1) / np.arange(1, part.shape[1] + 1)[:, None]
        np.testing.assert_allclose(
            segments.running_mean(out.queries, ids)[:, begin : begin + 11], mean, atol=1e-5
        )
        code = sign_hash(jnp.asarray(part - mean, jnp.float32), branch.projection[...])
        # A segment's first vector is its mean: which side of zero rounding leaves it on means nothing.
        np.testing.assert_array_equal(buckets.query_code[:, begin + 1 : begin + 11], code[:, 1:])


def test_fewer_bits_are_larger_buckets():
    branch = _branch(sparse_keys=LENGTH)

    def visible(bits):
        out = branch(_input(), draws=RoutingDraws(hash_bits=None if bits is None else jnp.int32(bits)))
        return np.asarray(KeySet(out.key_set.sources).tile(jnp.arange(LENGTH), jnp.arange(LENGTH)))

    masks = [visible(bits) for bits in range(7)]
    np.testing.assert_array_equal(masks[0], np.tril(np.ones((2, LENGTH, LENGTH), bool)))
    for more, fewer in itertools.pairwise(masks):
        assert not (fewer & ~more).any()
    assert masks[5].sum() < masks[1].sum() < masks[0].sum()
    for all_of_them in (masks[6], visible(None)):
        np.testing.assert_array_equal(all_of_them, masks[5])


def test_keys_have_a_width_of_their_own():
    branch = _branch(key_size=3, sparse_arch="sign_bin_lsh+key_selection")
    assert branch.key_query_proj.kernel.shape == (WIDTH, 6) and branch.projection.shape == (3, 5)
    assert branch.scorer.layers[0].kernel.shape == (6, 6)
    assert branch(_input()).queries.shape == (2, LENGTH, 3)


@pytest.mark.parametrize("field", OTHERS)
def test_the_original_knows_none_of_them(field):
    with pytest.raises(ConfigError, match=rf"model\.{field}.*routing='parity'"):
        dataclasses.replace(BASE, routing="parity", **{field: OTHERS[field]})
