"""Bad command lines: each is answered by one line that says what to do, and exit status 2."""

import pathlib
import subprocess
import sys

import pytest

from experiments import joint_recall
from hax_jax.config import Experiment
from hax_jax.training.workdir import RunFolder
from tests.golden_data import REPOSITORY

HAX = f"--config={REPOSITORY / 'configs' / 'mamba2_hax.py'}"
DATASET = f"{HAX} --config.data.train_source=dataset"

# Config files with something wrong in them, written into the folder of each test.
FILES = {
    "syntax.py": "def get_config(:\n",
    "null_byte.py": "\0",
    "no_get_config.py": "x = 1\n",
    "none.py": "def get_config():\n    return None\n",
    "number.py": "def get_config():\n    return 3\n",
    "name_error.py": "import os\n\n\ndef get_config():\n    return sparse\n",
    "value_error.py": "def get_config():\n    return int('x')\n",
    "exits.py": "import sys\n\nsys.exit(3)\n",
    "import_error.py": "import no_such_module\n",
    "endless.py": "def get_config():\n    return get_config()\n",
    "opens.py": "def get_config():\n    return open('no_such_file')\n",
    "unknown_field.py": "def get_config():\n    return {'model': {'spars_keys': 3}}\n",
    "unknown_group.py": "def get_config():\n    return {'modle': {}}\n",
    "not_a_group.py": "def get_config():\n    return {'model': 3}\n",
    "wrong_type.py": "def get_config():\n    return {'model': {'sparse_keys': '3'}}\n",
    "missing_value.py": "def get_config():\n    return {'model': {'sparse_keys': None}}\n",
    "partial.py": (
        "import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({'model': {}})\n"
    ),
    "a_file": "",
}

