"""Where the golden arrays of the original are found, and which of them a test run has used.

The whole set lies beside the checkout (`../shared/golden`) or wherever HAX_GOLDEN_DIR says; the copies
committed in `tests/golden` are a choice small enough for a clone alone to test with.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

SPARSE_VARIANTS = {
    "mamba": (
        "dilated",
        "hax",
        "key_selection",
        "sign_bin_lsh",
        "sliding_window",
        "sliding_window_and_dilated",
    ),
    "mamba2": (
        "dilated",
        "full",
        "hax",
        "key_selection",
        "sign_bin_lsh",
        "sliding_window",
        "sliding_window_and_sink",
    ),
}
SPARSE = tuple(f"A_{base}_{variant}.npz" for base in SPARSE_VARIANTS for variant in SPARSE_VARIANTS[base])
SPARSE_FLOAT64 = ("A_mamba_hax_float64.npz", "A_mamba2_hax_float64.npz")
SPARSE_BATCH1 = ("A_mamba2_hax_batch1_eval.npz",)
DENSE = ("B_mamba2.npz", "B_samba.npz")
DENSE_GRADIENTS = ("B_mamba2_grad.npz",)
OPERATIONS = tuple(
    f"C_{name}.npz"
    for name in (
        "causal_conv_silu",
        "ranking_loss",
        "rmsnorm",
        "rmsnorm_gated",
        "selective_scan",
        "ssd_groups1",
        "ssd_groups2",
        "window_attention",
    )
)
DATA_SETS = ("D_dataset_small.npz",)
TRAINING = ("E_train_mamba2_hax.npz",)
ALL = SPARSE + SPARSE_FLOAT64 + SPARSE_BATCH1 + DENSE + DENSE_GRADIENTS + OPERATIONS + DATA_SETS + TRAINING


def directories() -> list[pathlib.Path]:
    """The folders searched for a golden file, first match first."""
    named = os.environ.get("HAX_GOLDEN_DIR")
    folders = [pathlib.Path(named)] if named else []
    return [*folders, REPOSITORY.parent / "shared" / "golden", REPOSITORY / "tests" / "golden"]


class Golden:
    """Access to golden files by name; remembers which were used."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    def path(self, name: str) -> pathlib.Path:
        """The file called `name`. Missing, it skips the test; in CI it fails if the whole set is at hand."""
        for folder in directories():
            if (folder / name).is_file():
                self.used.add(name)
                return folder / name
        message = f"golden file {name} is in none of {', '.join(map(str, directories()))}; set HAX_GOLDEN_DIR"
        # A clone alone has only the choice in tests/golden, and has to be able to test itself with that.
        *elsewhere, _ = directories()
        whole_set = "HAX_GOLDEN_DIR" in os.environ or any(folder.is_dir() for folder in elsewhere)
        if whole_set and os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)

    def load(self, name: str) -> dict[str, np.ndarray]:
        """Every array of a file, under its name in the archive."""
        with np.load(self.path(name), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    def meta(self, name: str) -> dict[str, Any]:
        """The JSON description inside a file of group A, B, D or E."""
        with np.load(self.path(name), allow_pickle=False) as archive:
            return json.loads(str(archive["meta_json"]))
