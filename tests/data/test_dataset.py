"""Creating a data set: the original's bytes, going on after a kill, and nobody's files overwritten."""

import dataclasses
import fcntl
import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import create_dataset as command
from hax_jax.config import ConfigError, DataConfig
from hax_jax.data import DatasetError, dataset, files, joint_recall, reader, text_files
from hax_jax.data.dataset import Plan, create_dataset, verify_dataset
from tests.data.making import contents, make, plan_for, stored_items

NAME = "D_dataset_small.npz"


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of one sweep, so that a small data set has many files."""
    monkeypatch.setattr(dataset, "_SHARD_BYTES", 1)


def test_items_and_text_files_are_the_originals(golden, tmp_path):
    arrays, meta = golden.load(NAME), golden.meta(NAME)
    manifest = make(tmp_path / "new", text=True)
    for split in joint_recall.SPLITS:
        np.testing.assert_array_equal(stored_items(manifest, split), arrays[f"{split}/inputs"])
    assert {path.name for path in (tmp_path / "new").glob("*.txt")} == set(meta["files"])
    for name, described in meta["files"].items():
        content = (tmp_path / "new" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == described["sha256"]
        split, kind = name.removesuffix(".txt").split("_")[-2:]
        assert described.items() <= manifest.text[split][kind].items()
    assert verify_dataset(tmp_path / "new", report=lambda line: None) == manifest


def test_the_manifest_has_the_sums_of_text_files_that_are_not_written(golden, whole):
    files_described = golden.meta(NAME)["files"]
    manifest = reader.read_manifest(whole)
    assert not list(whole.glob("*.txt"))
    sums = {text["name"]: text["sha256"] for texts in manifest.text.values() for text in texts.values()}
    assert sums == {name: described["sha256"] for name, described in files_described.items()}


def test_evaluation_splits_alone_are_those_of_the_whole_set(whole, tmp_path):
    manifest = make(tmp_path / "eval", splits=("test", "valid"))
    assert sorted(manifest.splits) == ["test", "valid"]
    assert not list((tmp_path / "eval").glob("train*"))
    for split in ("valid", "test"):
        expected = stored_items(reader.read_manifest(whole), split)
        np.testing.assert_array_equal(stored_items(manifest, split), expected)
    with pytest.raises(DatasetError, match="it has no split 'train', only valid, test"):
        reader.StoredSplit(manifest, "train")


def test_more_than_256_tokens_are_stored_in_16_bits(tmp_path):
    manifest = make(tmp_path / "wide", n_value=400, min_n_context=1, max_n_context=1)
    published = joint_recall.PublishedItems(manifest.config)
    expected = published.layout.pad(published.sweeps(3)).reshape(-1, manifest.config.padded_length)
    items = stored_items(manifest, "train")
    assert items.dtype == np.uint16
    assert items.max() > 255
    np.testing.assert_array_equal(items, expected)


def test_the_same_call_again_changes_nothing(whole):
    before, lines = contents(whole), []
    create_dataset(plan_for(whole), report=lines.append)
    assert contents(whole) == before
    assert lines == [f"{whole} holds this data set already"]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("renamed", [False, True], ids=["before the rename", "after the rename"])
def test_killed_at_any_file_the_same_call_goes_on(renamed, tmp_path, monkeypatch, small_shards):
    make(tmp_path / "whole", text=True)
    expected = contents(tmp_path / "whole")
    publish, left = files.publish, 0

    def publish_or_die(path: pathlib.Path) -> None:
        nonlocal left
        left -= 1
        if left < 0 and not renamed:
            raise Killed
        publish(path)
        if left < 0:
            raise Killed

    for module in (files, dataset, text_files):
        monkeypatch.setattr(module, "publish", publish_or_die)
    # The claim; 7 shards, each followed by its entry in the claim; 6 text files; the manifest.
    steps = 1 + 2 * 7 + 6 + 1
    for done in range(steps):
        folder, left = tmp_path / f"killed after {done}", done
        with pytest.raises(Killed):
            make(folder, text=True)
        if (folder / reader.MANIFEST).exists():
            assert renamed
            assert done == steps - 1
        else:
            with pytest.raises(DatasetError, match="has not finished" if done or renamed else "there is no"):
                reader.read_manifest(folder)
        left = steps
        make(folder, text=True)
        assert contents(folder) == expected
    left = steps
    make(tmp_path / "never killed", text=True)
    assert left == 0


def test_finished_shards_are_kept_and_damaged_ones_written_again(tmp_path, monkeypatch, small_shards):
    folder = tmp_path / "data"
    monkeypatch.setattr(dataset, "_text_form", lambda *args, **kwargs: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        make(folder)
    monkeypatch.undo()
    monkeypatch.setattr(dataset, "_SHARD_BYTES", 1)
    shards = sorted(folder.glob("*.arrayrecord"))
    assert len(shards) == 7
    shards[2].write_bytes(shards[2].read_bytes()[:-100])
    before, lines = {path: path.stat().st_ino for path in shards}, []
    create_dataset(plan_for(folder), lines.append)
    assert lines[0] == "going on: 6 of 7 files are there already"
    assert [path for path in shards if path.stat().st_ino != before[path]] == [shards[2]]


def test_a_killed_process_leaves_no_data_set_and_the_next_one_finishes_it(tmp_path, whole):
    folder = tmp_path / "data"
    arguments = [
        sys.executable, command.__file__, f"--data_dir={folder}", "--n_train_per_pair=1500",
        "--n_eval_per_pair=2", "--max_n_context=8", "--seed=5",
    ]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("train*.arrayrecord")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(DatasetError, match=r"its creation has not finished; run `python .*` again to go on"):
        reader.read_manifest(folder)
    config = DataConfig(data_dir=str(folder), n_eval_per_pair=2, max_n_context=8, seed=5)
    resumed = create_dataset(Plan(config, 1500), report=lambda line: None)
    config = dataclasses.replace(config, data_dir=str(tmp_path / "never killed"))
    never_killed = create_dataset(Plan(config, 1500), report=lambda line: None)
    assert resumed.splits == never_killed.splits
    assert contents(folder) == contents(tmp_path / "never killed")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 4}, "it holds a data set of seed 3"),
        ({"n_train_per_pair": 4}, "it holds a data set of items_per_pair {'train': 3"),
        ({"splits": ("valid",)}, "it holds a data set of splits"),
        ({"text": True}, "without the text file max_n_context_6"),
    ],
)
def test_another_data_set_is_not_overwritten(changes, said, whole):
    before = contents(whole)
    with pytest.raises(ConfigError, match=said):
        make(whole, **changes)
    assert contents(whole) == before


def test_other_peoples_folders_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ConfigError, match="it holds other files; nothing was changed"):
        make(tmp_path / "notes")
    with pytest.raises(ConfigError, match="that is a file"):
        make(tmp_path / "notes" / "a.txt")
    assert contents(tmp_path / "notes") == {"a.txt": b"mine"}
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another process is creating a data set there"):
        make(tmp_path)
    os.close(handle)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(ConfigError, match=r"there are 0\.0 GiB; free some space"):
        make(tmp_path / "full")


def test_an_unfinished_data_set_belongs_to_its_settings(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    monkeypatch.setattr(dataset, "_text_form", lambda *args, **kwargs: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        make(folder)
    before = contents(folder)
    with pytest.raises(ConfigError, match="an unfinished data set of other settings"):
        make(folder, seed=4)
    assert contents(folder) == before
    (folder / reader.UNFINISHED).write_text("{}")
    with pytest.raises(ConfigError, match=r"unfinished\.json in it is damaged"):
        make(folder)


def test_impossible_plans_are_refused_before_anything_is_written(tmp_path):
    for changes, said in [
        ({"n_train_per_pair": 0}, "`n_train_per_pair` must be an integer >= 1, got 0"),
        ({"splits": ("train", "exam")}, "`splits` must be some of train, valid, test"),
        ({"splits": ()}, "`splits` must be some of"),
        ({"n_value": 2**16}, "65536 token ids"),
        ({"min_n_context": 1, "min_n_key": 1, "n_value": 2}, "`items_per_pair` must be at most 2, in all"),
    ]:
        with pytest.raises(ConfigError, match=said):
            make(tmp_path / "new", **changes)
        assert not (tmp_path / "new").exists()


def test_the_command_line(tmp_path, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        status = command.main(["create_dataset.py", *arguments])
        return status, *capsys.readouterr()

    folder = tmp_path / "data"
    sizes = ["--max_n_context=6", "--max_n_key=7", "--n_value=5", "--seed=3"]
    counts = ["--n_train_per_context_key=3", "--n_test_per_context_key=2"]
    status, out, err = run(f"--data_dir={folder}", *sizes, *counts, "--splits=valid,test", "--text")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == f"{folder} is complete: 12 valid items, 12 test items"
    assert len(list(folder.glob("*.txt"))) == 4
    assert run(f"--data_dir={folder}", "--verify")[0] == 0
    for arguments, said in [
        ((f"--data_dir={folder}", *sizes, *counts), "it holds a data set of splits ['test', 'valid']"),
        (("--seed=1",), "`data_dir` must be the folder of the data set"),
        ((f"--data_dir={folder}", "--seed=one"), "--seed=one"),
        ((f"--data_dir={folder}", "--sede=1"), "Unknown command line flag 'sede'"),
        ((f"--data_dir={folder}", "seed=1"), "flags only"),
        ((f"--data_dir={folder}", "--n_value=1"), "`data.n_value` must be an integer in 2.."),
        ((f"--data_dir={tmp_path / 'none'}", "--verify"), "there is no manifest.json"),
        ((f"--data_dir={tmp_path}\0",), "error: "),
    ]:
        status, out, err = run(*arguments)
        assert status == 2
        assert said in err
        assert err.count("\n") == 1
    assert run("--help")[0] == 0
