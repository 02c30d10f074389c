"""The folder of a run: one run at a time, one configuration for good, and its result."""

import copy
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from hax_jax.config import ConfigError, Experiment
from hax_jax.training.environment import Session
from hax_jax.training.files import make_folders, write_json
from hax_jax.training.processes import is_primary

# Raised when an older program could no longer go on with, or read, what is stored in a workdir.
FORMAT_VERSION = 1
# Settings that say how a run is carried out, not what comes of it.
_WITHOUT_EFFECT = (("training", "steps_per_dispatch"), ("data", "keep_on_device_mib"))
# A message names no more differences than this.
_MOST_NAMED = 10


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
      stopped: 'finished', or 'interrupted' by a signal after saving.
      steps: batches taken: updates made, and those refused.
      best_step: the step of the best validation accuracy, whose checkpoint is tested; None before any.
      best_valid_accuracy: that accuracy, in [0, 1].
      test_accuracy: accuracy on the test split in [0, 1]; None unless finished.
      test_loss: cross-entropy on the test split in nats per scored position.
      test_by_size: the test split by table size: `n_context`, `n_key` (lists of sizes), `accuracy` (a row a
        context count, a column a key count) and `num_items`.
      refused_updates: batches skipped because their loss or gradient was not finite.
      test_accuracy_std: of a population, whose other numbers are means over the members that finished, the
        standard deviation between them; None for fewer than two.
      members: of a population, each member's `name`, `seed`, `learning_rate` and result, where `stopped` is
        'finished', or 'non-finite' for one that refused too many updates.
    """

    stopped: str
    steps: int
    best_step: int | None = None
    best_valid_accuracy: float | None = None
    test_accuracy: float | None = None
    test_loss: float | None = None
    test_by_size: dict[str, Any] | None = None
    refused_updates: int = 0
    test_accuracy_std: float | None = None
    members: list[dict[str, Any]] | None = None


class RunFolder:
    """A run's folder, held against other runs within a `with` block.

    Args:
      path: the folder; made if missing.
      experiment: the run that wants it.
      module: the class of the module that is trained, where it was passed to `train`.

    Raises (on entering):
      ConfigError: the path is no folder that can be written, another run is using it, or it holds a run of
        other settings; nothing in it has been changed then.
    """

    def __init__(self, path: pathlib.Path, experiment: Experiment, module: str | None = None):
        self.path = path
        self._settings: dict[str, Any] = {"module": module, "experiment": experiment.to_dict()}
        self._session = Session(path / "run.json", experiment.model if module is None else None)
        self._is_primary = is_primary()

    def __enter__(self) -> "RunFolder":
        try:
            make_folders(self.path)
            if self._is_primary:
                self._lock()
        except ConfigError:
            raise
        # A path with a null byte is a ValueError.
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", error)
            raise ConfigError(
                "workdir", "a folder that can be written", str(self.path), f"{why}; choose another"
            ) from error
        try:
            self._check()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_primary:
            self._session.end()
            # Closing releases the lock, and so does the end of the process, however it ends.
            os.close(self._descriptor)

    def claim(self) -> None:
        """Writes `config.json`, which then refuses other settings, and in `run.json` where it runs."""
        if not self._is_primary:
            return
        path = self.path / "config.json"
        if not path.exists():
            write_json(path, {"format_version": FORMAT_VERSION, **self._settings})
        self._session.begin()

    def finish(self, result: RunResult) -> None:
        """Writes `result.json`; started again, the run only reports it."""
        if self._is_primary:
            write_json(self.path / "result.json", dataclasses.asdict(result))

    def result(self) -> RunResult | None:
        """The result of a finished run."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        try:
            return RunResult(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                "workdir",
                "a folder whose result.json is readable",
                str(self.path),
                f"delete that file and run again to test the best checkpoint anew ({error})",
            ) from error

    def _lock(self) -> None:
        import fcntl

        self._descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 100, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise ConfigError(
                "workdir",
                "a folder that no other run is using",
                str(self.path),
                f"process {holder} is training in it; wait for it, end it, or choose another folder",
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)

    def _check(self) -> None:
        path = self.path / "config.json"
        if not path.exists():
            # Empty folders are made before config.json.
            if any(any(self.path.glob(name)) for name in ("checkpoints/*", "best/*", "result.json")):
                raise ConfigError(
                    "workdir",
                    "a new folder, or one of this run",
                    str(self.path),
                    "it has checkpoints or a result but no config.json to tell which run they are of",
                )
            return
        stored = read_config(self.path)
        differences = settings_differences(
            *({"module": x.get("module"), **x["experiment"]} for x in (stored, self._settings))
        )
        if differences:
            raise ConfigError(
                "workdir",
                "a new folder, or one of this same run",
                str(self.path),
                f"it holds a run with {differences}; choose another folder",
            )


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """A run's `config.json`: `experiment`, the settings as nested dicts, and `module` (see `RunFolder`).

    Raises:
      ConfigError: there is none, or it cannot be read or is of another format version.
    """
    path = workdir / "config.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            "workdir", "the folder of a run", str(workdir), "it has no config.json; give the folder of a run"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            "workdir",
            "a folder whose config.json is readable",
            str(workdir),
            f"{error}; choose another folder",
        ) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION or not isinstance(content.get("experiment"), dict):
        raise ConfigError(
            "workdir",
            f"a folder of format version {FORMAT_VERSION}",
            str(workdir),
            f"its config.json has format version {version!r}; choose another folder",
        )
    return content


def settings_differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """As `config_differences`, for the settings of an experiment as nested dicts.

    Fields that change no result may differ, and a field that is younger than the run has its default there.
    """
    defaults, here = Experiment().to_dict(), copy.deepcopy(here)
    there = copy.deepcopy(there)
    for group, wanted in [("", here), *here.items()]:
        stored, default = (settings.get(group, {}) if group else settings for settings in (there, defaults))
        if not isinstance(wanted, dict) or not isinstance(stored, dict):
            continue
        for name in list(wanted):
            if name not in stored and name in default and not isinstance(default[name], dict):
                stored[name] = default[name]
            if (group, name) in _WITHOUT_EFFECT:
                wanted[name] = stored[name]
    return config_differences(there, here)


def config_differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The fields in which what is stored differs from what is wanted, in words; empty if none."""
    parts = list(_differences(there, here, ""))
    more = f" and {len(parts) - _MOST_NAMED} more" if len(parts) > _MOST_NAMED else ""
    return ", ".join(parts[:_MOST_NAMED]) + more


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str) -> Iterator[str]:
    for name in dict.fromkeys((*here, *there)):
        old, new = there.get(name), here.get(name)
        if name not in there:
            yield f"no {prefix}{name} (here {new!r})"
        elif name not in here:
            yield f"{prefix}{name}={old!r} (here none)"
        elif isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        # 1 and 1.0 are the same setting, 1 and True are not.
        elif old != new or isinstance(old, bool) != isinstance(new, bool):
            yield f"{prefix}{name}={old!r} (here {new!r})"
