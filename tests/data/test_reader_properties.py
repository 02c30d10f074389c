"""Properties of the data set reader: every item of any small data set, and no damage that goes unnoticed."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hax_jax.config import ConfigError, DataConfig
from hax_jax.data import DatasetError, reader
from hax_jax.data.dataset import Plan, create_dataset

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def small_configs(draw):
    """Settings of data sets with at most a few hundred items."""
    low = {kind: draw(st.integers(2, 3)) for kind in ("context", "key")}
    return DataConfig(
        **{f"min_n_{kind}": least for kind, least in low.items()},
        **{f"max_n_{kind}": least + draw(st.integers(0, 2)) for kind, least in low.items()},
        n_value=draw(st.integers(5, 40)),
        seed=draw(st.integers(0, 2**32 - 1)),
        n_eval_per_pair=draw(st.integers(1, 2)),
    )


@QUICK
@given(small_configs(), st.integers(1, 3), st.data())
def test_items_are_sequences_of_the_task_in_any_order_of_reading(config, per_pair, data):
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, data_dir=folder)
        manifest = create_dataset(Plan(config, per_pair), report=lambda line: None)
        stored = reader.StoredSplit(manifest, "train")
        count = per_pair * config.num_pairs
        everything = stored.items(np.arange(count))
        order = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=10)))
        np.testing.assert_array_equal(stored.items(order), everything[order])
        assert everything.shape == (count, config.padded_length)
        assert everything.max() < config.min_vocab_size
        assert (everything[:, 0] == 1).all() and ((everything == 4).sum(1) == 1).all()
        halves = [row[row != 3].tolist() for row in everything]
        for row in halves:
            middle = row.index(4)
            assert sorted(row[1:middle]) == sorted(row[middle + 1 :])


@QUICK
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.integers(0, 3))
def test_a_flipped_bit_anywhere_is_one_error_or_leaves_every_item_as_it_was(whole, position, bit, which):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(whole, Path(temporary) / "copy"))
        good = reader.StoredSplit(reader.read_manifest(whole), "train").items(np.arange(18))
        files = sorted(path for path in folder.iterdir() if path.is_file())
        path = files[which % len(files)]
        content = bytearray(path.read_bytes())
        content[int(position * len(content))] ^= 1 << bit
        path.write_bytes(content)
        said, found = "", good
        try:
            found = reader.StoredSplit(reader.read_manifest(folder), "train").items(np.arange(18))
        except (DatasetError, ConfigError) as error:
            said = str(error)
        assert "\n" not in said
        np.testing.assert_array_equal(found, good)


@QUICK
@given(content=JSON | st.fixed_dictionaries({"format": JSON, "settings": JSON, "splits": JSON, "text": JSON}))
def test_any_json_as_a_manifest_is_one_error(tmp_path, content):
    (tmp_path / reader.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DatasetError) as caught:
        reader.read_manifest(tmp_path)
    assert "\n" not in str(caught.value)
