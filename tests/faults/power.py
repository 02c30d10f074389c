"""Trials of a pulled plug: what a disk may hold after it, made up from what was really asked to be durable.

A killed process leaves everything that it has written; a machine without power does not. While a run
trains, `Disk` notes which bytes and which names have been fsynced. At random moments it makes up a state that
a disk may be left in: files that were not synced are old, new, torn, cut short, or have lost sectors; names
that were created, renamed or deleted since their folder was synced are there or not, each for itself. In
every such state the run has to go on with nothing lost that it had counted on, and where it says that it has
finished all has to be there. Some states are trained to their end, after the run.
"""

import contextlib
import os
import pathlib
import random
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from hax_jax.training import checkpoints, metrics
from hax_jax.training.workdir import RunFolder
from tests.faults.forms import FORMS
from tests.faults.runs import KINDS, Undisturbed, lines_of, whole
from tests.faults.session import CALLS, Recorder
from tests.faults.tally import Tally, memory

# What a disk writes as a whole.
_SECTOR = 512
# The share of moments of which a state is made up, and of states from which the run is trained to its end.
_MOMENTS = 0.06
_TRAINED = 0.02

Entries = dict[str, int]


class Disk:
    """Follows what is on the disk below a folder, and what is only on its way there.

    Args:
      root: the folder, which is on the disk when this begins, empty.
    """

    def __init__(self, root: pathlib.Path):
        self._root = str(root)
        self._synced_files: dict[int, bytes] = {}
        self._synced_folders: dict[int, Entries] = {}

    def synced(self, descriptor: int) -> None:
        """Notes an fsync that has been asked for."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path == self._root or path.startswith(self._root + "/"):
            status = os.fstat(descriptor)
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISDIR(status.st_mode):
                    self._synced_folders[status.st_ino] = _entries(path)
                else:
                    self._synced_files[status.st_ino] = pathlib.Path(path).read_bytes()

    def state(self, generator: random.Random) -> "State":
        """One of the states that the disk may be in, were the power to go now."""
        files: dict[int, bytes] = {}
        folders: dict[int, Entries] = {}
        _read(self._root, files, folders)
        known = {**self._synced_folders, **folders}
        return State(os.stat(self._root).st_ino, self, files, folders, set(known), generator)


class State:
    """A tree of names and contents, each as synced or as written last, or something between."""

    def __init__(
        self,
        root: int,
        disk: Disk,
        files: dict[int, bytes],
        folders: dict[int, Entries],
        known_folders: set[int],
        generator: random.Random,
    ):
        self._files = disk._synced_files.copy(), files
        self._folders = disk._synced_folders.copy(), folders
        self._root, self._known, self._generator = root, known_folders, generator

    def write(self, path: pathlib.Path) -> None:
        """Makes the folder `path` with what the disk holds."""
        self._write_folder(self._root, path)

    def _write_folder(self, inode: int, path: pathlib.Path) -> None:
        path.mkdir()
        old, new = (folders.get(inode, {}) for folders in self._folders)
        # A file system that orders its changes keeps all or none; one that does not keeps any.
        whole_side = self._generator.choice((None, None, old, new))
        for name in sorted({*old, *new}):
            sides = (old, new) if whole_side is None else (whole_side,)
            inode = self._generator.choice(sides).get(name)
            if inode is None:
                continue
            if inode in self._known:
                self._write_folder(inode, path / name)
            else:
                (path / name).write_bytes(self._content(inode))

    def _content(self, inode: int) -> bytes:
        old, new = (files.get(inode) for files in self._files)
        if new is None or old == new:
            return old or b""
        old = old or b""
        kind = self._generator.choice(("old", "new", "cut", "sectors", "sectors"))
        if kind in ("old", "new"):
            return old if kind == "old" else new
        size = self._generator.randrange(len(new) + 1)
        if kind == "cut":
            return new[: max(size, _common(old, new))]
        return b"".join(
            self._sector(old[i : i + _SECTOR], new[i : i + _SECTOR]) for i in range(0, len(new), _SECTOR)
        )

    def _sector(self, old: bytes, new: bytes) -> bytes:
        if old == new:
            return new
        # Of a sector that grew, what was there stays; the rest has come or is zero.
        kept = _common(old, new)
        return self._generator.choice((new, new[:kept] + bytes(len(new) - kept)))


def _common(a: bytes, b: bytes) -> int:
    """The length of what two contents begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _entries(path: str) -> Entries:
    with os.scandir(path) as found:
        return {entry.name: entry.inode() for entry in found}


