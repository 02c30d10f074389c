"""The task and the published generator, held to the original's files."""

import dataclasses
import hashlib
import re

import numpy as np
import pytest

from hax_jax.config import ConfigError, DataConfig
from hax_jax.data import joint_recall

PUBLISHED = DataConfig()
GOLDEN_SETTINGS = DataConfig(max_n_context=6, max_n_key=7, n_value=5, seed=3)
RECALL = DataConfig(min_n_context=1, max_n_context=1, min_n_key=4, max_n_key=9, n_value=11)


def draw_slowly(config: DataConfig, sweeps: int) -> list[np.ndarray]:
    """The stream by its definition: item after item, with a text line that came before drawn again."""
    rng, seen, items = np.random.RandomState(config.seed), set(), []
    for _ in range(sweeps):
        for n_context, n_key in joint_recall.table_sizes(config).tolist():
            item = joint_recall.draw_item(rng, n_context, n_key, config)
            while item.tobytes() in seen:
                item = joint_recall.draw_item(rng, n_context, n_key, config)
            seen.add(item.tobytes())
            items.append(item)
    return items


def test_every_array_and_file_of_the_golden_set(golden):
    arrays, meta = golden.load("D_dataset_small.npz"), golden.meta("D_dataset_small.npz")
    published = joint_recall.PublishedItems(GOLDEN_SETTINGS)
    layout = published.layout
    for split, sweeps in (("train", 3), ("valid", 2), ("test", 2)):
        items = layout.pad(published.sweeps(sweeps)).reshape(-1, GOLDEN_SETTINGS.padded_length)
        masks = np.tile(layout.score_masks(), (sweeps, 1))
        np.testing.assert_array_equal(items, arrays[f"{split}/inputs"])
        np.testing.assert_array_equal(masks, arrays[f"{split}/mask"])
        for kind, rows in (("inputs", items), ("mask", masks.astype(np.uint8))):
            described = meta["files"][f"max_n_context_6_max_n_key_7_seed_3_{split}_{kind}.txt"]
            text = joint_recall.text_lines(rows)
            assert hashlib.sha256(text).hexdigest() == described["sha256"]
            assert (len(text), text.count(b"\n")) == (described["bytes"], described["lines"])


def test_first_sweep_of_the_published_set():
    published = joint_recall.PublishedItems(PUBLISHED)
    items = published.layout.pad(published.sweeps(1))[0]
    masks = published.layout.score_masks().astype(np.uint8)
    sums = [hashlib.sha256(joint_recall.text_lines(rows)).hexdigest() for rows in (items, masks)]
    assert sums == [
        "f812a62c5c60adfd520997d1165775b472b48edd7b6afebd433f85308c4c1e0f",
        "215aca2946f95c66447f982d2f5d6dab50487461f4e0fd63cfc67bf0aae9c6e6",
    ]


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(PUBLISHED, min_n_context=15, max_n_key=6),
        DataConfig(min_n_context=1, max_n_context=3, min_n_key=1, max_n_key=3, seed=2**32 - 1),
        # One key has 8 different items, half of which are used: some are drawn again.
        DataConfig(min_n_context=1, max_n_context=1, min_n_key=1, max_n_key=2, n_value=8, seed=7),
        DataConfig(min_n_context=9, max_n_context=10, min_n_key=11, max_n_key=11, n_value=300, seed=5),
        RECALL,
    ],
    ids=["published", "small tables", "repeats", "uint16", "one context"],
)
def test_the_fast_stream_is_the_item_by_item_stream(config):
    published = joint_recall.PublishedItems(config)
    packed = np.concatenate([published.sweeps(n) for n in (1, 2, 1)])
    np.testing.assert_array_equal(packed.reshape(-1), np.concatenate(draw_slowly(config, 4)))
    assert packed.dtype == (np.uint16 if config.n_value == 300 else np.uint8)


