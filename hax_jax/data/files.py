"""Files that are whole or absent, sums over them, and a report on a long pass."""

import hashlib
import os
import pathlib
import time
from collections.abc import Callable

# Receives lines of progress.
Report = Callable[[str], None]

_SECONDS_BETWEEN_REPORTS = 5.0


def sha256_of(path: pathlib.Path) -> str:
    """sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_for(path: pathlib.Path) -> pathlib.Path:
    """Where a file is written until it is complete."""
    return path.with_name(f"{path.name}.tmp")


def publish(path: pathlib.Path) -> None:
    """Gives a finished temporary file its name; after a crash the whole file has the name, or none has."""
    temporary = temporary_for(path)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes or replaces a small file in one step."""
    temporary_for(path).write_bytes(content)
    publish(path)


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Meter:
    """Says every few seconds how far a pass over many items has come."""

    def __init__(self, what: str, total: int, report: Report):
        self._what, self._total, self._report = what, total, report
        self._done, self._begin = 0, time.monotonic()
        self._said = self._begin

    def advance(self, items: int) -> None:
        """Counts items as done."""
        self._done += items
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_REPORTS:
            self._said = now
            left = (now - self._begin) * (self._total - self._done) / self._done
            self._report(f"{self._what} {self._done:,} of {self._total:,} items, about {left:.0f} s left")

    def finish(self) -> None:
        """Reports the whole pass."""
        self._report(f"{self._what} {self._total:,} items in {time.monotonic() - self._begin:.1f} s")