# Arguments, and what the one line has to name.
CASES = {
    # The config file.
    "nothing": ("", ["--config", "configs/mamba2_hax.py"]),
    "config without a value": ("--config", ["--config", "value"]),
    "config empty": ("--config=", ["--config"]),
    "config missing": ("--config=nope.py", ["nope.py", "no such file"]),
    "config missing, overridden": ("--config=nope.py --config.seed=3", ["nope.py", "no such file"]),
    "config nearly": (f"{HAX[:-3]}x.py", ["mamba2_haxx.py'", "did you mean", "mamba2_hax.py"]),
    "config a folder": ("--config=.", ["--config", "Python file"]),
    "config twice": (f"{HAX} {HAX}", ["--config", "once"]),
    "config after its fields": (f"--config.model.sparse_keys=3 {HAX}", ["put --config first"]),
    "argument unknown": (f"{HAX}:gpu", ["one of cpu, parity", "'gpu'"]),
    "second argument unknown": (f"{HAX}:cpu,tpu", ["one of cpu, parity", "'tpu'"]),
    "argument not taken": ("--config=none.py:cpu", ["none.py:cpu", "positional argument"]),
    "syntax error": ("--config=syntax.py", ["syntax.py", "line 1"]),
    "null byte": ("--config=null_byte.py", ["null_byte.py", "null bytes"]),
    "no get_config": ("--config=no_get_config.py", ["get_config"]),
    "config is None": ("--config=none.py", ["get_config() returned None"]),
    "config is None, overridden": ("--config=none.py --config.model.sparse_keys=3", ["none.py"]),
    "config is a number": ("--config=number.py", ["get_config() returned 3"]),
    "name error": ("--config=name_error.py", ["line 5", "'sparse' is not defined"]),
    "value error": ("--config=value_error.py", ["line 2", "invalid literal"]),
    "config exits": ("--config=exits.py", ["line 3", "SystemExit"]),
    "import error": ("--config=import_error.py", ["line 1", "no_such_module"]),
    "endless recursion": ("--config=endless.py", ["RecursionError"]),
    "config opens a missing file": ("--config=opens.py", ["line 2", "no_such_file"]),
    "file: unknown field": ("--config=unknown_field.py", ["model.spars_keys", "a known field", "num_hash"]),
    "file: unknown group": ("--config=unknown_group.py", ["modle", "a known field", "model"]),
    "file: not a group": ("--config=not_a_group.py", ["`model`", "a group of fields", "got 3"]),
    "file: wrong type": ("--config=wrong_type.py", ["model.sparse_keys", "an integer", "'3'"]),
    "file: no value": ("--config=missing_value.py", ["model.sparse_keys", "an integer", "None"]),
    "file: field not there": ("--config=partial.py --config.model.num_hash=3", ["lack a field", "num_hash"]),
    # Flags.
    "unknown flag": (f"{HAX} --foo", ["--foo", "a known flag"]),
    "unknown flag, nearly": (f"{HAX} --wrkdir=x", ["--wrkdir", "did you mean --workdir?"]),
    "field as a flag": (f"{HAX} --sparse_keys=3", ["did you mean --config.model.sparse_keys?"]),
    "a word": (f"{HAX} extra", ["'extra'", "--NAME=VALUE"]),
    "a word after --": (f"{HAX} -- extra", ["'extra'"]),
    "missing flag file": (f"{HAX} --flagfile=nope", ["--flagfile", "No such file"]),
    # Fields.
    "unknown field": (f"{HAX} --config.model.sparse_kyes=3", ["did you mean --config.model.sparse_keys?"]),
    "field of no group": (f"{HAX} --config.sparse_keys=3", ["did you mean --config.model.sparse_keys?"]),
    "unknown group": (f"{HAX} --config.optimizer.momentum=3", ["optimizer.momentum", "a known field"]),
    "a group": (f"{HAX} --config.model=3", ["`model`", "one by one"]),
    "a group as a dict": (f"{HAX} --config.model={{}}", ["`model`", "one by one"]),
    "part of a field": (f"{HAX} --config.model.sparse_arch[0]=x", ["a known field"]),
    "no field": (f"{HAX} --config.=3", ["a known field"]),
    "negated number": (f"{HAX} --noconfig.model.sparse_keys", ["model.sparse_keys", "True or False"]),
    "no value": (f"{HAX} --config.model.sparse_keys", ["--config.model.sparse_keys", "value"]),
    # Values.
    "empty value": (f"{HAX} --config.model.sparse_keys=", ["model.sparse_keys", "an integer", "got ''"]),
    "not a number": (f"{HAX} --config.model.sparse_keys=many", ["model.sparse_keys", "got 'many'", "64"]),
    "value apart": (f"{HAX} --config.model.sparse_keys many", ["model.sparse_keys", "got 'many'"]),
    "not an integer": (f"{HAX} --config.model.sparse_keys=1.5", ["an integer", "got '1.5'"]),
    "not a truth value": (f"{HAX} --config.training.tensorboard=maybe", ["True or False", "'maybe'"]),
    "not a real number": (f"{HAX} --config.training.learning_rate=fast", ["a finite number", "'fast'"]),
    "nan": (f"{HAX} --config.training.learning_rate=nan", ["training.learning_rate", "finite", "nan"]),
    "infinite": (f"{HAX} --config.training.learning_rate=1e999", ["training.learning_rate", "finite", "inf"]),
    "negative": (f"{HAX} --config.training.learning_rate=-1", ["training.learning_rate", "-1"]),
    "zero steps": (f"{HAX} --config.training.num_steps=0", ["training.num_steps", "got 0"]),
    "too large": (f"{HAX} --config.model.num_hash=32", ["model.num_hash", "1..31", "got 32"]),
    "huge": (f"{HAX} --config.seed={10**30}", ["seed", "an integer", "got 1000000"]),
    "no such choice": (f"{HAX} --config.model.arch=mamba3", ["model.arch", "'mamba2'", "'mamba3'"]),
    "no such routing": (f"{HAX} --config.model.routing=both", ["model.routing", "'causal'"]),
    # Combinations.
    "unknown source": (f"{HAX} --config.model.sparse_arch=lsh", ["'lsh' is not a source", "sign_bin_lsh"]),
    "source twice": (f"{HAX} --config.model.sparse_arch=sink+sink", ["model.sparse_arch", "differ"]),
    "empty source": (f"{HAX} --config.model.sparse_arch=sink+", ["model.sparse_arch", "not a source"]),
    "too few keys": (f"{HAX} --config.model.sparse_keys=1", ["model.sparse_keys", "at least 2", "got 1"]),
    "heads do not fit": (f"{HAX} --config.model.num_heads=7", ["model.head_dim", "128 / 7"]),
    "tables upside down": (f"{HAX} --config.data.min_n_key=17", ["data.min_n_key", "16", "got 17"]),
    "vocabulary too small": (f"{HAX} --config.data.n_value=100", ["model.vocab_size", "142", "got 100"]),
    "sequence too long": (f"{HAX} --config.data.max_n_key=2000000000", ["data.max_n_key", "tokens"]),
    "not the original's": (
        f"{HAX}:parity --config.model.query_key=shared",
        ["model.query_key", "'separate'", "causal"],
    ),
    "hash loss in parity": (
        f"{HAX}:parity --config.training.hash_loss_weight=1",
        ["training.hash_loss_weight", "parity"],
    ),
    "hash loss without hashing": (
        f"{HAX} --config.model.sparse_arch=sink --config.training.hash_loss_weight=1",
        ["training.hash_loss_weight", "sign_bin_lsh"],
    ),
    "bits that never come": (
        f"{HAX} --config.training.hash_bits_every=70000",
        ["training.hash_bits_every", "model.num_hash=8", "got 70000"],
    ),
    "data set without a folder": (DATASET, ["data.data_dir", "create_dataset"]),
    "data set not there": (f"{DATASET} --config.data.data_dir=nope", ["nope", "create_dataset"]),
    # The folder of the run.
    "workdir without a value": (f"{HAX} --workdir", ["--workdir", "value"]),
    "workdir empty": (f"{HAX} --workdir=", ["--workdir", "a folder"]),
    "workdir a file": (f"{HAX} --workdir=a_file", ["workdir", "a folder", "a_file"]),
    "workdir below a file": (f"{HAX} --workdir=a_file/run", ["workdir", "a folder", "a_file/run"]),
    "workdir that nobody can make": (f"{HAX} --workdir=/proc/run", ["workdir", "/proc/run"]),
    "workdir of another run": (f"{HAX} --workdir=other --config.seed=7", ["workdir", "seed=0 (here 7)"]),
    "name no folder": (f"{HAX} --config.name=a/b", ["`name`", "'a/b'", "--workdir"]),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a test, with the files that the command lines speak of."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _make_other_run() -> None:
    from configs import mamba2_hax

    with RunFolder(pathlib.Path("other"), Experiment.from_dict(mamba2_hax.get_config())) as run:
        run.claim()


@pytest.mark.parametrize(("arguments", "named"), CASES.values(), ids=CASES)
def test_bad_command_line(folder, capsys, monkeypatch, arguments, named):
    # The user's cache folder is not for tests.
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    if "other" in arguments:
        _make_other_run()
    before = _files(folder)
    status = joint_recall.main(["joint_recall.py", *arguments.split()])
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    for text in named:
        assert text in err
    assert _files(folder) == before


def test_in_a_process_of_its_own(folder):
    """What the shell sees: the status, one line, no traceback, nothing on standard output."""
    script = str(REPOSITORY / "experiments" / "joint_recall.py")
    for arguments, text in (
        ([], "--config"),
        (["--config=syntax.py"], "line 1"),
        ([HAX, "--config.model.sparse_keys=many"], "got 'many'"),
    ):
        done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert text in done.stderr


def test_no_such_platform(folder):
    script = str(REPOSITORY / "experiments" / "joint_recall.py")
    done = subprocess.run(
        [sys.executable, script, HAX],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "abacus", "HOME": str(folder)},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "JAX_PLATFORMS" in done.stderr and "abacus" in done.stderr


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help(capsys, flag):
    assert joint_recall.main(["joint_recall.py", flag]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("--workdir", "--config.model.sparse_keys=64", "an integer in 1..", "--config.seed=0"):
        assert text in out


def test_good_command_line(folder):
    from experiments import command_line

    command = command_line.parse(
        [
            "joint_recall.py",
            f"{HAX}:cpu",
            "--workdir",
            "here",
            "--config.model.sparse_keys",
            "32",
            "--config.training.learning_rate=1",
            "--noconfig.training.tensorboard",
            "--config.model.num_hash=3",
            "--config.model.num_hash=4",
        ]
    )
    assert command.workdir == pathlib.Path("here")
    assert command.experiment.name == "mamba2_hax_cpu"
    assert command.experiment.model.sparse_keys == 32
    assert command.experiment.model.num_hash == 4
    assert command.experiment.training.learning_rate == 1.0
    assert command.experiment.training.tensorboard is False


def _files(folder: pathlib.Path) -> set[pathlib.Path]:
    """The files of a folder, without what leaves no trace of a run: caches, and the lock of a refused one."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path for path in files if "__pycache__" not in path.parts and path.name != ".lock"}
