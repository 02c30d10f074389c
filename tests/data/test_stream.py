"""Items made on the device: their structure exactly, their distribution, and that they never change."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hax_jax.config import DataConfig
from hax_jax.data import joint_recall, stream

# Chi-square sums are compared with their mean plus this many standard deviations, sqrt(2 * mean). The
# seeds are fixed: the tests pass or fail for good, and would fail for a visible bias.
SIGMAS = 4.0

CONFIGS = {
    "published": DataConfig(),
    "small": DataConfig(
        min_n_context=1, max_n_context=4, min_n_key=1, max_n_key=5, n_value=7, seed=2**32 - 1
    ),
    "one context": DataConfig(min_n_context=1, max_n_context=1, min_n_key=8, max_n_key=20, n_value=300),
    "one size": DataConfig(min_n_context=3, max_n_context=3, min_n_key=2, max_n_key=2, n_value=2, seed=0),
}


@pytest.fixture(params=CONFIGS, scope="module")
def config(request) -> DataConfig:
    return CONFIGS[request.param]


def make(config: DataConfig, index: np.ndarray, split: str = "train") -> np.ndarray:
    return np.asarray(jax.jit(lambda index: stream.make_items(index, split, config))(index.astype(np.uint32)))


def halves(items: np.ndarray, n_context: int, n_key: int) -> np.ndarray:
    """(n, 2, n_context, 2 n_key + 1): the rows of both halves of items of one table size."""
    width = n_context * (2 * n_key + 1)
    parts = [items[:, 1 : width + 1], items[:, width + 2 : 2 * width + 2]]
    return np.stack(parts, axis=1).reshape(len(items), 2, n_context, 2 * n_key + 1)


def tables(rows: np.ndarray, config: DataConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Orders of contexts (n, 2, c) and keys (n, 2, c, k), and values by context and key (n, 2, c, k)."""
    contexts = rows[..., 0] - joint_recall.first_context(config)
    keys = rows[..., 1::2] - joint_recall.first_key(config)
    by_key = np.take_along_axis(rows[..., 2::2], np.argsort(keys, axis=-1), axis=-1)
    values = np.take_along_axis(by_key, np.argsort(contexts, axis=-1)[..., None], axis=-2)
    return contexts, keys, values - joint_recall.FIRST_VALUE


