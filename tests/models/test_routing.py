"""What causal routing promises, as properties of whole models, and what parity routing breaks on purpose."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hax_jax.config import ModelConfig
from hax_jax.models import build_model

SMALL = ModelConfig(
    vocab_size=30,
    hidden_size=16,
    state_size=8,
    num_heads=4,
    head_dim=8,
    chunk_size=16,
    num_hash=3,
    sparse_keys=8,
    data_max_length=32,
    attention_heads=2,
    attention_window=6,
    mlp_size=24,
    precision="float32",
)
ALL_SOURCES = "sliding_window+sink+dilated+sign_bin_lsh+argmax_lsh+key_selection"
MODELS = {
    "mamba": {"arch": "mamba", "sparse_arch": "sign_bin_lsh+key_selection"},
    "mamba2": {"arch": "mamba2", "sparse_arch": "sign_bin_lsh+key_selection"},
    "mamba2 all": {"arch": "mamba2", "sparse_arch": ALL_SOURCES, "sparse_keys": 24},
    "mamba2 own hashing": {
        "sparse_arch": "sign_bin_lsh+key_selection",
        "query_key": "shared",
        "unit_norm": True,
        "projection": "orthogonal",
        "centring": "running",
    },
    "samba": {"arch": "samba", "num_layers": 2},
}
models = pytest.mark.parametrize("name", MODELS)
LENGTH = 40
# Other shapes are other compiled programs, with sums in another order.
CLOSE = 3e-5


@functools.cache
def forward(name: str, routing: str = "causal"):
    """tokens, padding mask, segment ids, key -> logits, for one small model with weights of some size."""
    config = dataclasses.replace(SMALL, routing=routing, **MODELS[name])
    model = build_model(config, rngs=nnx.Rngs(0))
    # At their initial size most weights are too small for routing to matter.
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)

    @jax.jit
    def run(tokens, padding_mask=None, segment_ids=None, key=None):
        return nnx.merge(graphdef, params, rest)(
            tokens, padding_mask=padding_mask, segment_ids=segment_ids, key=key
        ).logits

    return run


def tokens(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(4, 30, shape), jnp.int32)


@models
def test_outputs_do_not_depend_on_what_follows(name):
    run, first = forward(name), tokens(0, 2, LENGTH)
    for cut in (1, 17, LENGTH - 1):
        second = first.at[:, cut:].set(tokens(1, 2, LENGTH)[:, cut:])
        a, b = run(first), run(second)
        np.testing.assert_allclose(a[:, :cut], b[:, :cut], atol=CLOSE)
        assert np.abs(a[:, cut:] - b[:, cut:]).max() > 1e-2


@models
def test_the_padded_length_has_no_effect(name):
    run, short = forward(name), tokens(2, 2, 25)
    alone = run(short)
    for pads in (1, 15):
        row = jnp.pad(short, ((0, 0), (0, pads)), constant_values=3)
        np.testing.assert_allclose(run(row, row != 3)[:, :25], alone, atol=CLOSE)
        # What stands at a pad does not matter either.
        other = row.at[:, 25:].set(7)
        np.testing.assert_allclose(run(other, row != 3)[:, :25], alone, atol=CLOSE)


@models
def test_pads_before_the_tokens_have_no_effect(name):
    run, short = forward(name), tokens(3, 2, 25)
    row = jnp.pad(short, ((0, 0), (15, 0)), constant_values=3)
    np.testing.assert_allclose(run(row, row != 3)[:, 15:], run(short), atol=CLOSE)


@models
def test_packed_items_are_as_if_alone(name):
    run, items = forward(name), [tokens(seed, 2, length) for seed, length in ((4, 25), (5, 1), (6, 14))]
    row = jnp.concatenate(items, axis=1)
    ids = jnp.concatenate([jnp.full(item.shape, i, jnp.int32) for i, item in enumerate(items)], axis=1)
    packed = run(row, None, ids)
    begin = 0
    for item in items:
        np.testing.assert_allclose(packed[:, begin : begin + item.shape[1]], run(item), atol=CLOSE)
        begin += item.shape[1]


@models
def test_evaluation_draws_nothing(name):
    """The hash projection is fixed, so no key is needed, and one given changes nothing."""
    run, rows = forward(name), tokens(7, 2, LENGTH)
    np.testing.assert_array_equal(run(rows), run(rows, None, None, jax.random.key(1)))


def test_parity_sees_the_future_and_the_padded_length():
    """Faults 1 and 2 of the original, reproduced on purpose."""
    run, rows = forward("mamba2", "parity"), tokens(8, 2, LENGTH)
    key = jax.random.key(0)
    changed = rows.at[:, 30:].set(tokens(9, 2, LENGTH)[:, 30:])
    assert np.abs(run(rows, None, None, key) - run(changed, None, None, key))[:, :30].max() > 1e-2
    padded = jnp.pad(rows, ((0, 0), (0, 20)), constant_values=3)
    assert np.abs(run(padded, padded != 3, None, key)[:, :LENGTH] - run(rows, None, None, key)).max() > 1e-2
    assert np.abs(run(rows, None, None, key) - run(rows, None, None, jax.random.key(1))).max() > 1e-2


def test_what_cannot_be_computed_says_why():
    model = build_model(dataclasses.replace(SMALL, routing="parity", **MODELS["mamba2"]), rngs=nnx.Rngs(0))
    rows = tokens(10, 1, 8)
    with pytest.raises(
        ValueError, match="`key` must be a PRNG key with train=False and routing='parity', got None"
    ):
        model(rows)
    with pytest.raises(ValueError, match="`segment_ids` must be None with routing='parity'"):
        model(rows, segment_ids=rows, key=jax.random.key(0))
    causal = build_model(dataclasses.replace(SMALL, **MODELS["mamba2"]), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="`key` must be a PRNG key with train=True and routing='causal', got None"
    ):
        causal(rows, train=True)
