"""Trials of damage: checkpoints are spoilt in every way a disk knows, or cannot be written, and then read.

Each trial works on a copy of a folder with three checkpoints, in this process. What comes back has to be,
bit for bit, what was saved for its step; no older than the newest checkpoint that was left alone; said where
a newer one was passed over; and reading must change nothing.
"""

import contextlib
import errno
import os
import pathlib
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hax_jax.training.checkpoints import Checkpoints, host_arrays, writer_thread
from hax_jax.training.errors import CheckpointError
from tests.faults.runs import digest_of
from tests.faults.tally import Tally, memory

STEPS = (10, 20, 30)
_NEXT = 40
_SECTOR = 512


def tree(step: int) -> dict[str, Any]:
    """A small state with every kind of leaf."""
    rng = np.random.default_rng(step)
    return {
        "params": {
            "layers.0.kernel": jnp.asarray(rng.normal(size=(16, 24)), jnp.float32),
            "layers.0.bias": jnp.asarray(rng.normal(size=24), jnp.bfloat16),
        },
        "step": jnp.int32(step),
        "key": jax.random.key(step),
    }


def meta(step: int) -> dict[str, Any]:
    """What is stored beside it."""
    return {"data": {"next": step}, "best": {"step": step - 5, "accuracy": 0.5}, "last_valid": step}


def digest(step: int) -> str:
    """What a whole checkpoint of this step has to have."""
    return digest_of(host_arrays(tree(step)), meta(step))


