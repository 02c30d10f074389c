"""A packed batch gives the loss and the gradients of its items in padded rows, in both routings."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from hax_jax.config import DataConfig, ModelConfig
from hax_jax.data import make_split
from hax_jax.models import build_model
from hax_jax.training.state import split_model
from hax_jax.training.step import sequence_accuracy, token_losses

# Items of 11 to 43 tokens; 7 of them, of all lengths, in 3 rows.
DATA = DataConfig(min_n_context=1, max_n_context=3, min_n_key=2, max_n_key=3, n_value=4, seed=5)
PACKED = dataclasses.replace(DATA, packing=60)
NUM_ITEMS = 7
SMALL = ModelConfig(
    vocab_size=30,
    hidden_size=16,
    state_size=8,
    num_heads=4,
    head_dim=8,
    chunk_size=16,
    num_hash=2,
    sparse_keys=8,
    data_max_length=24,
    attention_heads=2,
    attention_window=6,
    mlp_size=24,
    time_step_rank=2,
    precision="float64",
)
HAX = "sign_bin_lsh+key_selection"
OWN = {"query_key": "shared", "unit_norm": True, "projection": "orthogonal", "centring": "running"}
CASES = {
    "mamba2 HAX, causal": {"sparse_arch": HAX},
    "mamba2 HAX, causal, own hashing": {"sparse_arch": HAX, "num_layers": 1, "key_size": 6, **OWN},
    "mamba2 HAX, parity": {"sparse_arch": HAX, "routing": "parity"},
    "mamba all, causal": {
        "arch": "mamba",
        "sparse_arch": f"sliding_window+sink+dilated+argmax_lsh+{HAX}",
        "sparse_keys": 24,
        "num_layers": 1,
    },
    # With 5 bits and 3 keys many queries see nothing; of the shortest items 30 keys are more than there are.
    "mamba dilated and LSH, parity": {
        "arch": "mamba",
        "sparse_arch": "dilated+sign_bin_lsh",
        "sparse_keys": 6,
        "num_hash": 5,
        "num_layers": 1,
        "routing": "parity",
    },
    "mamba key selection, parity": {
        "arch": "mamba",
        "sparse_arch": "key_selection",
        "sparse_keys": 30,
        "routing": "parity",
        "num_layers": 1,
    },
    "samba": {"arch": "samba"},
}
# Both sides are float64 and differ in the order of sums alone.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@functools.cache
def batches():
    """The same items in padded rows and packed."""
    raw = next(make_split(DATA, "train").iterator(NUM_ITEMS, repeat=True))
    return [make_split(config, "train").materialize(raw) for config in (DATA, PACKED)]


@functools.cache
def model_of(case):
    """Structure, parameters of some size, buffers: initial weights are too small for routing to matter."""
    model = build_model(dataclasses.replace(SMALL, **CASES[case]), rngs=nnx.Rngs(0))
    structure, params, buffers = split_model(model)
    grown = {
        name: x + 0.2 * jax.random.normal(jax.random.key(i), x.shape, x.dtype)
        for i, (name, x) in enumerate(sorted(params.items()))
    }
    length = DATA.padded_length - 1
    draws = structure.merge(params, buffers).draw(
        jax.random.key(3), NUM_ITEMS, length, train=True, hash_loss=case.endswith("own hashing")
    )
    return objective(structure, buffers), grown, draws


def objective(structure, buffers):
    """params, batch, draws -> loss, (cross-entropy, gate loss, hash loss, accuracies)."""

    def loss(params, batch, draws):
        output = structure.merge(params, buffers)(
            batch.tokens,
            padding_mask=batch.padding_mask,
            packing=batch.packing,
            scored=batch.scored,
            draws=draws,
            train=True,
        )
        entropy = token_losses(output.logits, batch).sum() / batch.score_mask.sum()
        parts = entropy, output.gate_loss, output.hash_loss, sequence_accuracy(output.logits, batch)
        return entropy + output.gate_loss + output.hash_loss, parts

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("case", CASES)
def test_a_packed_batch_is_its_items_in_padded_rows(case):
    run, params, draws = model_of(case)
    padded, packed = batches()
    (_, wanted), wanted_grads = run(params, padded, draws)
    (_, got), grads = run(params, packed, draws)
    for name, a, b in zip(("loss", "gate loss", "hash loss", "accuracy"), got, wanted, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE, err_msg=name)
    assert_same_gradients(grads, wanted_grads)
    assert (got[2] > 0) == case.endswith("own hashing")
    assert sum(np.abs(x).max() > 0 for x in grads.values()) >= len(grads) - 1


@pytest.mark.parametrize("case", ["mamba2 HAX, causal", "samba"])
def test_work_left_out_where_nothing_is_scored_changes_nothing(case):
    run, params, draws = model_of(case)
    padded, _ = batches()
    (_, wanted), wanted_grads = run(params, dataclasses.replace(padded, scored=None), draws)
    (_, got), grads = run(params, padded, draws)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    assert_same_gradients(grads, wanted_grads)


def test_a_packed_batch_is_its_items_one_by_one():
    """The same with each item alone in a row of its own, joined by the loss's own weights."""
    run, params, draws = model_of("mamba2 HAX, causal")
    padded, packed = batches()
    (_, got), grads = run(params, packed, draws)
    # Cross-entropy is a mean over scored positions, the gate loss one over pairs of 4 sampled keys an item.
    shares = np.asarray(padded.scored.used.sum(1)) / padded.scored.used.sum()
    entropy = gate = 0.0
    totals = dict.fromkeys(grads, 0.0)
    for i, share in enumerate(shares):
        alone, own_draws = jax.tree.map(lambda x, i=i: x[i : i + 1], (padded, draws))
        (_, parts), own = run(params, alone, own_draws)
        entropy, gate = entropy + share * parts[0], gate + parts[1] / NUM_ITEMS
        for name in totals:
            # No parameter is reached by both losses: the scorer is trained by the gate loss alone.
            totals[name] += own[name] * (1 / NUM_ITEMS if "scorer" in name else share)
        np.testing.assert_allclose(got[2][i], parts[2][0], **CLOSE)
    np.testing.assert_allclose(got[:2], (entropy, gate), **CLOSE)
    assert_same_gradients(grads, totals)


def assert_same_gradients(got, wanted):
    assert got.keys() == wanted.keys()
    for name in got:
        limit = 1e-9 * np.abs(wanted[name]).max() + 1e-13
        np.testing.assert_allclose(got[name], wanted[name], rtol=0, atol=limit, err_msg=name)
