"""What a run ran on: recorded beside it, so that its numbers can be told from those of another machine."""

import contextlib
import datetime
import importlib.metadata
import json
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from typing import Any

import jax

import hax_jax
from hax_jax.config import ModelConfig
from hax_jax.ops import dispatch
from hax_jax.training.compilation import Compilations
from hax_jax.training.files import write_json
from hax_jax.training.sharding import kernels_over, make_mesh

FORMAT_VERSION = 1
CHECKOUT = pathlib.Path(hax_jax.__file__).resolve().parents[1]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Session:
    """One process's share of a run, kept in a file that lists them all, the latest last.

    Args:
      path: the file, `run.json` of the run's folder.
      model: the run's model, or None where `train` was given a module.
    """

    def __init__(self, path: pathlib.Path, model: ModelConfig | None):
        self._path, self._model = path, model
        self._started = time.time()
        self._compilations = Compilations()
        self._sessions: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Adds this process to the file, when its first step is done; `first_step` says what that took.

        `seconds` count from the making of this object, at the beginning of `train`.
        """
        if self._sessions:
            return
        started = datetime.datetime.fromtimestamp(round(self._started), datetime.UTC)
        mine = {"started": started.isoformat(), "seconds": None, **describe()}
        mine["implementation"] = None if self._model is None else resolved_implementation(self._model)
        mine["first_step"] = {"seconds": round(time.time() - self._started, 1), **self._compilations.so_far()}
        self._sessions = [*read_sessions(self._path), mine]
        self._write()

    def end(self) -> None:
        """Notes how long it took, if it was added. One that is killed keeps null there."""
        if self._sessions:
            self._sessions[-1]["seconds"] = round(time.time() - self._started, 1)
            self._write()

    def _write(self) -> None:
        # A record of the run is not worth the run: a full disk shows where there is something to save.
        with contextlib.suppress(OSError):
            write_json(self._path, {"format_version": FORMAT_VERSION, "sessions": self._sessions})


def read_sessions(path: pathlib.Path) -> list[dict[str, Any]]:
    """The sessions that a file lists; none if there is no such file or it is unreadable."""
    try:
        content = json.loads(path.read_bytes())
        sessions = content["sessions"] if content["format_version"] == FORMAT_VERSION else []
        return [session for session in sessions if isinstance(session, dict)]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def describe() -> dict[str, Any]:
    """The command, the commit, the devices and the versions of this process."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version(), "hax_jax": hax_jax.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": shlex.join(["python", *sys.argv]),
        **commit(),
        "device": {
            "kind": device.device_kind,
            "count": jax.device_count(),
            "hosts": jax.process_count(),
            "runtime": " ".join(device.client.platform_version.split()),
        },
        "versions": versions,
        "platform": platform.platform(),
    }


def commit() -> dict[str, Any]:
    """The checkout's `commit`, and whether it has `uncommitted_changes`; both None outside a checkout."""
    unknown = {"commit": None, "uncommitted_changes": None}
    head = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
    # An installed package may lie inside somebody else's repository.
    if len(head) != 2 or pathlib.Path(head[0]).resolve() != CHECKOUT:
        return unknown
    changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": head[1], "uncommitted_changes": changed}


def git(*arguments: str) -> str:
    """What git prints in the checkout; nothing where it fails or is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def resolved_implementation(model: ModelConfig) -> str:
    """The implementation that the model's ops resolve to, each as far as it has it for the call."""
    name_of = {name: (lambda name=name: name) for name in dispatch.NAMES}
    # As in training, where a mesh of all devices is in force.
    preferred = kernels_over(make_mesh(), lambda: dispatch.best(None))()
    return dispatch.resolve("all ops", model.op_implementation, name_of, preferred)()
