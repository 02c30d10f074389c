"""Reading a data set: everything that is damaged, foreign or of other settings is one clear error."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from hax_jax.config import ConfigError
from hax_jax.data import DatasetError, files, make_split, reader
from hax_jax.data.dataset import verify_dataset
from tests.data.making import SETTINGS, contents, make


def truncate(folder: pathlib.Path) -> None:
    path = folder / "train-00000-of-00001.arrayrecord"
    path.write_bytes(path.read_bytes()[:-1000])


def empty(folder: pathlib.Path) -> None:
    (folder / "train-00000-of-00001.arrayrecord").write_bytes(b"")


def remove(folder: pathlib.Path) -> None:
    (folder / "train-00000-of-00001.arrayrecord").unlink()


def flip(folder: pathlib.Path) -> None:
    path = folder / "train-00000-of-00001.arrayrecord"
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1
    path.write_bytes(bytes(content))


def swap(folder: pathlib.Path) -> None:
    shutil.copy(folder / "valid-00000-of-00001.arrayrecord", folder / "train-00000-of-00001.arrayrecord")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, r"has \d+ bytes instead of \d+"),
        (empty, "has 0 bytes instead of"),
        (remove, "cannot be read"),
        (flip, "another sha256"),
        (swap, "another sha256"),
    ],
)
def test_a_damaged_shard_is_one_clear_error(damage, said, copy):
    damage(copy)
    before = contents(copy)
    config = dataclasses.replace(SETTINGS, train_source="dataset", data_dir=str(copy))
    for attempt in (lambda: make_split(config, "train"), lambda: verify_dataset(copy), lambda: make(copy)):
        with pytest.raises(DatasetError, match=said) as caught:
            attempt()
        assert "split 'train' is damaged" in str(caught.value)
        assert str(copy) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert contents(copy) == before
    make_split(dataclasses.replace(config, eval_source="dataset"), "test")


def rewrite(folder: pathlib.Path, records: list[bytes]) -> None:
    """Puts other records into the training shard and makes the manifest agree with it."""
    path = folder / "train-00000-of-00001.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    content = json.loads((folder / reader.MANIFEST).read_text())
    content["splits"]["train"][0] |= {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)}
    (folder / reader.MANIFEST).write_text(json.dumps(content))


def test_wrong_records_are_refused_even_with_the_right_sums(copy, monkeypatch):
    stored = reader.StoredSplit(reader.read_manifest(copy), "train")
    sweeps = [stored.sweep(i) for i in range(3)]
    good = [reader.encode_record("train", i, sweep) for i, sweep in enumerate(sweeps)]
    strange = sweeps[1].copy()
    strange[7] = SETTINGS.min_vocab_size
    for record, said in [
        (reader.encode_record("train", 1, strange), "record 1 holds the token id 28"),
        (reader.encode_record("valid", 1, sweeps[1]), "record 1 is not sweep 1"),
        (good[0], "record 1 is not sweep 1"),
        (good[1][:-1], "record 1 is not sweep 1"),
        (b"", "record 1 is not sweep 1"),
    ]:
        rewrite(copy, [good[0], record, good[2]])
        items = reader.StoredSplit(reader.read_manifest(copy), "train")
        np.testing.assert_array_equal(items.sweep(0), sweeps[0])
        with pytest.raises(DatasetError, match=said):
            items.items(np.arange(18))
    rewrite(copy, good[:2])
    with pytest.raises(DatasetError, match="2 records instead of 3"):
        reader.StoredSplit(reader.read_manifest(copy), "train")
    # Damage inside a record of a split too large to be hashed when it is opened.
    rewrite(copy, good)
    monkeypatch.setattr(reader, "_HASHED_BYTES", 0)
    path = copy / "train-00000-of-00001.arrayrecord"
    content = bytearray(path.read_bytes())
    content[content.index(b"JR") + 200] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DatasetError, match="chunk data hash mismatch"):
        reader.StoredSplit(reader.read_manifest(copy), "train").items(np.arange(18))


def test_a_damaged_or_foreign_manifest_is_one_clear_error(copy):
    path = copy / reader.MANIFEST
    good = json.loads(path.read_text())

    def changed(**changes) -> str:
        return json.dumps({**good, **changes})

    outside = {**good["splits"]["train"][0], "name": "../../train-00000-of-00001.arrayrecord"}
    for text in (
        "", "[]", "{}", path.read_text()[:-100], "\x00", changed(format="other"),
        changed(settings={**good["settings"], "n_value": "16"}),
        changed(settings={**good["settings"], "items_per_pair": {"train": 3}}),
        changed(settings={**good["settings"], "items_per_pair": {"train": 4, "valid": 2, "test": 2}}),
        changed(splits={**good["splits"], "train": [outside]}),
        changed(splits={**good["splits"], "other": []}),
        changed(settings={**good["settings"], "items_per_pair": {"train": 3, "valid": 2, "test": 1}}),
        changed(text={}),
    ):
        path.write_text(text)
        with pytest.raises(DatasetError, match=r"manifest\.json is damaged or of another format") as caught:
            reader.read_manifest(copy)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match=r"manifest\.json cannot be read"):
        reader.read_manifest(copy)
    path.unlink()
    with pytest.raises(DatasetError, match=r"there is no manifest\.json in it; run `python exper"):
        reader.read_manifest(copy)


@pytest.mark.parametrize("name", reader.SETTINGS)
def test_a_data_set_of_other_settings_names_the_field(name, whole):
    config = dataclasses.replace(SETTINGS, train_source="dataset", data_dir=str(whole))
    stored = getattr(config, name)
    other = dataclasses.replace(config, **{name: stored - 1 if name.startswith("min") else stored + 1})
    with pytest.raises(ConfigError, match=rf"`data\.{name}` must be {stored}, as in the data set") as caught:
        make_split(other, "train")
    assert caught.value.field == f"data.{name}"
