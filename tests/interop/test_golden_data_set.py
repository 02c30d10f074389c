"""The check of group D of the golden files, and that it notices what is wrong with a file."""

import json
import pathlib
import re

import numpy as np
import pytest

from hax_jax.interop.golden import GoldenError, check_file

NAME = "D_dataset_small.npz"


def mismatches(path: pathlib.Path) -> dict[str, int]:
    """The number of differences of every quantity."""
    return {check.quantity: int(check.error) for check in check_file(path)}


def rewrite(arrays: dict, path: pathlib.Path, meta: dict | None = None, **changes) -> pathlib.Path:
    """Writes the arrays with some changed, or left out if None, and another description if given."""
    content = {**arrays, **changes}
    if meta is not None:
        content["meta_json"] = np.array(json.dumps(meta))
    np.savez_compressed(path, **{name: array for name, array in content.items() if array is not None})
    return path


def test_everything_in_the_golden_file_is_reproduced(golden):
    found = mismatches(golden.path(NAME))
    assert {name for name, count in found.items() if count} == set()
    arrays = {name for name in golden.load(NAME) if name != "meta_json"}
    files = golden.meta(NAME)["files"]
    sums = {f"{name} {key}" for name, described in files.items() for key in described}
    assert set(found) == arrays | sums | {"sequence_length"}
    # Six arrays, six files with three sums each, two more for the two training files.
    assert len(found) == 6 + 6 * 3 + 2 * 2 + 1


def test_differences_are_counted(golden, tmp_path):
    arrays, meta = golden.load(NAME), golden.meta(NAME)
    inputs = arrays["valid/inputs"].copy()
    inputs[3, :5] += 1
    name = "max_n_context_6_max_n_key_7_seed_3_train_mask.txt"
    meta["files"][name] |= {"sha256": "0" * 64, "lines": 17}
    meta["sequence_length"] = 7
    path = rewrite(arrays, tmp_path / "D.npz", meta, **{"valid/inputs": inputs})
    found = {key: count for key, count in mismatches(path).items() if count}
    assert found == {"valid/inputs": 5, f"{name} sha256": 1, f"{name} lines": 1, "sequence_length": 1}


def test_every_item_of_another_seed_differs(golden, tmp_path):
    arrays, meta = golden.load(NAME), golden.meta(NAME)
    meta |= {"seed": 4, "files": {}}
    found = mismatches(rewrite(arrays, tmp_path / "D.npz", meta))
    assert found["train/inputs"] > 1000
    assert found["train/mask"] == 0


def test_damaged_files_are_one_clear_error(golden, tmp_path):
    arrays, meta = golden.load(NAME), golden.meta(NAME)
    whole, path = golden.path(NAME).read_bytes(), tmp_path / "D.npz"
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(GoldenError, match=re.escape(f"{path}: must be a whole .npz archive")):
            mismatches(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    path.write_bytes(bytes(flipped))
    with pytest.raises(GoldenError):
        mismatches(path)
    with pytest.raises(GoldenError, match="no such file"):
        mismatches(tmp_path / "none.npz")
    not_a_number = arrays["test/inputs"].astype(np.float32)
    not_a_number[2, 3] = np.nan
    pickled = np.array([{"a": 1}], dtype=object)
    for changes, said in [
        ({"test/inputs": not_a_number}, "test/inputs must be finite, got NaN or infinity"),
        ({"test/inputs": arrays["test/inputs"] * 1.0}, "test/inputs is float64, a data set holds integers"),
        ({"test/inputs": arrays["test/inputs"][:-1]}, r"test/inputs has shape \(11, 182\)"),
        ({"test/mask": None}, "it has no test/mask"),
        ({"meta_json": None}, "array meta_json is missing"),
        ({"meta_json": np.array("{")}, "meta_json must be JSON"),
        ({"meta_json": np.array("[]")}, "meta_json must be an object, got list"),
        ({"extra": pickled}, "allow_pickle"),
    ]:
        with pytest.raises(GoldenError, match=said):
            mismatches(rewrite(arrays, path, **changes))
    other = {"other.txt": {"sha256": "0"}}
    for wrong, said in [
        ({"seed": None}, r"meta_json\.seed must be a whole number, got None"),
        ({"seed": 1.5}, r"meta_json\.seed must be a whole number"),
        ({"max_n_context": 4}, "meta_json does not describe a data set"),
        ({"n_value": 10**6}, "65536 token ids"),
        ({"files": {**meta["files"], **other}}, r"meta_json describes other\.txt"),
        ({"files": dict.fromkeys(meta["files"], 3)}, "is no description of a file"),
    ]:
        with pytest.raises(GoldenError, match=said):
            mismatches(rewrite(arrays, path, {**meta, **wrong}))
