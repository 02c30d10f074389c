"""The JSON of a benchmark, written after each measurement: a run that is stopped keeps what it has."""

import datetime
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Iterable
from typing import Any

from experiments.results import to_text, without_options
from hax_jax.config import ConfigError
from hax_jax.training.environment import describe
from hax_jax.training.files import plain, write_atomically

FORMAT_VERSION = 1
_DIGITS = 5


class Record:
    """One file of measurements and of the sessions (processes) that made them.

    Args:
      path: the file.
      suite: 'attention', 'scans', 'scaling' or 'step'.
      add: keep what the file holds; a measurement of the same `id` is replaced. Otherwise begin anew.
      commit: of the code, where this is not a checkout that git knows.
      note: a remark that goes with this session.
      about: devices and versions of the session, where this process is not the one that measures.

    Raises:
      ConfigError: `add` is asked for and the file is no record of this suite, or it cannot be written.
    """

    def __init__(
        self,
        path: pathlib.Path,
        suite: str,
        *,
        add: bool = False,
        commit: str | None = None,
        note: str | None = None,
        about: dict[str, Any] | None = None,
    ):
        self.path, self._begin = path, time.perf_counter()
        self.content: dict[str, Any] = (
            read(path, suite)
            if add and path.exists()
            else {
                "format_version": FORMAT_VERSION,
                "suite": suite,
                "sessions": [],
                "measurements": [],
            }
        )
        started = datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
        self.session: dict[str, Any] = {"started": started, "seconds": 0.0, **(about or describe())}
        self.session["command"] = shlex.join(["python", *without_options(sys.argv, ("--out", "--cache"))])
        if commit is not None:
            self.session |= {"commit": commit, "uncommitted_changes": None}
        if note:
            self.session["note"] = note
        self.content["sessions"].append(self.session)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            expected = "a file that can be written"
            raise ConfigError("--out", expected, str(path), str(error.strerror)) from error

    @property
    def elapsed(self) -> float:
        """Seconds since this session began."""
        return time.perf_counter() - self._begin

    def note(self, **facts: Any) -> None:
        """Adds to what is said of this session, such as `ceilings` and what was left out."""
        self.session |= _rounded(facts)
        self._write()

    def add(self, identity: str, **measured: Any) -> dict[str, Any]:
        """Adds a measurement under its `id`, in place of an older one of that id; returns it."""
        measurement = {"id": identity, "session": len(self.content["sessions"]) - 1, **_rounded(measured)}
        others = [m for m in self.content["measurements"] if m["id"] != identity]
        self.content["measurements"] = [*others, measurement]
        self._write()
        return measurement

    def _write(self) -> None:
        self.session["seconds"] = round(self.elapsed, 1)
        write_atomically(self.path, (to_text(plain(self.content)) + "\n").encode())


def read(path: pathlib.Path, suite: str) -> dict[str, Any]:
    """The content of a record; raises ConfigError if it is none of this suite."""
    try:
        content = json.loads(path.read_bytes())
        version, found = content["format_version"], content["suite"]
        whole = isinstance(content["sessions"], list) and isinstance(content["measurements"], list)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unusable(path, suite, f"{type(error).__name__}: {error}") from error
    if version != FORMAT_VERSION or found != suite or not whole:
        raise _unusable(path, suite, f"it is of format version {version!r}, suite {found!r}")
    return content


def is_wanted(identity: str, words: Iterable[str]) -> bool:
    """Whether all of the words are parts of an identity such as '1M/random/xla/forward'."""
    return set(words) <= set(identity.split("/"))


def _unusable(path: pathlib.Path, suite: str, fault: str) -> ConfigError:
    expected = f"a whole record of the suite {suite!r}, format version {FORMAT_VERSION}"
    return ConfigError("benchmark", expected, str(path), f"{' '.join(fault.split())}; measure anew")


def _rounded(value: Any) -> Any:
    """Floats cut to five digits: more is noise, and makes files of noise."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
