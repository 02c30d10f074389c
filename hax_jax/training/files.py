"""Files that are either old or new, never torn, also when the machine loses power."""

import contextlib
import json
import os
import pathlib
from typing import Any


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Replaces a file's content as a whole; on return it is on the disk."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes readable JSON atomically; infinite and undefined numbers become null."""
    text = json.dumps(plain(value), indent=2, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def plain(value: Any) -> Any:
    """The value with everything that JSON lacks replaced: null for non-finite numbers, lists for tuples."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def sync_folder(folder: pathlib.Path) -> None:
    """Makes the names in a folder durable: a file's own fsync does not cover its name."""
    # Some network file systems cannot sync folders, and order these operations themselves.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
