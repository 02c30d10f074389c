"""Checkpoints: what is read is what was saved, or nothing; whole ones outlive every failure."""

import json
import os
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hax_jax.config import ConfigError
from hax_jax.training.checkpoints import Checkpoints, check_matches, fill, host_arrays, writer_thread
from hax_jax.training.errors import CheckpointError


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "layers.0.kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
            "layers.0.bias": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
        },
        "buffers": {},
        "step": jnp.int32(seed),
        "key": jax.random.key(seed),
    }


@pytest.fixture
def writer():
    with writer_thread() as thread:
        yield thread


@pytest.fixture
def said():
    return []


def saved(folder, said, writer, steps, keep=3):
    """A folder with checkpoints of these steps, all written."""
    checkpoints = Checkpoints(folder, keep, said.append, writer)
    experiment = {"seed": 1, "model": {"width": 4}}
    for step in steps:
        checkpoints.save(step, tree(step), {"experiment": experiment, "data": {"next": step}})
    checkpoints.wait()
    return checkpoints


def assert_is(restored, step):
    assert restored.step == restored.meta["step"] == restored.meta["data"]["next"] == step
    wanted = host_arrays(tree(step))
    assert restored.arrays.keys() == wanted.keys()
    for name, array in wanted.items():
        assert restored.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(restored.arrays[name], array)


def test_comes_back_bit_for_bit_and_only_the_newest_are_kept(tmp_path, said, writer):
    checkpoints = saved(tmp_path / "c", said, writer, [10, 20, 30, 40])
    assert checkpoints.steps() == [20, 30, 40]
    restored = checkpoints.newest()
    assert_is(restored, 40)
    assert_is(checkpoints.newest(at_most=39), 30)
    filled = fill(jax.eval_shape(lambda: tree(40)), restored.arrays, jax.device_put)
    assert jax.tree.structure(filled) == jax.tree.structure(tree(40))
    assert jax.random.uniform(filled["key"]) == jax.random.uniform(jax.random.key(40))
    assert filled["params"]["layers.0.bias"].dtype == jnp.bfloat16
    assert said == []


def test_saving_the_same_step_again_writes_nothing_if_the_bits_are_the_same(tmp_path, said, writer):
    checkpoints = saved(tmp_path / "c", said, writer, [10, 20])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*") if path.is_file()}
    checkpoints.save(20, tree(20), {"experiment": {}, "data": {"next": 20}})
    checkpoints.wait()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*") if path.is_file()}
    checkpoints.save(20, tree(21), {"experiment": {}, "data": {"next": 20}})
    checkpoints.wait()
    np.testing.assert_array_equal(checkpoints.read(20).arrays["step"], 21)
    assert [path.name for path in (tmp_path / "set_aside").iterdir()] == ["c-20-0"]


# A read that fails leaves Orbax an event loop that it closes too early.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty"])
def test_every_damaged_file_is_noticed_or_harmless(tmp_path, said, writer, damage):
    """Each file of a checkpoint in turn: it reads back with the same bits, or the one before it is used."""
    saved(tmp_path / "good", said, writer, [1, 2])
    whole = tmp_path / "good" / "2"
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(files) > 5
    generator = random.Random(damage)
    outcomes = []
    for file in files:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        _damage(folder / "2" / file, damage, generator)
        restored = Checkpoints(folder, 3, said.append).newest()
        assert_is(restored, restored.step)
        outcomes.append(restored.step)
    # The array data and the JSON part are among the files that matter.
    assert outcomes.count(1) >= 3
    assert all("is damaged" in line for line in said)


