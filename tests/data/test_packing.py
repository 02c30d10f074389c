"""Packed batches: no item is ever lost, and each lies whole in one row, in any order and on any source."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hax_jax.config import ConfigError, DataConfig, Experiment
from hax_jax.data import Batch, Split, joint_recall, make_split
from hax_jax.data.layout import row_layout
from hax_jax.packing import Packing, move
from tests.data.making import SETTINGS

SMALL = dataclasses.replace(SETTINGS, min_n_context=1, min_n_key=2, max_n_context=4, max_n_key=3)


def made(split: Split, size: int, count: int, repeat: bool = True) -> list[Batch]:
    iterator = split.iterator(size, repeat=repeat)
    return [jax.tree.map(np.asarray, split.materialize(next(iterator))) for _ in range(count)]


def items_of(batch: Batch) -> list[list[np.ndarray]]:
    """Tokens, targets and score mask of each item, cut out of the rows."""
    rows = [batch.tokens, batch.targets, batch.score_mask]
    if batch.packing is None:
        real = batch.padding_mask
        return [[x[i][real[i]] for x in rows] for i in range(len(real))]
    ids = batch.packing.segment_ids.reshape(-1)
    return [[x.reshape(-1)[ids == i] for x in rows] for i in range(len(batch.n_key))]


@pytest.mark.parametrize(
    ("size", "packing", "order"),
    [
        (1, 57, "file"),
        (5, 57, "file"),
        (5, 2**30, "file"),
        (13, 77, "file"),
        (5, 57, "even"),
        (4, 2**30, "even"),
    ],
)
def test_packed_items_are_the_padded_items(size, packing, order):
    padded_config = dataclasses.replace(SMALL, order=order)
    config = dataclasses.replace(padded_config, packing=packing)
    packed, padded = (make_split(c, "train") for c in (config, padded_config))
    rows, length = packed.row_shape(size)
    assert length <= config.packing
    # As many batches as there are table sizes: every composition comes.
    for one, other in zip(made(packed, size, 8), made(padded, size, 8), strict=True):
        assert one.tokens.shape == (rows, length)
        for got, wanted in zip(items_of(one), items_of(other), strict=True):
            jax.tree.map(np.testing.assert_array_equal, got, wanted)
        assert one.padding_mask.sum() == other.padding_mask.sum()
        np.testing.assert_array_equal(one.scored.position, other.scored.position)
        empty = ~one.padding_mask
        assert (one.tokens[empty] == joint_recall.PAD).all()
        assert not one.score_mask[empty].any()
        for name in ("n_context", "n_key", "item_weight"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        # Whole and in one piece: positions of an item follow each other in one row.
        for item in range(size):
            row, column = np.nonzero(one.packing.segment_ids == item)
            assert len(set(row)) == 1
            np.testing.assert_array_equal(np.diff(column), 1)
            assert row[0] * length + column[0] == one.packing.first[item]
            np.testing.assert_array_equal(one.packing.positions[row, column], np.arange(len(column)))


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("packing", [1057, 2048, 4096, 2**30])
@pytest.mark.parametrize("size", [64, 480])
def test_published_sizes_fit_without_a_remainder(size, packing, devices):
    config = DataConfig(packing=packing)
    layout = row_layout(config, size, devices)
    assert layout.rows % devices == 0
    assert layout.length <= packing
    lengths = np.minimum(joint_recall.item_length(*joint_recall.table_sizes(config).T), 1057)
    assert len(layout.first) == 144 // math.gcd(144, size)
    for phase, first in enumerate(layout.first):
        length = lengths[(phase * layout.stride + np.arange(size)) % 144]
        order = np.argsort(first)
        begin, end = first[order], (first + length)[order]
        assert begin[0] >= 0 and end[-1] <= layout.rows * layout.length
        assert (end[:-1] <= begin[1:]).all()
        assert (begin // layout.length == (end - 1) // layout.length).all()
    if devices == 1 and packing > 1057:
        # The fullest batch of 64 in file order has 39,728 positions.
        fullest = {64: 39_728, 480: 231_168}[size]
        assert fullest <= layout.rows * layout.length <= 1.04 * fullest


def test_an_even_order_has_the_same_items_in_fewer_positions():
    config = DataConfig(order="even")
    lengths = np.minimum(joint_recall.item_length(*joint_recall.table_sizes(config).T), 1057)
    iterator = make_split(config, "train").iterator(64, repeat=True)
    seen = [next(iterator)["index"] for _ in range(18)]
    totals = [lengths[index % 144].sum() for index in seen]
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(18 * 64))
    # The mean is 29,696; in the order of the file the fullest batch has 39,728.
    assert max(totals) < 1.04 * np.mean(totals)
    layout = row_layout(dataclasses.replace(config, packing=1408), 64)
    assert (layout.rows, layout.length) == (22, 1408)
    # Evaluation goes in the order of the file, whatever training does.
    index = next(make_split(config, "valid").iterator(64, repeat=False))["index"]
    np.testing.assert_array_equal(index, np.arange(64))


def test_evaluation_ends_with_filler_items_and_the_last_batch_fits():
    config = dataclasses.replace(SMALL, packing=100)
    padded, packed = (made(make_split(c, "valid"), 7, 3, repeat=False) for c in (SMALL, config))
    for one, other in zip(packed, padded, strict=True):
        np.testing.assert_array_equal(one.item_weight, other.item_weight)
        np.testing.assert_array_equal(one.scored.used.sum(1), other.score_mask.sum(1))
        assert one.score_mask.sum() == other.score_mask.sum()


def test_there_and_back_again_with_gradients():
    packing = Packing.of(jnp.array([7, 0, 12]), jnp.array([4, 6, 5]), 2, 12, 6)
    ids = jnp.where(packing.segment_ids < 0, -1, packing.segment_ids)
    assert ids.tolist() == [[1] * 6 + [-1] + [0] * 4 + [-1], [2] * 5 + [-1] * 7]
    long = Packing.of(jnp.array([0]), jnp.array([60]), 2, 100, 60).segment_ids.reshape(-1)
    assert long[:60].tolist() == [0] * 60 and (long[60:] < 0).all()
    assert max(np.unique(long[60:], return_counts=True)[1]) == 64
    x = jnp.arange(48.0).reshape(2, 12, 2)
    items = packing.to_items(x)
    assert items.shape == (3, 6, 2)
    np.testing.assert_array_equal(items[0, :, 0], [14, 16, 18, 20, 0, 0])
    back = packing.to_rows(items)
    np.testing.assert_array_equal(back, jnp.where(packing.is_item[..., None], x, 0))
    weights = jnp.arange(36.0).reshape(3, 6, 2)
    gradient = jax.grad(lambda x: (packing.to_items(x) * weights).sum())(x)
    np.testing.assert_array_equal(gradient, packing.to_rows(weights))
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(lambda x: packing.to_items(x).sum()))(x))
    moved = move(x[:1], jnp.array([[3, -1]]), -jnp.ones((1, 12), int))
    np.testing.assert_array_equal(moved, [[[6, 7], [0, 0]]])


def test_settings_that_cannot_be_packed():
    with pytest.raises(ConfigError, match=r"`data\.packing` must be 0, or at least 1057, the positions of"):
        DataConfig(packing=1000)
    parity = {"model": {"routing": "parity"}, "data": {"packing": 2048}}
    with pytest.raises(ConfigError, match=r"`training\.batch_size` must be at least 2 with data\.packing"):
        Experiment.from_dict({**parity, "training": {"batch_size": 1}})
    Experiment.from_dict(parity)