def _read(path: str, files: dict[int, bytes], folders: dict[int, Entries]) -> None:
    """What is there now; a file that goes away meanwhile is left out."""
    with contextlib.suppress(FileNotFoundError):
        folders[os.stat(path).st_ino] = _entries(path)
        for name, inode in _entries(path).items():
            with contextlib.suppress(FileNotFoundError):
                below = f"{path}/{name}"
                if os.path.isdir(below):
                    _read(below, files, folders)
                else:
                    files[inode] = pathlib.Path(below).read_bytes()


class Outages:
    """Takes states of the disk at random moments of a run, and looks at each.

    Args:
      root: an empty folder in which the run's folder will be made.
      look: from a folder with a state, and the newest checkpoints that were complete before, to problems.
      generator: draws states.
      moment: whether to make up a state now.
      tally: counts them.
    """

    def __init__(
        self,
        root: pathlib.Path,
        look: Callable[[pathlib.Path, dict[str, int]], Iterator[str]],
        generator: random.Random,
        moment: Callable[[], bool],
        tally: Tally,
    ):
        self._root, self._disk, self._look = root, Disk(root), look
        self._generator, self._moment, self._tally = generator, moment, tally
        self._complete: dict[str, int] = {}
        self._busy = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it the calls that change the disk are followed."""
        with contextlib.ExitStack() as stack:
            for name in CALLS:
                stack.callback(setattr, os, name, getattr(os, name))
                setattr(os, name, self._followed(name, getattr(os, name)))
            write = checkpoints.Checkpoints._write
            stack.callback(setattr, checkpoints.Checkpoints, "_write", write)

            def noted(kept, step, arrays, meta):
                write(kept, step, arrays, meta)
                if kept.folder.is_relative_to(self._root):
                    place = kept.folder.relative_to(self._root / "run")
                    member = "/".join(place.parts[:-1])
                    self._complete[f"{member}/{place.name}"] = step

            checkpoints.Checkpoints._write = noted
            yield

    def _followed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def followed(*arguments: Any, **keywords: Any) -> Any:
            self._maybe_out(name)
            result = function(*arguments, **keywords)
            if name == "fsync":
                self._disk.synced(arguments[0])
            self._maybe_out(name)
            return result

        return followed

    def _maybe_out(self, name: str) -> None:
        # What looks at a state calls these functions too.
        if self._busy or not self._moment():
            return
        self._busy = True
        try:
            complete = self._complete.copy()
            with tempfile.TemporaryDirectory(dir=memory()) as temporary:
                folder = pathlib.Path(temporary) / "state"
                self._disk.state(self._generator).write(folder)
                # The run must not see what goes wrong here: it would take it for an error of the disk.
                problems = problems_of(lambda: self._look(folder / "run", complete.copy()))
            self._tally.add(f"at {name}", problems, {"complete": complete})
        finally:
            self._busy = False


def try_power(form: str, trials: int, seed: int, seconds: float, moments: float = _MOMENTS) -> Tally:
    """Trains runs of a form until so many states have been looked at or so many seconds have passed."""
    tally, generator, begin = Tally(), random.Random(f"{form} {seed}"), time.monotonic()
    is_over = lambda: tally.trials >= trials or time.monotonic() - begin > seconds  # noqa: E731
    with tempfile.TemporaryDirectory(dir=memory()) as temporary:
        folder = pathlib.Path(temporary)
        reference, experiment = undisturbed(form, folder)

        kept: list[tuple[pathlib.Path, dict[str, int]]] = []

        def look(state: pathlib.Path, complete: dict[str, int]) -> Iterator[str]:
            if generator.random() < _TRAINED:
                # With the folder around it: the run's own may not have come to the disk.
                copy = shutil.copytree(state.parent, folder / f"state_{len(kept)}")
                kept.append((copy / state.name, complete.copy()))
            if (state / "result.json").exists():
                tally.of_kind["finished"] += 1
            yield from _wrong_in(state, complete, reference, experiment)

        def wrong_when_trained(state: pathlib.Path) -> Iterator[str]:
            FORMS[form].train(state)
            yield from reference.wrong_at_end(state)

        while not is_over():
            root = pathlib.Path(tempfile.mkdtemp(dir=folder))
            moment = lambda: not is_over() and generator.random() < moments  # noqa: E731
            with Outages(root, look, generator, moment, tally).watching():
                FORMS[form].train(root / "run")
            tally.of_kind["runs"] += 1
        # Not while another run of this process is writing: Orbax counts what a process writes.
        for state, complete in kept:
            problems = problems_of(lambda state=state: wrong_when_trained(state))
            tally.note("trained to the end", problems, {"complete": complete})
    return tally


def problems_of(look: Callable[[], Iterator[str]]) -> list[str]:
    """What a look at a folder finds; that it cannot be looked at is a problem too."""
    problems = []
    try:
        problems.extend(look())
    except Exception as error:
        problems.append(f"looking at it failed: {error!r}")
    return problems


def undisturbed(form: str, folder: pathlib.Path) -> tuple[Undisturbed, Any]:
    """Trains a form in this process; returns its record, and how it opened its folder."""
    recorder, experiments = Recorder(), []
    save, opened = checkpoints.Checkpoints.save, RunFolder.__init__

    def recorded_save(self, step, tree, meta):
        recorder.saw(self, step, tree, meta)
        save(self, step, tree, meta)

    def recorded_init(self, *arguments, **keywords):
        experiments.append((arguments, keywords))
        opened(self, *arguments, **keywords)

    checkpoints.Checkpoints.save, RunFolder.__init__ = recorded_save, recorded_init
    try:
        FORMS[form].train(folder / "whole")
    finally:
        checkpoints.Checkpoints.save, RunFolder.__init__ = save, opened
    record = {"digests": recorder.digests}
    return Undisturbed(folder / "whole", record, FORMS[form].members), experiments[0]


def _wrong_in(
    folder: pathlib.Path, complete: dict[str, int], reference: Undisturbed, opening: Any
) -> Iterator[str]:
    """What is wrong with a run's folder after an outage."""
    found = {f"/{kind}": whole(folder / kind) for kind in KINDS}
    yield from reference.wrong_after_kill(folder, complete, found)
    (_, *arguments), keywords = opening
    has_finished = False
    try:
        with RunFolder(folder, *arguments, **keywords) as opened:
            has_finished = opened.result() is not None
    except Exception as error:
        yield f"the folder is refused: {error!r}"
    if has_finished:
        # Such a run is not opened again: what it lacks stays lacking.
        yield from reference.wrong_at_end(folder)
        return
    if not found["/checkpoints"]:
        return
    newest = found["/checkpoints"][max(found["/checkpoints"])]
    # The checkpoints of a population hold the best arrays of its members themselves.
    best = None if isinstance(newest.meta["best"], list) else newest.meta["best"]["step"]
    if best is not None and best not in found["/best"]:
        yield f"step {newest.step} names {best} as the best, which is not whole"
    last = {"train": newest.step, "valid": newest.meta["last_valid"]}
    metrics.MetricsWriter(folder, newest.step, newest.meta["last_valid"]).close()
    if lines_of(folder) != lines_of(reference.folder, last):
        yield f"lines of metrics before step {newest.step} are gone"
