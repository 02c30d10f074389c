"""One interface to both forms: order, batches, fillers, iterator state, and what a Batch holds."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from hax_jax.config import ConfigError, DataConfig
from hax_jax.data import Batch, Split, joint_recall, make_split
from hax_jax.data.dataset import Plan, create_dataset
from hax_jax.data.raw_batches import BatchNumbers

TABLES = DataConfig(max_n_context=6, max_n_key=7, n_value=5, n_eval_per_pair=2)
# Multi-query associative recall: one context.
RECALL = DataConfig(min_n_context=1, max_n_context=1, min_n_key=4, max_n_key=9, n_value=11, n_eval_per_pair=2)
TASKS = {"joint recall": TABLES, "one context": RECALL}
N_TRAIN = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    base = tmp_path_factory.mktemp("data")
    for name, config in TASKS.items():
        plan = Plan(dataclasses.replace(config, data_dir=str(base / name)), N_TRAIN)
        create_dataset(plan, report=lambda line: None)
    return {name: base / name for name in TASKS}


@pytest.fixture(params=[f"{task}, {source}" for task in TASKS for source in ("stream", "dataset")])
def config(request, folders) -> DataConfig:
    task, source = request.param.split(", ")
    return dataclasses.replace(
        TASKS[task], train_source=source, eval_source=source, data_dir=str(folders[task])
    )


def batches(split: Split, batch_size: int, count: int | None = None, **options) -> list[Batch]:
    iterator = split.iterator(batch_size, **options)
    raws = list(iterator) if count is None else [next(iterator) for _ in range(count)]
    materialize = jax.jit(split.materialize)
    return [jax.tree.map(np.asarray, materialize(raw)) for raw in raws]


def joined(some: list[Batch]) -> Batch:
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *some)


def test_a_batch_is_consistent(config):
    batch = batches(make_split(config, "train"), 2 * config.num_pairs, 1, repeat=True)[0]
    b, t = 2 * config.num_pairs, config.padded_length - 1
    kinds = {
        "tokens": np.int32,
        "targets": np.int32,
        "score_mask": bool,
        "padding_mask": bool,
        "n_context": np.int32,
        "n_key": np.int32,
        "item_weight": np.float32,
    }
    for name, kind in kinds.items():
        array = getattr(batch, name)
        assert array.dtype == kind
        assert array.shape == ((b, t) if name in ("tokens", "targets") or name.endswith("mask") else (b,))
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    np.testing.assert_array_equal(batch.padding_mask, batch.tokens != joint_recall.PAD)
    sizes = np.tile(joint_recall.table_sizes(config), (2, 1))
    np.testing.assert_array_equal(np.stack([batch.n_context, batch.n_key], -1), sizes)
    np.testing.assert_array_equal(batch.score_mask.sum(1), sizes.prod(1))
    keys = batch.tokens[batch.score_mask] - joint_recall.first_key(config)
    values = batch.targets[batch.score_mask] - joint_recall.FIRST_VALUE
    assert keys.min() == 0
    assert keys.max() == config.max_n_key - 1
    assert values.min() == 0
    assert values.max() == config.n_value - 1
    assert (batch.item_weight == 1).all()
    # Each answer can be looked up: what followed the same key of the same context in the first half.
    for row in range(0, b, 5):
        table, context = {}, None
        for token, target, scored in zip(
            batch.tokens[row], batch.targets[row], batch.score_mask[row], strict=True
        ):
            if token >= joint_recall.first_context(config):
                context = token
            elif scored:
                assert table[context, token] == target
            elif token >= joint_recall.first_key(config):
                table[context, token] = target


def test_training_on_the_data_set_walks_it_in_order_and_wraps_round(folders):
    for name, task in TASKS.items():
        config = dataclasses.replace(task, train_source="dataset", data_dir=str(folders[name]))
        published = joint_recall.PublishedItems(config)
        items = published.layout.pad(published.sweeps(N_TRAIN)).reshape(-1, config.padded_length)
        split = make_split(config, "train")
        assert split.num_items == len(items) == N_TRAIN * config.num_pairs
        walked = joined(batches(split, 7, 8, repeat=True))
        expected = items[np.arange(56) % len(items)]
        np.testing.assert_array_equal(walked.tokens, expected[:, :-1])
        np.testing.assert_array_equal(walked.targets, expected[:, 1:])
        masks = np.tile(published.layout.score_masks(), (10, 1))
        np.testing.assert_array_equal(walked.score_mask, masks[:56, :-1])
        assert (walked.item_weight == 1).all()


def test_the_stream_goes_on_with_new_items(config):
    split = make_split(config, "train")
    assert split.num_items == (N_TRAIN * config.num_pairs if config.train_source == "dataset" else None)
    tokens = joined(batches(split, 9, 12, repeat=True)).tokens
    distinct = len(np.unique(tokens, axis=0))
    assert distinct == (108 if config.train_source == "stream" else split.num_items)


@pytest.mark.parametrize("name", ["valid", "test"])
def test_evaluation_ends_with_filler_rows(config, name):
    split = make_split(config, name)
    assert split.num_items == 2 * config.num_pairs == 12
    some = batches(split, 5, repeat=False)
    assert [batch.item_weight.tolist() for batch in some] == [[1.0] * 5, [1.0] * 5, [1.0, 1.0, 0.0, 0.0, 0.0]]
    assert not some[-1].score_mask[2:].any()
    assert some[-1].score_mask[:2].any(axis=1).all()
    everything = batches(split, 12, repeat=False)
    assert len(everything) == 1
    np.testing.assert_array_equal(joined(some).tokens[:12], everything[0].tokens)
    assert len(list(split.iterator(5, repeat=False, drop_remainder=True))) == 2
    assert len(list(split.iterator(6, repeat=False))) == 2
    # A batch larger than the split: filled up, or going round several times.
    raw = next(split.iterator(30, repeat=False))
    assert raw["weight"].tolist() == [1.0] * 12 + [0.0] * 18
    around = split.iterator(30, repeat=True)
    index = np.concatenate([next(around)["index"], next(around)["index"]])
    np.testing.assert_array_equal(index, np.arange(60) % 12)


def test_iterator_state_is_json_and_resumes_exactly(config):
    split = make_split(config, "train")
    iterator = split.iterator(5, repeat=True)
    for _ in range(3):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(4)]
    resumed = make_split(config, "train").iterator(5, repeat=True)
    next(resumed)
    resumed.set_state(state)
    for one in expected:
        other = next(resumed)
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    assert resumed.get_state() == iterator.get_state()


def test_batches_taken_together_are_those_taken_one_by_one(config):
    iterator, other = (make_split(config, "train").iterator(5, repeat=True) for _ in "ab")
    next(iterator), next(other)
    several, rows = iterator.take(4), [next(other) for _ in range(4)]
    assert several.keys() == rows[0].keys()
    for name, array in several.items():
        np.testing.assert_array_equal(array, np.stack([row[name] for row in rows]))
    assert iterator.get_state() == other.get_state() == {"next_index": 5}


def test_no_more_batches_are_taken_than_there_are(config):
    iterator = make_split(config, "test").iterator(5, repeat=False)
    assert iterator.take(2)["weight"].sum() == 10
    with pytest.raises(StopIteration):
        iterator.take(2)


def test_what_the_host_handles_is_small(config):
    raw = next(make_split(config, "train").iterator(64, repeat=True))
    kinds = {name: (array.dtype, array.shape) for name, array in raw.items()}
    expected = {"index": (np.uint32, (64,)), "weight": (np.float32, (64,))}
    if config.train_source == "dataset":
        expected["tokens"] = (np.uint8, (64, config.padded_length))
    assert kinds == expected


def test_an_item_of_the_stream_is_the_same_in_any_batch():
    split = make_split(TABLES, "train")
    one, other = (joined(batches(split, size, 24 // size, repeat=True)) for size in (3, 8))
    np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_train_split_can_be_read_while_evaluation_streams(folders):
    config = dataclasses.replace(TABLES, train_source="dataset", data_dir=str(folders["joint recall"]))
    assert make_split(config, "train").num_items == 18
    streamed = joined(batches(make_split(config, "test"), 12, repeat=False))
    from_stream = joined(batches(make_split(TABLES, "test"), 12, repeat=False))
    np.testing.assert_array_equal(streamed.tokens, from_stream.tokens)


def test_fewer_evaluation_items_are_the_first_ones(folders):
    config = dataclasses.replace(TABLES, eval_source="dataset", data_dir=str(folders["joint recall"]))
    all_items = batches(make_split(config, "valid"), 12, repeat=False)[0]
    fewer = make_split(dataclasses.replace(config, n_eval_per_pair=1), "valid")
    assert fewer.num_items == 6
    np.testing.assert_array_equal(batches(fewer, 6, repeat=False)[0].tokens, all_items.tokens[:6])
    with pytest.raises(ConfigError, match=r"`data\.n_eval_per_pair` must be at most 2, as in the data set"):
        make_split(dataclasses.replace(config, n_eval_per_pair=3), "valid")


def test_bad_requests(config):
    with pytest.raises(ConfigError, match="`split` must be one of train, valid, test, got 'exam'"):
        make_split(config, "exam")
    split = make_split(config, "valid")
    with pytest.raises(ValueError, match="`batch_size` must be an integer >= 1, got 0"):
        split.iterator(0, repeat=True)
    with pytest.raises(ValueError, match="`batch_size` must be at most 12, the items of the split, got 13"):
        split.iterator(13, repeat=False, drop_remainder=True)


def test_numbers_of_items_do_not_overflow():
    numbers = BatchNumbers(None, 64, repeat=True, drop_remainder=False)
    assert len(numbers) == 2**26
    assert numbers[2**26 - 1]["index"].tolist() == list(range(2**32 - 64, 2**32))
    round_and_round = BatchNumbers(1000, 64, repeat=True, drop_remainder=False)
    assert round_and_round[2**60]["index"].tolist() == [(2**66 + i) % 1000 for i in range(64)]
    with pytest.raises(ConfigError, match=r"data\.n_eval_per_pair.*2\^32 items in all"):
        make_split(DataConfig(max_n_context=100, max_n_key=100, n_eval_per_pair=10**6), "valid")


def test_a_wider_vocabulary_gives_the_same_batches(tmp_path):
    config = DataConfig(
        min_n_context=2,
        max_n_context=2,
        min_n_key=3,
        max_n_key=3,
        n_value=400,
        n_eval_per_pair=2,
        eval_source="dataset",
        data_dir=str(tmp_path / "wide"),
    )
    create_dataset(Plan(config, 1), report=lambda line: None)
    split = make_split(config, "test")
    assert next(split.iterator(2, repeat=False))["tokens"].dtype == np.uint16
    published = joint_recall.PublishedItems(config)
    published.sweeps(3)
    items = published.layout.pad(published.sweeps(2)).reshape(2, -1)
    np.testing.assert_array_equal(batches(split, 2, repeat=False)[0].tokens, items[:, :-1])


def test_materialize_needs_no_jit(config):
    split = make_split(config, "train")
    raw = next(split.iterator(2, repeat=True))
    jitted = batches(split, 2, 1, repeat=True)[0]
    for eager, traced in zip(jax.tree.leaves(split.materialize(raw)), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_array_equal(eager, traced)


@pytest.mark.parametrize("packing", [0, 250])
def test_data_kept_on_the_device_are_those_that_are_read(folders, packing):
    """18 items in batches of 12: the second goes on at the beginning."""
    folder = str(folders["joint recall"])
    config = dataclasses.replace(TABLES, train_source="dataset", data_dir=folder, packing=packing)
    found = []
    for most in (0, 1):
        split = make_split(dataclasses.replace(config, keep_on_device_mib=most), "train")
        kept = split.keep()
        assert list(kept) == ["sweeps"] * most
        iterator = split.iterator(12, repeat=True)
        raws = [next(iterator) for _ in range(2)]
        assert all(("tokens" in raw) != bool(most) for raw in raws)
        batches = [jax.tree.map(np.asarray, split.materialize({**raw, **kept})) for raw in raws]
        found.append((batches, iterator.get_state()))
    jax.tree.map(np.testing.assert_array_equal, *found)