def test_every_item_states_its_table_and_asks_for_all_of_it(config):
    sizes = joint_recall.table_sizes(config)
    index = np.arange(2 * len(sizes))
    items = make(config, index)
    assert items.dtype == np.int32
    assert items.shape == (len(index), config.padded_length)
    for i, item in zip(index, items, strict=True):
        n_context, n_key = sizes[i % len(sizes)].tolist()
        length = joint_recall.item_length(n_context, n_key)
        assert item[0] == joint_recall.START
        assert item[length // 2] == joint_recall.SEPARATOR
        assert (item[length:] == joint_recall.PAD).all()
        contexts, keys, values = tables(halves(item[None], n_context, n_key), config)
        assert (np.sort(contexts) == np.arange(n_context)).all()
        assert (np.sort(keys) == np.arange(n_key)).all()
        np.testing.assert_array_equal(values[:, 0], values[:, 1])
        assert values.min() >= 0
        assert values.max() < config.n_value


def test_questions_and_sizes_are_those_of_the_published_form(config):
    sizes = joint_recall.table_sizes(config)
    index = jnp.arange(3 * len(sizes), dtype=jnp.uint32)
    n_context, n_key = stream.table_sizes(index, config)
    np.testing.assert_array_equal(np.stack([n_context, n_key], -1), np.tile(sizes, (3, 1)))
    position = jnp.arange(-1, config.padded_length)[None]
    place = np.asarray(stream.scored_places(position, n_context[:, None], n_key[:, None]))
    assert (place[:, 0] == -1).all()
    scored = np.tile(joint_recall.SweepLayout(config).score_masks(), (3, 1))
    np.testing.assert_array_equal(place[:, 1:] >= 0, scored)
    most = config.max_n_context * config.max_n_key
    positions = np.asarray(stream.scored_positions(n_context, n_key, most))
    for row, (mask, of_item) in enumerate(zip(scored, positions, strict=True)):
        np.testing.assert_array_equal(of_item[of_item >= 0], np.flatnonzero(mask))
        np.testing.assert_array_equal(place[row, 1:][mask], np.arange(mask.sum()))


def test_last_index_of_32_bits(config):
    sizes = joint_recall.table_sizes(config)
    n_context, n_key = stream.table_sizes(jnp.array([2**32 - 1], jnp.uint32), config)
    assert [int(n_context[0]), int(n_key[0])] == sizes[(2**32 - 1) % len(sizes)].tolist()


def excess(counts: np.ndarray, expected: float, freedom: int) -> float:
    """How many standard deviations a chi-square sum lies above its mean."""
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def count(codes: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(codes.reshape(-1), minlength=size).astype(float)


@pytest.mark.parametrize("form", ["stream", "published"])
def test_values_and_orders_are_uniform_and_independent(form):
    # The same statistics for both forms, which is what 'the same distribution' means here.
    config = DataConfig(min_n_context=3, max_n_context=3, min_n_key=4, max_n_key=4, n_value=5, seed=11)
    n, c, k, v = 6000, 3, 4, 5
    if form == "stream":
        items = make(config, np.arange(n))
    else:
        items = joint_recall.PublishedItems(config).sweeps(n).astype(np.int64)
    contexts, keys, values = tables(halves(items, c, k), config)
    values = values[:, 0]
    scores = {}
    # Every value in every cell, and pairs of neighbouring cells.
    cells = values.reshape(n, c * k)
    for cell in range(c * k):
        scores[f"value of cell {cell}"] = excess(count(cells[:, cell], v), n / v, v - 1)
        pair = cells[:, cell] * v + cells[:, (cell + 1) % (c * k)]
        scores[f"values of cells {cell} and next"] = excess(count(pair, v * v), n / v**2, v * v - 1)
    # Every order of the contexts, and of the keys in every row, as a whole.
    context_code = contexts @ (c ** np.arange(c))
    key_code = keys @ (k ** np.arange(k))
    for half in (0, 1):
        orders = np.unique(context_code[:, half], return_counts=True)[1]
        assert len(orders) == 6
        scores[f"order of contexts {half}"] = excess(orders, n / 6, 5)
        for row in range(c):
            orders = np.unique(key_code[:, half, row], return_counts=True)[1]
            assert len(orders) == 24
            scores[f"order of keys {half} {row}"] = excess(orders, n / 24, 23)
    # Orders of different rows and halves, and an order and a value, know nothing of each other.
    firsts = {
        "first contexts": (contexts[:, 0, 0], contexts[:, 1, 0], c),
        "first keys of two rows": (keys[:, 0, 0, 0], keys[:, 0, 1, 0], k),
        "first keys of two halves": (keys[:, 0, 0, 0], keys[:, 1, 0, 0], k),
    }
    for name, (one, other, size) in firsts.items():
        scores[name] = excess(count(one * size + other, size * size), n / size**2, size * size - 1)
    key_and_value = count(keys[:, 0, 0, 0] * v + values[:, 0, 0], k * v)
    scores["key and value"] = excess(key_and_value, n / (k * v), k * v - 1)
    assert max(scores.values()) < SIGMAS, max(scores.items(), key=lambda item: item[1])
    # So many sums, each with mean 0 and deviation 1, neither all low nor all high.
    assert abs(np.mean(list(scores.values()))) < 3 / np.sqrt(len(scores))


def test_neighbouring_items_and_splits_are_independent():
    config = DataConfig(min_n_context=3, max_n_context=3, min_n_key=4, max_n_key=4, n_value=5, seed=11)
    values = {
        split: tables(halves(make(config, np.arange(4000), split), 3, 4), config)[2][:, 0].reshape(4000, 12)
        for split in joint_recall.SPLITS
    }
    train = values["train"]
    pairs = {
        "next item": (train[:-1], train[1:]),
        "valid": (train, values["valid"]),
        "test": (train, values["test"]),
    }
    for name, (one, other) in pairs.items():
        counts = count(one * 5 + other, 25)
        assert excess(counts, one.size / 25, 24) < SIGMAS, name


def test_an_item_depends_on_its_index_alone():
    config = dataclasses.replace(CONFIGS["small"], min_n_context=3, min_n_key=4)
    index = np.arange(60)
    together = make(config, index)
    np.testing.assert_array_equal(make(config, index[::-1])[::-1], together)
    np.testing.assert_array_equal(make(config, index[37:38]), together[37:38])
    for other in (make(config, index, "valid"), make(dataclasses.replace(config, seed=2), index)):
        assert (other != together).any(axis=1).all()


def test_items_are_the_same_for_ever():
    # A change here would silently change every experiment on the stream.
    items = make(CONFIGS["published"], np.arange(144), "test").astype(np.uint8)
    digest = hashlib.sha256(items.tobytes()).hexdigest()
    assert digest == "a0592fec9369f663d0e1f9972f5bbd71901abd4016ae23b4a32ad14764e6607f"


def test_other_default_generators_do_not_matter():
    index = np.arange(4)
    expected = make(CONFIGS["small"], index)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(make(CONFIGS["small"], index), expected)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(make(CONFIGS["small"], index), expected)