# Each takes a file of the newest checkpoint and the generator.
def _flip(path: pathlib.Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    for _ in range(generator.choice((1, 1, 2, 8, 64))):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def _truncate(path: pathlib.Path, generator: random.Random) -> None:
    os.truncate(path, generator.randrange(path.stat().st_size + 1))


def _lengthen(path: pathlib.Path, generator: random.Random) -> None:
    with path.open("ab") as file:
        file.write(generator.randbytes(generator.choice((1, 7, _SECTOR))))


def _lose_sector(path: pathlib.Path, generator: random.Random) -> None:
    """A sector of zeros, or of another file's bytes."""
    content = bytearray(path.read_bytes())
    begin = generator.randrange(len(content) // _SECTOR + 1) * _SECTOR
    size = len(content[begin : begin + _SECTOR])
    content[begin : begin + size] = bytes(size) if generator.random() < 0.5 else generator.randbytes(size)
    path.write_bytes(content)


def _remove(path: pathlib.Path, generator: random.Random) -> None:
    path.unlink()


def _empty(path: pathlib.Path, generator: random.Random) -> None:
    path.write_bytes(b"")


def _older_content(path: pathlib.Path, generator: random.Random) -> None:
    """The file of the same name of an older checkpoint: whole, but not of this one."""
    step = next(part for part in reversed(path.parts) if part in map(str, STEPS))
    index = len(path.parts) - 1 - path.parts[::-1].index(step)
    other = pathlib.Path(*path.parts[:index], str(generator.choice(STEPS)), *path.parts[index + 1 :])
    if other.is_file() and other != path:
        path.write_bytes(other.read_bytes())


def _folder_instead(path: pathlib.Path, generator: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: pathlib.Path, generator: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _remove_folder(path: pathlib.Path, generator: random.Random) -> None:
    shutil.rmtree(path.parent)


OF_FILES: dict[str, Callable[[pathlib.Path, random.Random], None]] = {
    "byte flips": _flip,
    "truncated": _truncate,
    "lengthened": _lengthen,
    "lost sector": _lose_sector,
    "file missing": _remove,
    "file empty": _empty,
    "file of an older checkpoint": _older_content,
    "folder instead of a file": _folder_instead,
    "dangling link": _dangling,
    "folder missing": _remove_folder,
}
# How often each kind of trial is drawn: the first ones are the likely ones.
_WEIGHTS = {"byte flips": 40, "truncated": 20, "lost sector": 10, "file missing": 8}
OF_SAVING = ("full disk", "error of the disk")
_SAVING_SHARE = 0.06


def try_damage(trials: int, seed: int, seconds: float) -> Tally:
    """Damages checkpoints until so many trials are done or so many seconds have passed."""
    tally, generator, begin = Tally(), random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(dir=memory()) as temporary:
        folder = pathlib.Path(temporary)
        _template(folder / "template")
        while tally.trials < trials and time.monotonic() - begin < seconds:
            shutil.rmtree(folder / "trial", ignore_errors=True)
            shutil.copytree(folder / "template", folder / "trial")
            saving = generator.random() < _SAVING_SHARE
            kind = generator.choice(OF_SAVING) if saving else _choose(generator)
            state = generator.getstate()
            attempt = _try_saving if saving else _try_reading
            try:
                problems = list(attempt(folder / "trial" / "checkpoints", kind, generator))
            except Exception as error:
                problems = [f"raised {error!r}"[:500]]
            tally.add(kind, [f"{problem} ({kind})" for problem in problems], {"state": hash(state)})
    return tally


def _template(folder: pathlib.Path) -> None:
    with writer_thread() as thread:
        checkpoints = Checkpoints(folder / "checkpoints", 3, print, thread)
        for step in STEPS:
            checkpoints.save(step, tree(step), meta(step))
        checkpoints.wait()
    checkpoints.close()


def _choose(generator: random.Random) -> str:
    kinds = list(OF_FILES)
    return generator.choices(kinds, [_WEIGHTS.get(kind, 4) for kind in kinds])[0]


def _try_reading(folder: pathlib.Path, kind: str, generator: random.Random) -> Iterator[str]:
    before = contents(folder)
    for step in STEPS[-generator.choice((1, 1, 1, 2, 3)) :]:
        for _ in range(generator.choice((1, 1, 1, 2, 3))):
            files = sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())
            if files:
                OF_FILES[kind](generator.choice(files), generator)
    damaged = contents(folder)
    untouched = [step for step in STEPS if _part(before, step) == _part(damaged, step)]
    said: list[str] = []
    checkpoints = Checkpoints(folder, 3, said.append)
    restored = checkpoints.newest()
    checkpoints.close()
    if contents(folder) != damaged:
        yield "reading changed the folder"
    if restored is None:
        if untouched:
            yield f"nothing was found, though {untouched} were left alone"
        return
    if digest_of(restored.arrays, restored.meta) != digest(restored.step):
        yield f"step {restored.step} came back with other bits"
    if untouched and restored.step < untouched[-1]:
        yield f"step {restored.step} was used, though {untouched[-1]} was left alone"
    for step in STEPS:
        # A folder that is gone altogether leaves nothing to speak of.
        there = (folder / str(step)).is_dir()
        if step > restored.step and there and not any(f"{folder / str(step)} is damaged" in x for x in said):
            yield f"step {step} was passed over without a word: {said}"


def _try_saving(folder: pathlib.Path, kind: str, generator: random.Random) -> Iterator[str]:
    """A save on a disk that fails: the old ones stay, it is said, and the next save goes well."""
    before = contents(folder)
    said: list[str] = []
    with writer_thread() as thread:
        checkpoints = Checkpoints(folder, 3, said.append, thread)
        checkpoints.steps()
        fails = _full_disk(generator) if kind == "full disk" else _failing_call(generator)
        failed = False
        with fails:
            checkpoints.save(_NEXT, tree(_NEXT), meta(_NEXT))
            try:
                checkpoints.wait()
            except CheckpointError as error:
                failed = True
                if "untouched" not in str(error):
                    yield f"the error does not say what is safe: {error}"
        if failed:
            yield from (f"{step} is no longer whole" for step in STEPS if not _is_whole(checkpoints, step))
            if any(_part(before, step) != _part(contents(folder), step) for step in STEPS):
                yield "an older checkpoint was touched"
        newest = checkpoints.newest()
        wanted = (STEPS[-1], _NEXT) if failed else (_NEXT,)
        if newest is None or newest.step not in wanted or not _is_right(newest):
            yield f"the newest is {newest and newest.step}"
        checkpoints.save(_NEXT + 10, tree(_NEXT + 10), meta(_NEXT + 10))
        try:
            checkpoints.wait()
        except CheckpointError as error:
            yield f"the next save failed too: {error}"
        newest = checkpoints.newest()
        if newest is None or newest.step != _NEXT + 10 or not _is_right(newest):
            yield f"after the next save the newest is {newest and newest.step}"
    checkpoints.close()


@contextlib.contextmanager
def _full_disk(generator: random.Random) -> Iterator[None]:
    """No file may grow beyond a few bytes, in C++ neither: a limit of the kernel stands for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (generator.choice((0, 1, 16, 100, 400, 1_000, 2_000)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def _failing_call(generator: random.Random) -> Iterator[None]:
    """The n-th call of one function of the operating system, and all after it, say that the disk failed."""
    name = generator.choice(("fsync", "rename", "replace", "mkdir"))
    code = generator.choice((errno.ENOSPC, errno.EIO, errno.EDQUOT))
    left = generator.randrange(25 if name == "fsync" else 4)
    original = getattr(os, name)

    def failing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(code, os.strerror(code))
        return original(*arguments, **keywords)

    setattr(os, name, failing)
    try:
        yield
    finally:
        setattr(os, name, original)


def _is_whole(checkpoints: Checkpoints, step: int) -> bool:
    with contextlib.suppress(CheckpointError):
        return _is_right(checkpoints.read(step))
    return False


def _is_right(restored: Any) -> bool:
    return digest_of(restored.arrays, restored.meta) == digest(restored.step)


def contents(folder: pathlib.Path) -> dict[str, bytes | str]:
    """Everything in a folder by its path: files with their bytes, links with their aim."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
    return found


def _part(found: dict[str, bytes | str], step: int) -> dict[str, bytes | str]:
    return {name: content for name, content in found.items() if name.split("/")[0] == str(step)}
