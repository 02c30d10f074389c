"""Group D: the original's data sets made again and compared entry by entry."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hax_jax.config import ConfigError, DataConfig
from hax_jax.data.joint_recall import SPLITS, PublishedItems, check_enough_items, token_dtype
from hax_jax.data.text_files import KINDS, SplitText
from hax_jax.interop.golden.files import Check, GoldenError, GoldenFile

# The original draws counts from 5 up and gives valid and test the same number of items.
_SMALLEST_COUNT = 5
_SETTINGS = (
    "max_n_context",
    "max_n_key",
    "n_value",
    "seed",
    "n_train_per_context_key",
    "n_test_per_context_key",
)
_SUMS = ("sha256", "bytes", "lines", "sha256_of_first_sweep", "lines_in_first_sweep")


def check_data_set(golden: GoldenFile) -> list[Check]:
    """Makes the data set of a golden file of group D from its settings and compares everything.

    Args:
      golden: a `D_*.npz` file.

    Returns:
      For each quantity of the file the number of mismatches, none allowed: entries of the arrays
      'train/inputs', 'train/mask', ...; and for every text file 'NAME sha256', 'NAME bytes', 'NAME lines' and
      so on, each 0 or 1.

    Raises:
      GoldenError: the file is truncated, lacks something, or holds what a data set cannot hold.

    Memory: the arrays of the file, and of what is made a sweep at a time.
    """
    path = golden.path
    arrays, meta = _checked(golden)
    config, sweeps = _settings(path, meta)
    items = PublishedItems(config)
    files = meta.get("files", {})
    mismatches: dict[str, int] = {}
    if "sequence_length" in meta:
        mismatches["sequence_length"] = int(meta["sequence_length"] != config.padded_length)
    for split, count in sweeps.items():
        expected = {kind: arrays[f"{split}/{kind}"] for kind in KINDS}
        shape = (count * config.num_pairs, config.padded_length)
        for kind, array in expected.items():
            if array.shape != shape:
                raise GoldenError(
                    f"{path}: {split}/{kind} has shape {array.shape}, its settings give {shape}"
                )
            mismatches[f"{split}/{kind}"] = 0
        text = SplitText(items.layout, split)
        masks = items.layout.score_masks()
        for sweep in range(count):
            rows = slice(sweep * config.num_pairs, (sweep + 1) * config.num_pairs)
            made = items.layout.pad(items.sweeps(1))[0]
            mismatches[f"{split}/inputs"] += int((made != expected["inputs"][rows]).sum())
            mismatches[f"{split}/mask"] += int((masks != expected["mask"][rows]).sum())
            text.add(made)
        mismatches |= _compare_text(path, text, files)
    unknown = [name for name in files if not any(key.startswith(f"{name} ") for key in mismatches)]
    if unknown:
        raise GoldenError(f"{path}: meta_json describes {unknown[0]}, which its settings do not give")
    return [Check(quantity, float(wrong), 0.0) for quantity, wrong in mismatches.items()]


def _compare_text(path: pathlib.Path, text: SplitText, files: Mapping[str, Any]) -> dict[str, int]:
    found = {}
    for made in text.descriptions().values():
        described = files.get(made["name"], {})
        if not isinstance(described, Mapping):
            raise GoldenError(f"{path}: meta_json.files.{made['name']} is no description of a file")
        for name in _SUMS:
            if name in described:
                found[f"{made['name']} {name}"] = int(described[name] != made.get(name))
    return found


def _checked(golden: GoldenFile) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Every array of the file, checked to be whole numbers, and its description."""
    path, arrays, meta = golden.path, dict(golden.arrays), golden.meta
    del arrays["meta_json"]
    if not isinstance(meta.get("files", {}), dict):
        raise GoldenError(f"{path}: meta_json is no description of a data set")
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.integer):
            raise GoldenError(f"{path}: {name} is {array.dtype}, a data set holds integers")
    for split in SPLITS:
        for kind in KINDS:
            if f"{split}/{kind}" not in arrays:
                raise GoldenError(f"{path}: it has no {split}/{kind}")
    return arrays, meta


def _settings(path: pathlib.Path, meta: Mapping[str, Any]) -> tuple[DataConfig, dict[str, int]]:
    """The task of the file, and the number of sweeps of each split."""
    for name in _SETTINGS:
        if type(meta.get(name)) is not int or meta[name] < 0:
            raise GoldenError(f"{path}: meta_json.{name} must be a whole number, got {meta.get(name)!r}")
    train, test = meta["n_train_per_context_key"], meta["n_test_per_context_key"]
    try:
        config = DataConfig(
            min_n_context=meta.get("min_n_context", _SMALLEST_COUNT),
            max_n_context=meta["max_n_context"],
            min_n_key=meta.get("min_n_key", _SMALLEST_COUNT),
            max_n_key=meta["max_n_key"],
            n_value=meta["n_value"],
            seed=meta["seed"],
        )
        token_dtype(config)
        check_enough_items(config, train + 2 * test)
    except ConfigError as error:
        raise GoldenError(f"{path}: meta_json does not describe a data set: {error}") from error
    return config, {"train": train, "valid": test, "test": test}
