"""Small data sets for the tests of creating and of reading them."""

import dataclasses
import pathlib

import numpy as np

from hax_jax.config import DataConfig
from hax_jax.data import reader
from hax_jax.data.dataset import Plan, create_dataset

# Those of the golden file.
SETTINGS = DataConfig(max_n_context=6, max_n_key=7, n_value=5, seed=3, n_eval_per_pair=2)


def plan_for(folder: pathlib.Path, **changes) -> Plan:
    options = {name: changes.pop(name) for name in ("splits", "text", "n_train_per_pair") if name in changes}
    config = dataclasses.replace(SETTINGS, data_dir=str(folder), **changes)
    return Plan(config, **{"n_train_per_pair": 3, **options})


def make(folder: pathlib.Path, **changes) -> reader.Manifest:
    return create_dataset(plan_for(folder, **changes), report=lambda line: None)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stored_items(manifest: reader.Manifest, split: str) -> np.ndarray:
    stored = reader.StoredSplit(manifest, split)
    return stored.items(np.arange(stored.num_sweeps * manifest.config.num_pairs))
