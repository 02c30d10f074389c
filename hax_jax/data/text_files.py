"""The original's text files: one item a line, in decimal numbers; written, or only summed up."""

import contextlib
import hashlib
import pathlib
from typing import Any

import numpy as np

from hax_jax.config import DataConfig
from hax_jax.data.files import publish, temporary_for
from hax_jax.data.joint_recall import SweepLayout, text_lines

KINDS = ("inputs", "mask")


def text_name(config: DataConfig, split: str, kind: str) -> str:
    """The original's name for a text file; `kind` is 'inputs' or 'mask'."""
    sizes = f"max_n_context_{config.max_n_context}_max_n_key_{config.max_n_key}"
    return f"{sizes}_seed_{config.seed}_{split}_{kind}.txt"


class TextFile:
    """One text file, as its sweeps come in: always summed up, and written if it is given a path.

    A written file appears under its name when the context ends without an exception.
    """

    def __init__(self, name: str, path: pathlib.Path | None = None):
        self._name, self._path = name, path
        self._file: Any = None
        self._hash, self._bytes, self._lines = hashlib.sha256(), 0, 0
        self._first: dict[str, Any] = {}

    def __enter__(self) -> "TextFile":
        if self._path:
            self._file = temporary_for(self._path).open("wb")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._file and self._path:
            self._file.close()
            if error is None:
                publish(self._path)

    def add(self, text: bytes) -> None:
        """Takes the lines of the next sweep."""
        self._hash.update(text)
        self._bytes += len(text)
        self._lines += text.count(b"\n")
        if not self._first:
            self._first = {
                "sha256_of_first_sweep": self._hash.hexdigest(),
                "lines_in_first_sweep": self._lines,
            }
        if self._file:
            self._file.write(text)

    def description(self) -> dict[str, Any]:
        """Name, sha256, bytes and lines, under the names that the golden files use."""
        sums = {"sha256": self._hash.hexdigest(), "bytes": self._bytes, "lines": self._lines}
        return {"name": self._name, **sums, **self._first}


class SplitText:
    """Both text files of a split.

    Args:
      layout: the sweep's layout.
      split: the split, for the names.
      directory: where the files are written; with None they are only summed up.
    """

    def __init__(self, layout: SweepLayout, split: str, directory: pathlib.Path | None = None):
        names = [text_name(layout.config, split, kind) for kind in KINDS]
        self._files = [TextFile(name, directory / name if directory else None) for name in names]
        self._masks = text_lines(layout.score_masks().astype(np.uint8))
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "SplitText":
        for file in self._files:
            self._open.enter_context(file)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._open.__exit__(kind, error, traceback)

    def add(self, items: np.ndarray) -> None:
        """Takes the next sweep, (num_pairs, padded_length)."""
        self._files[0].add(text_lines(items))
        self._files[1].add(self._masks)

    def descriptions(self) -> dict[str, dict[str, Any]]:
        """The description of each file by its kind."""
        return {kind: file.description() for kind, file in zip(KINDS, self._files, strict=True)}
