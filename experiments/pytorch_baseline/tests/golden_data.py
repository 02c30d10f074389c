"""The golden arrays of the original for this environment: the same folders as the main suite looks in."""

import json
import os
import pathlib

import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
# Where each folder counts only if the one before lacks the file.
_FOLDERS = (REPOSITORY.parent / "shared" / "golden", REPOSITORY / "tests" / "golden")


def path(name: str) -> pathlib.Path:
    """The file called `name`. Missing, it skips the test; in CI it fails if the whole set is at hand."""
    named = os.environ.get("HAX_GOLDEN_DIR")
    for folder in (*([pathlib.Path(named)] if named else []), *_FOLDERS):
        if (folder / name).is_file():
            return folder / name
    message = f"golden file {name} was not found; set HAX_GOLDEN_DIR"
    whole_set = named or _FOLDERS[0].is_dir()
    if whole_set and os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def load(name: str) -> dict[str, np.ndarray]:
    """Every array of a file, under its name in the archive."""
    with np.load(path(name), allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def meta(arrays: dict[str, np.ndarray]) -> dict:
    """The description in a file."""
    return json.loads(str(arrays["meta_json"]))
