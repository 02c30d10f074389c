"""Trials of bad input: mutated command lines and config files, through the scripts' own main.

Each must be answered by exit status 2 and one line on standard error that begins with 'error: ', before
anything is compiled, without a traceback, and without touching a file that was there. A mutation that happens
to be good input gets as far as the model's preparation, where it is stopped and not counted.
"""

import contextlib
import io
import os
import pathlib
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest

from experiments import create_dataset, evaluate
from hax_jax.config import Experiment
from hax_jax.training import loop
from hax_jax.training.workdir import RunFolder
from tests.faults.damage import contents
from tests.faults.mutations import MUTATIONS
from tests.faults.tally import Tally, memory


class Accepted(BaseException):
    """Raised where good input would begin to compile."""


def try_commands(trials: int, seed: int, seconds: float) -> Tally:
    """Mutates until so many bad inputs were answered or so many seconds have passed."""
    tally, generator, begin = Tally(), random.Random(seed), time.monotonic()
    before = pathlib.Path.cwd()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=memory()) as temporary:
        patch.setattr(loop.initialise, "prepare", _accept)
        patch.setattr(evaluate, "load", _load_or_accept(evaluate.load))
        patch.setattr(create_dataset, "create_dataset", _accept)
        patch.setenv("XDG_CACHE_HOME", temporary)
        os.chdir(_folder(pathlib.Path(temporary) / "here"))
        try:
            while tally.trials < trials and time.monotonic() - begin < seconds:
                kind = generator.choice(list(MUTATIONS))
                script, arguments = MUTATIONS[kind](generator)
                problems = _answer(script, arguments)
                if problems is None and kind != "ranges":
                    tally.of_kind["good after all"] += 1
                else:
                    problems = ["was taken for good"] if problems is None else problems
                    tally.add(kind, problems, {"script": script.__name__, "arguments": arguments})
        finally:
            os.chdir(before)
    return tally


def _accept(*_: Any, **__: Any) -> Any:
    raise Accepted


def _load_or_accept(load: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*arguments: Any, **keywords: Any) -> Any:
        load(*arguments, **keywords)
        raise Accepted

    return checked


def _folder(folder: pathlib.Path) -> pathlib.Path:
    """The working directory: what hostile paths lead to."""
    folder.mkdir()
    (folder / "a_file").write_text("precious")
    (folder / "a_loop").symlink_to("a_loop")
    with RunFolder(folder / "foreign", Experiment(name="foreign", seed=12345)) as run:
        run.claim()
    for name, text in (
        ("half", b'{"format_version": 1, "exp'),
        ("strange", b"[[[[]]]]"),
        ("unreadable", b"\xff"),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_bytes(text)
    return folder


def _answer(script: Any, arguments: list[str]) -> list[str] | None:
    """What is wrong with the answer to a command; None if it was good input."""
    out, err = io.StringIO(), io.StringIO()
    here = pathlib.Path.cwd()
    before = contents(here)
    problems = []
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            whole = arguments if script is evaluate else [script.__name__, *arguments]
            status = script.main(whole)
            if status != 2:
                problems.append(f"exit status {status}")
        except Accepted:
            status = None
        except BaseException as error:
            problems.append(f"raised {error!r}"[:300])
            status = 1
    after = contents(here)
    changed = [name for name, content in before.items() if after.get(name) != content and ".lock" not in name]
    if changed:
        problems.append(f"changed {changed}")
    for name in after.keys() - before.keys():
        path = here / name.split("/")[0]
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    if status is None and not problems:
        return None
    text = err.getvalue()
    if not (text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n")):
        problems.append(f"said {text[:300]!r}")
    if "Traceback" in text or len(text) > 20_000:
        problems.append("a traceback, or too long")
    if out.getvalue():
        problems.append(f"printed {out.getvalue()[:100]!r}")
    return problems