def test_every_file_is_summed_and_older_checkpoints_without_sums_are_read(tmp_path, said, writer):
    """Any change is noticed before Orbax sees the files; what an earlier version wrote has no sums."""
    checkpoints = saved(tmp_path / "c", said, writer, [1, 2])
    (tmp_path / "c" / "2" / "more").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"2 is damaged \(not as in sha256\.json: more\)"):
        checkpoints.read(2)
    (tmp_path / "c" / "2" / "more").unlink()
    assert_is(checkpoints.read(2), 2)
    for damaged in ("", "[]", '{"format_version": 9}', '{"format_version": 1}'):
        (tmp_path / "c" / "2" / "sha256.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="2 is damaged"):
            checkpoints.read(2)
    (tmp_path / "c" / "2" / "sha256.json").unlink()
    assert_is(checkpoints.read(2), 2)


def test_damaged_metadata_of_one_checkpoint_does_not_hide_the_others(tmp_path, said, writer):
    """Orbax's own manager of a folder raises here."""
    saved(tmp_path / "c", said, writer, [1, 2]).close()
    for step in ("1", "2"):
        path = tmp_path / "c" / step / "_CHECKPOINT_METADATA"
        path.write_text(path.read_text().replace("timestamp", "timestomp"))
        checkpoints = Checkpoints(tmp_path / "c", 3, said.append, writer)
        restored = checkpoints.newest()
        assert (restored and restored.step) == (2 if step == "1" else None)
        checkpoints.save(3, tree(3), {"experiment": {}, "data": {"next": 3}})
        checkpoints.wait()
        assert_is(checkpoints.newest(), 3)
        shutil.rmtree(tmp_path / "c" / "3")


def _damage(path: pathlib.Path, kind: str, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "empty" or not content:
        path.write_bytes(b"")
    elif kind == "truncate":
        path.write_bytes(content[: generator.randrange(len(content))])
    else:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)


def test_missing_folder_is_no_checkpoint(tmp_path, said):
    assert Checkpoints(tmp_path / "none", 3, said.append).newest() is None
    assert not (tmp_path / "none").exists()


def test_half_written_checkpoint_is_ignored(tmp_path, said, writer):
    checkpoints = saved(tmp_path / "c", said, writer, [1, 2])
    checkpoints.close()
    half = tmp_path / "c" / "2"
    (half / "commit_success.txt").unlink(missing_ok=True)
    half.rename(tmp_path / "c" / "2.orbax-checkpoint-tmp")
    assert_is(Checkpoints(tmp_path / "c", 3, said.append, writer).newest(), 1)


def test_nothing_older_goes_before_the_new_one_has_been_read_back(tmp_path, said, writer, monkeypatch):
    checkpoints = saved(tmp_path / "c", said, writer, [1, 2], keep=2)

    def broken_disk(step):
        raise CheckpointError(f"{step} cannot be read back")

    monkeypatch.setattr(checkpoints, "read", broken_disk)
    checkpoints.save(3, tree(3), {"data": {"next": 3}})
    checkpoints.save(4, tree(4), {"data": {"next": 4}})
    assert "could not be written" in said[0]
    with pytest.raises(CheckpointError, match="untouched"):
        checkpoints.wait()
    monkeypatch.undo()
    assert_is(checkpoints.newest(at_most=2), 2)
    assert_is(checkpoints.newest(at_most=1), 1)


def test_failure_to_write_is_said_and_the_next_save_works(tmp_path, said, writer, monkeypatch):
    checkpoints = saved(tmp_path / "c", said, writer, [1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        checkpoints.save(2, tree(2), {"data": {"next": 2}})
        with pytest.raises(CheckpointError, match="No space left"):
            checkpoints.wait()
    checkpoints.save(3, tree(3), {"data": {"next": 3}})
    checkpoints.wait()
    assert_is(checkpoints.newest(), 3)
    assert_is(checkpoints.newest(at_most=1), 1)


def test_checkpoint_of_other_settings_or_arrays_is_refused_by_name(tmp_path, said, writer):
    restored = saved(tmp_path / "c", said, writer, [7]).newest()
    same = {"seed": 1, "model": {"width": 4}}
    check_matches(restored, same, tree(7), tmp_path)
    with pytest.raises(ConfigError, match=r"model.width=4 \(here 5\)"):
        check_matches(restored, {"seed": 1, "model": {"width": 5}}, tree(7), tmp_path)
    other = tree(7)
    other["params"]["layers.0.kernel"] = jnp.ones((4, 4))
    other["params"]["layers.1.kernel"] = jnp.ones(2)
    with pytest.raises(ConfigError) as error:
        check_matches(restored, same, other, tmp_path)
    assert "params/layers.0.kernel='float32[4, 3]' (here 'float32[4, 4]')" in str(error.value)
    assert "no params/layers.1.kernel" in str(error.value)


def test_checkpoint_of_another_format_is_refused(tmp_path, said, writer):
    restored = saved(tmp_path / "c", said, writer, [7]).newest()
    restored.meta["format_version"] = 99
    with pytest.raises(ConfigError, match="format_version=99"):
        check_matches(restored, {}, tree(7), tmp_path)


def test_stored_settings_are_plain_json(tmp_path, said, writer):
    checkpoints = Checkpoints(tmp_path / "c", 1, said.append, writer)
    checkpoints.save(1, tree(1), {"best": {"accuracy": float("nan")}, "data": {"next": 1}})
    checkpoints.wait()
    assert checkpoints.read(1).meta["best"] == {"accuracy": None}
    assert json.loads(json.dumps(checkpoints.read(1).meta)) == checkpoints.read(1).meta