def test_all_items_of_a_tiny_table_come_once():
    config = DataConfig(min_n_context=1, max_n_context=1, min_n_key=1, max_n_key=1, n_value=16)
    joint_recall.check_enough_items(config, 16)
    packed = joint_recall.PublishedItems(config).sweeps(16)
    assert len(np.unique(packed, axis=0)) == 16
    with pytest.raises(ConfigError, match=re.escape("`items_per_pair` must be at most 16")):
        joint_recall.check_enough_items(config, 17)


def test_counts_of_different_items():
    assert joint_recall.distinct_items(1, 2, 3) == 3**2 * 2 * 2
    assert joint_recall.distinct_items(2, 2, 3) == 3**4 * 2**2 * 2**4
    assert joint_recall.distinct_items(16, 16, 16) == np.inf
    # Just enough bits for the exact number: 2^127 items of one key, none twice.
    assert joint_recall.distinct_items(1, 1, 2**127) == 2**127


def test_the_worked_example_of_the_module():
    config = DataConfig(min_n_context=2, max_n_context=2, min_n_key=2, max_n_key=3, n_value=3)
    values = np.array([[2, 0], [0, 1]])
    item = joint_recall.assemble(
        values, np.array([[1, 0], [0, 1]]), np.array([[[1, 0], [0, 1]], [[1, 0], [1, 0]]]), config
    )
    rows = {}
    for line in joint_recall.__doc__.splitlines():
        match = re.match(r"    (token|scored) {3,}((?:[\d*.]+ +)+)", line)
        if match:
            rows[match[1]] = match[2].split()
    shown = [int(token) for token in rows["token"] if token != "..."]
    assert shown[:22] == item.tolist()
    assert set(shown[22:]) == {joint_recall.PAD}
    assert config.padded_length == 30
    mask = joint_recall.score_mask(2, 2, 30)
    starred = [place for place, mark in enumerate(rows["scored"]) if mark == "*"]
    assert starred == np.flatnonzero(mask).tolist()


@pytest.mark.parametrize("config", [GOLDEN_SETTINGS, RECALL], ids=["joint recall", "one context"])
def test_second_half_asks_for_the_table_of_the_first(config):
    published = joint_recall.PublishedItems(config)
    items = published.layout.pad(published.sweeps(2))
    for sweep in items:
        for (n_context, n_key), item in zip(published.layout.sizes.tolist(), sweep, strict=True):
            tables = [read_half(item, n_context, n_key, half) for half in (0, 1)]
            assert tables[0] == tables[1]
            contexts, keys = (set(part) for part in zip(*tables[0], strict=True))
            assert contexts == {joint_recall.first_context(config) + i for i in range(n_context)}
            assert keys == {joint_recall.first_key(config) + i for i in range(n_key)}
            assert len(tables[0]) == n_context * n_key
            assert set(item[joint_recall.item_length(n_context, n_key) :]) <= {joint_recall.PAD}


def read_half(item: np.ndarray, n_context: int, n_key: int, half: int) -> dict[tuple[int, int], int]:
    """The table {(context, key): value} that one half of an item spells out."""
    width = 2 * n_key + 1
    start = 1 + half * (n_context * width + 1)
    assert item[start - 1] == (joint_recall.SEPARATOR if half else joint_recall.START)
    rows = item[start : start + n_context * width].reshape(n_context, width)
    return {
        (int(row[0]), int(key)): int(value)
        for row in rows
        for key, value in zip(row[1::2], row[2::2], strict=True)
    }


def test_more_than_65536_token_ids_are_refused():
    with pytest.raises(ConfigError, match=r"data\.n_value.*65536 token ids"):
        joint_recall.token_dtype(DataConfig(n_value=2**16))


def test_text_of_wide_numbers():
    items = np.array([[1, 255, 30], [65535, 3, 3]], np.uint16)
    assert joint_recall.text_lines(items) == b"1 255 30\n65535 3 3\n"
