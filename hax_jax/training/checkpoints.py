"""Checkpoints: written beside the training, read back before anything older goes.

The only importer of Orbax.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hax_jax.config import ConfigError
from hax_jax.training.errors import CheckpointError
from hax_jax.training.files import check_sums, make_folders, plain, sync_folder, write_sums
from hax_jax.training.processes import from_primary, is_primary
from hax_jax.training.workdir import FORMAT_VERSION, config_differences, settings_differences

Arrays = dict[str, np.ndarray]
# Part of the name of what is being written, which Orbax chooses, and of what is being deleted.
_HALF = ".orbax-checkpoint-tmp"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A whole checkpoint: its step, its arrays by path in the tree that was saved, and its JSON part."""

    step: int
    arrays: Arrays
    meta: dict[str, Any]


class Checkpoints:
    """The newest few checkpoints of one kind in a folder.

    `save` copies the arrays to the host and returns; a thread writes them, makes them durable, reads them
    back against their SHA-256 and only then deletes what is older than the newest `keep`. Beside the sum over
    all arrays `sha256.json` has one of each file, so that damaged files never reach a decoder. A checkpoint
    that cannot be read whole is passed over for the next older one.

    Args:
      folder: where they lie, one subfolder a step; also an attribute.
      keep: how many to keep, the one just written included.
      say: prints a line.
      writer: the thread, from `writer_thread`. Kinds that share it are written in the order of their saves,
        so that a checkpoint never names a best one that is not there yet. None: for reading only.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        keep: int,
        say: Callable[[str], None],
        writer: concurrent.futures.Executor | None = None,
    ):
        self.folder, self._keep, self._say, self._writer = folder.absolute(), keep, say, writer
        self._lazy_orbax: ocp.Checkpointer | None = None
        self._pending: concurrent.futures.Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints, whole or not, oldest first."""
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if name.isascii() and name.isdecimal())

    def save(self, step: int, tree: Any, meta: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint; the arrays of `tree` may be donated as soon as this returns.

        If the one before it is still being written this waits. If that failed (a full disk) it says so and
        the run goes on: what was there before is still there.
        """
        if not is_primary():
            return
        try:
            self._finish()
        except CheckpointError as error:
            self._say(str(error))
        arrays = host_arrays(tree)
        meta = {"format_version": FORMAT_VERSION, "step": step, **plain(dict(meta))}
        meta["sha256"] = _digest(arrays, meta)
        if self._writer is None:
            raise ValueError("`writer` must be a thread to save checkpoints, got None; see `writer_thread`")
        self._pending = self._writer.submit(self._write, step, arrays, meta)

    def wait(self) -> None:
        """Returns when the last checkpoint saved is whole and on the disk, in every process.

        Raises:
          CheckpointError: it could not be written; in every process, so that none waits for another.
        """
        error = None
        try:
            self._finish()
        except CheckpointError as found:
            error = found
        if from_primary(int(error is not None)):
            raise error or CheckpointError(
                f"The first process could not write a checkpoint to {self.folder}."
            )

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as error:
            raise CheckpointError(
                f"A checkpoint could not be written to {self.folder} ({_brief(error)}). Those of the steps "
                f"{self.steps()} are untouched there; make room on the disk."
            ) from error

    def close(self) -> None:
        """Frees what Orbax holds; to be called when the writer thread has ended."""
        if self._lazy_orbax is not None:
            self._lazy_orbax.close()

    def read(self, step: int) -> Restored:
        """Reads one checkpoint.

        Raises:
          CheckpointError: it is damaged or incomplete.
        """
        try:
            check_sums(self.folder / str(step))
            stored = self._orbax().restore(
                self.folder / str(step),
                args=ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()),
            )
            arrays = dict(_flat(stored["state"]))
            meta = dict(stored["meta"])
            if meta.pop("sha256") != _digest(arrays, meta):
                raise ValueError("its content does not match its SHA-256")
        # What damage raises depends on the file that is damaged, from KeyError to tensorstore's own.
        except Exception as error:
            raise CheckpointError(f"{self.folder / str(step)} is damaged ({_brief(error)})") from error
        return Restored(step, arrays, meta)

    def newest(self, *, at_most: int | None = None) -> Restored | None:
        """The newest whole checkpoint, or None; says so where a newer one had to be passed over.

        Of several processes the first decides which one it is, and all read it.
        """
        restored = self._newest(at_most) if is_primary() else None
        step = from_primary(-1 if restored is None else restored.step)
        return restored if is_primary() or step < 0 else self.read(step)

    def _newest(self, at_most: int | None) -> Restored | None:
        for step in reversed(self.steps()):
            if at_most is None or step <= at_most:
                try:
                    return self.read(step)
                except CheckpointError as error:
                    self._say(f"{error}; going back to the one before it")
        return None

    def set_aside_after(self, step: int) -> None:
        """Moves checkpoints newer than `step` out of the way, to `set_aside/`; nothing is deleted."""
        for other in self.steps() if is_primary() else ():
            if other > step:
                self._set_aside(other)

    def _write(self, step: int, arrays: Arrays, meta: dict[str, Any]) -> None:
        orbax = self._orbax()
        if step in self.steps():
            # A resumed run comes by the same step again. With the same bits there is nothing to write.
            try:
                if _same_arrays(self.read(step), arrays):
                    return
            except CheckpointError:
                pass
            self._set_aside(step)
        state = ocp.args.StandardSave(_nested(arrays))
        args = ocp.args.Composite(state=state, meta=ocp.args.JsonSave(meta))
        orbax.save(self.folder / str(step), args=args)
        write_sums(self.folder / str(step))
        _make_durable(self.folder / str(step))
        self.read(step)
        older = [other for other in self.steps() if other < step]
        for other in older[: max(len(older) - self._keep + 1, 0)]:
            # Under another name first, so that what is half deleted is no checkpoint.
            going = (self.folder / str(other)).rename(self.folder / f"{other}{_HALF}-deleted")
            shutil.rmtree(going)

    def _set_aside(self, step: int) -> None:
        target = self.folder.parent / "set_aside"
        target.mkdir(exist_ok=True)
        number = 0
        while (path := target / f"{self.folder.name}-{step}-{number}").exists():
            number += 1
        (self.folder / str(step)).rename(path)

    def _orbax(self) -> ocp.Checkpointer:
        # Not Orbax's manager of a folder: it fails as a whole where one checkpoint's metadata is damaged.
        if self._lazy_orbax is None:
            if self._writer is not None and is_primary():
                make_folders(self.folder)
                # What a run that was killed left half-written; a reader must not touch a running one's.
                for path in self.folder.glob(f"*{_HALF}*"):
                    shutil.rmtree(path)
            alone = _alone()
            handler = ocp.CompositeCheckpointHandler(
                state=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
                meta=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
                composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
            )
            self._lazy_orbax = ocp.Checkpointer(handler, multiprocessing_options=alone)
        return self._lazy_orbax


def _alone() -> ocp.options.MultiprocessingOptions:
    """Orbax waits for no other process: the first one writes by itself, and each reads by itself."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    mine = jax.process_index()
    return ocp.options.MultiprocessingOptions(mine, {mine}, f"process{mine}")


def writer_thread() -> concurrent.futures.ThreadPoolExecutor:
    """The thread that writes checkpoints; leaving its `with` block waits for what is being written."""
    return concurrent.futures.ThreadPoolExecutor(1, "checkpoints")


def check_matches(restored: Restored, experiment: dict[str, Any], like: Any, folder: pathlib.Path) -> None:
    """Refuses a checkpoint that is not of this experiment and model, naming every field that differs.

    Args:
      restored: the checkpoint.
      experiment: the settings of the run as nested dicts.
      like: a tree of arrays or shapes that the checkpoint has to fill; of the checkpoint only the top-level
        groups that `like` has are compared.
      folder: where it was read, for the message.

    Raises:
      ConfigError: they differ.
    """
    version = restored.meta.get("format_version")
    problem = f"format_version={version!r} (here {FORMAT_VERSION})" if version != FORMAT_VERSION else ""
    problem = problem or settings_differences(restored.meta.get("experiment", {}), experiment)
    if not problem:
        wanted = _shapes(dict(_with_paths(jax.eval_shape(_key_data, like))))
        groups = {name.split("/")[0] for name in wanted}
        stored = {
            name: shape for name, shape in _shapes(restored.arrays).items() if name.split("/")[0] in groups
        }
        problem = config_differences(stored, wanted)
    if problem:
        raise ConfigError(
            "workdir",
            "a folder whose checkpoints are of this run",
            str(folder),
            f"step {restored.step} there was saved with {problem}; choose another folder",
        )


def fill(like: Any, arrays: Arrays, put: Callable[[Any], Any]) -> Any:
    """The tree `like` (arrays or shapes) with the checkpoint's arrays, sent to the devices by `put`."""
    leaves, treedef = jax.tree.flatten(like)
    names = [name for name, _ in _with_paths(like)]
    filled = put([arrays[name] for name in names])
    for index, leaf in enumerate(leaves):
        if _is_key(leaf):
            filled[index] = jax.random.wrap_key_data(filled[index], impl=_key_impl(leaf))
    return jax.tree.unflatten(treedef, filled)


def host_arrays(tree: Any) -> Arrays:
    """Copies a tree of device arrays to the host, by path; PRNG keys as their data."""
    arrays = jax.device_get(dict(_with_paths(_key_data(tree))))
    # On a CPU device_get may give a view of memory that the next step reuses.
    return {name: np.array(array, copy=True) for name, array in arrays.items()}


def _key_data(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    """The generator of a PRNG key, or of the shape of one, which only a trace can ask."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _with_paths(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _shapes(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()}


def _nested(arrays: Arrays) -> dict[str, Any]:
    """Paths as nested dicts, the form in which other programs expect a checkpoint."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", np.asarray(value)


def _digest(arrays: Arrays, meta: Mapping[str, Any]) -> str:
    """SHA-256 of everything that is stored, independent of how."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True, allow_nan=False).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _same_arrays(stored: Restored, arrays: Arrays) -> bool:
    return _digest(stored.arrays, {}) == _digest(arrays, {})


def _make_durable(folder: pathlib.Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with (pathlib.Path(parent) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(pathlib.Path(parent))
    sync_folder(folder.parent)
    # The folder of all checkpoints may be new too.
    sync_folder(folder.parent.parent)


def _brief(error: BaseException) -> str:
    """The first line of an error, short enough for a line of a log."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first if len(first) <= 200 else first[:197] + "..."
