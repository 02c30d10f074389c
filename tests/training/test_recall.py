"""Source recall against whole masks and a plain look through the tokens, padded and packed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hax_jax.config import DataConfig, ModelConfig
from hax_jax.data import make_split
from hax_jax.data.joint_recall import SEPARATOR
from hax_jax.models import build_model
from hax_jax.ops import KeySet
from hax_jax.training import recall, train
from hax_jax.training.metrics import read_metrics
from tests.training.tiny import TinyModel, tiny_experiment

DATA = DataConfig(min_n_context=1, max_n_context=3, min_n_key=2, max_n_key=3, n_value=4, seed=5)
NUM_ITEMS, NUM_WITHOUT_WEIGHT = 6, 1
SOURCES = ("sign_bin_lsh", "key_selection")
MODEL = ModelConfig(
    vocab_size=30,
    hidden_size=16,
    state_size=8,
    num_heads=4,
    head_dim=8,
    chunk_size=16,
    num_hash=2,
    sparse_keys=12,
    sparse_arch="+".join(SOURCES),
    precision="float32",
)


def make_batch(**settings):
    split = make_split(dataclasses.replace(DATA, **settings), "test")
    raw = dict(next(split.iterator(NUM_ITEMS, repeat=False)))
    raw["weight"] = np.arange(NUM_ITEMS) < NUM_ITEMS - NUM_WITHOUT_WEIGHT
    return split.materialize(raw)


def answers(tokens, n_context, n_key):
    """(position of the question, of its answer), by reading the item from left to right."""
    separator = tokens.index(SEPARATOR)
    length = 2 * n_context * (2 * n_key + 1) + 2
    told, asked, context = {}, [], None
    first_context = 10 + DATA.n_value + DATA.max_n_key
    first_key = 10 + DATA.n_value
    for position, token in enumerate(tokens[:length]):
        if token >= first_context:
            context = token
        elif token >= first_key and position < separator:
            told[context, token] = position + 1
        elif token >= first_key:
            asked.append((position, told[context, token]))
    return asked


@pytest.mark.parametrize("packing", [0, 60])
def test_answers_are_where_reading_finds_them(packing):
    batch = make_batch(packing=packing)
    padded = make_batch()
    found = np.asarray(recall.answer_positions(batch))
    for item in range(NUM_ITEMS - NUM_WITHOUT_WEIGHT):
        sizes = int(batch.n_context[item]), int(batch.n_key[item])
        asked = answers(np.asarray(padded.tokens[item]).tolist(), *sizes)
        assert asked[0][0] == batch.scored.position[item, 0]
        assert [told for _, told in asked] == found[item, : len(asked)].tolist()


@pytest.mark.parametrize("routing", ["causal", "parity"])
def test_shares_are_those_of_whole_masks(routing):
    model = build_model(dataclasses.replace(MODEL, routing=routing), rngs=nnx.Rngs(0))
    # The projection is drawn from the key in parity, so both forms see the same one.
    run = jax.jit(
        lambda batch: model(
            batch.tokens, padding_mask=batch.padding_mask, packing=batch.packing, key=jax.random.key(1)
        )
    )
    padded, packed = make_batch(), make_batch(packing=60)
    output = run(padded)
    expected = dense_shares(output, padded, model.config.conv_kernel)
    found = recall.visible_shares(model, output, padded)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(recall.visible_shares(model, run(packed), packed), expected, rtol=1e-6)
    # The test would say little if everything or nothing was seen.
    assert expected.min() > 0 and expected[..., 0].max() < NUM_ITEMS - NUM_WITHOUT_WEIGHT


def dense_shares(output, batch, width):
    """The same from matrices of all queries and keys, item by item."""
    positions = jnp.arange(batch.tokens.shape[1])
    masks = np.stack(
        [
            [KeySet((source,)).tile(positions, positions) for source in layer.branch.key_set.sources]
            for layer in output.layers
        ]
    )
    masks = np.concatenate([masks, masks.any(0, keepdims=True)])
    masks = np.concatenate([masks, masks.any(1, keepdims=True)], axis=1)
    shares = np.zeros((*masks.shape[:2], 2))
    for item in range(NUM_ITEMS - NUM_WITHOUT_WEIGHT):
        tokens = np.asarray(batch.tokens[item]).tolist()
        asked = answers(tokens, int(batch.n_context[item]), int(batch.n_key[item]))
        for query, key in asked:
            row = masks[:, :, item, query]
            shares += np.stack([row[..., key], row[..., key : key + width].any(-1)], -1) / len(asked)
    return shares


def test_a_source_of_all_keys_shows_every_answer():
    settings = dataclasses.replace(MODEL, sparse_arch="full+sink", num_layers=1)
    model = build_model(settings, rngs=nnx.Rngs(0))
    batch = make_batch()
    output = jax.jit(lambda batch: model(batch.tokens, padding_mask=batch.padding_mask))(batch)
    shares = recall.visible_shares(model, output, batch) / (NUM_ITEMS - NUM_WITHOUT_WEIGHT)
    named = recall.named(shares, model.config.sources)
    assert named["recall/1/full"] == named["recall/any/any"] == named["reach/1/full"] == 1.0
    # A sink that shows a later position of the window shows the answer's own too.
    assert 0 < named["recall/1/sink"] == named["reach/1/sink"] < 1.0


def test_what_can_be_measured():
    assert recall.measured(build_model(MODEL, rngs=nnx.Rngs(0))) == (2, SOURCES)
    assert recall.measured(build_model(ModelConfig(), rngs=nnx.Rngs(0))) is None
    assert recall.measured(TinyModel()) is None


def test_each_member_records_recall(tmp_path):
    settings = tiny_experiment(num_steps=2, eval_every_steps=2, population_seeds="0,1")
    settings = dataclasses.replace(settings, model=dataclasses.replace(MODEL, vocab_size=20, num_layers=1))
    train(settings, tmp_path)
    names = {
        f"{kind}/{layer}/{source}"
        for kind in ("recall", "reach")
        for layer in ("1", "any")
        for source in (*SOURCES, "any")
    }
    scored = [line for line in read_metrics(tmp_path) if line["kind"] != "train"]
    assert [(line["kind"], line["member"]) for line in scored] == [
        (kind, member) for kind in ("valid", "test") for member in (0, 1)
    ]
    for line in scored:
        assert names <= set(line)
        assert all(0 <= line[name] <= 1 for name in names)
        assert line["recall/1/any"] >= max(line[f"recall/1/{source}"] for source in SOURCES)
        assert line["recall/any/any"] == line["recall/1/any"]
