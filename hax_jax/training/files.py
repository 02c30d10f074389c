"""Files that are either old or new, never torn, also when the machine loses power."""

import contextlib
import hashlib
import json
import os
import pathlib
from typing import Any

# The file that holds the sums of all others in its folder.
SUMS = "sha256.json"
_SUMS_VERSION = 1


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


def make_folders(path: pathlib.Path) -> None:
    """Makes a folder and what is missing above it; on return their names are on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def write_sums(folder: pathlib.Path) -> None:
    """Writes into a folder the size and SHA-256 of every file in and below it."""
    content = {"format_version": _SUMS_VERSION, "files": _sums(folder)}
    write_atomically(folder / SUMS, json.dumps(content, indent=0).encode() + b"\n")


def check_sums(folder: pathlib.Path) -> None:
    """Holds the files of a folder to what `write_sums` found there; a folder without sums passes.

    Raises:
      ValueError: one is missing, changed or has been added, or the sums themselves cannot be read.
      OSError: one cannot be read.
    """
    path = folder / SUMS
    if not path.exists():
        return
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or content.get("format_version") != _SUMS_VERSION:
        raise ValueError(f"{SUMS} is damaged or of another version")
    wanted, found = content.get("files"), _sums(folder)
    if not isinstance(wanted, dict):
        raise ValueError(f"{SUMS} is damaged")
    if wanted != found:
        names = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        raise ValueError(f"not as in {SUMS}: {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}")


def _sums(folder: pathlib.Path) -> dict[str, list[int | str]]:
    found: dict[str, list[int | str]] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = pathlib.Path(parent) / name
            relative = path.relative_to(folder).as_posix()
            if relative not in (SUMS, f".{SUMS}.new"):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                found[relative] = [path.stat().st_size, digest]
    return found


def sync_folder(folder: pathlib.Path) -> None:
    """Makes the names in a folder durable: a file's own fsync does not cover its name."""
    # Some network file systems cannot sync folders, and order these operations themselves.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
