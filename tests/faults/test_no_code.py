"""Loading a checkpoint, a data set, golden arrays or weights never executes code that lies in them."""

import os
import pathlib
import pickle
import shutil
import sys

import numpy as np
import pytest

from hax_jax.data import DatasetError, reader
from hax_jax.interop.files import WeightsError, read_weights
from hax_jax.interop.golden import files as golden_files
from hax_jax.training.checkpoints import Checkpoints, writer_thread
from tests.data.making import make
from tests.faults.damage import meta, tree

# What Python says of itself when data becomes code; imports of modules that are there are not among it.
_EVENTS = ("pickle.find_class", "exec", "compile", "os.system", "os.exec", "subprocess.Popen", "code.__new__")
_seen: list[str] = []
_listening = False


def _hook(event, arguments):
    if not _listening or event not in _EVENTS:
        return
    # Where a library prints a traceback, Python parses the lines of its own source that stand in it.
    parsed_alone = event == "compile" and arguments[1] == "<unknown>"
    if not parsed_alone:
        _seen.append(event)


sys.addaudithook(_hook)


class _Hostile:
    """Unpickled it would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def hostile(tmp_path):
    """Bytes that make the folder tmp_path/executed where something unpickles them."""
    yield pickle.dumps(_Hostile(tmp_path / "executed"))
    assert not (tmp_path / "executed").exists()


def events_of(function, *arguments, **keywords):
    """What was executed during a call, and what it returned or raised."""
    global _listening
    _seen.clear()
    _listening = True
    try:
        result = function(*arguments, **keywords)
    except Exception as error:
        result = error
    finally:
        _listening = False
    return list(_seen), result


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoint_with_hostile_files(tmp_path, hostile):
    with writer_thread() as thread:
        checkpoints = Checkpoints(tmp_path / "good", 3, print, thread)
        checkpoints.save(1, tree(1), meta(1))
        checkpoints.wait()
    # Modules are compiled at their first use.
    assert checkpoints.newest().step == 1
    events, restored = events_of(checkpoints.newest)
    assert events == [] and restored.step == 1
    files = sorted(path.relative_to(tmp_path / "good") for path in (tmp_path / "good" / "1").rglob("*"))
    for name in files:
        for with_sums in (True, False):
            folder = tmp_path / "bad"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tmp_path / "good", folder)
            if (folder / name).is_file():
                (folder / name).write_bytes(hostile)
            if not with_sums:
                # As if whoever changed the files had been careful.
                (folder / "1" / "sha256.json").unlink(missing_ok=True)
            events, _ = events_of(Checkpoints(folder, 3, lambda text: None).newest)
            assert events == [], name


def test_data_set_with_hostile_files(tmp_path, hostile):
    make(tmp_path / "good")

    def read(folder):
        manifest = reader.read_manifest(folder)
        return reader.StoredSplit(manifest, "train", check_sha256=False).items(np.arange(4))

    read(tmp_path / "good")
    assert events_of(read, tmp_path / "good")[0] == []
    for path in sorted((tmp_path / "good").iterdir()):
        folder = shutil.copytree(tmp_path / "good", tmp_path / f"bad_{path.name}")
        size = (folder / path.name).stat().st_size
        (folder / path.name).write_bytes(hostile.ljust(size, b"\0"))
        events, result = events_of(read, folder)
        assert events == []
        assert isinstance(result, DatasetError | np.ndarray)


def test_golden_arrays_with_objects(tmp_path, hostile):
    path = tmp_path / "A_mamba2_hax.npz"
    np.savez(path, hostile=np.array([_Hostile(tmp_path / "executed")], dtype=object))
    with np.load(path) as stored, pytest.raises(ValueError, match="allow_pickle"):
        dict(stored)
    assert "allow_pickle=True" not in pathlib.Path(golden_files.__file__).read_text()


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.safetensors"])
def test_weights_with_hostile_bytes(tmp_path, hostile, name):
    (tmp_path / name).write_bytes(hostile)
    _, result = events_of(read_weights, tmp_path / name)
    assert isinstance(result, WeightsError)
