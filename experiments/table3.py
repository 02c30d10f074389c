"""Trains rows of Table 3 and draws the table: every row, or some, for chosen seeds, rates, steps and mode.

    python experiments/table3.py                                      # all 19 rows, one seed, 400,000 steps
    python experiments/table3.py --seeds=0,1,2 --learning_rates=3e-3,1e-3,3e-4         # as the paper swept
    python experiments/table3.py --mode=parity --configs=mamba2_hax,mamba2_lsh
    python experiments/table3.py --small --steps=300                         # the small form, for a CPU
    python experiments/table3.py --steps=40000 --jobs=4 --limit_seconds=3600  # what an hour gives; later more

The same command again goes on: what has finished is never run again, what was interrupted goes on from its
checkpoint, and what failed is tried again. Each row is a cell: its seeds and rates are trained together in
one program, in a process of its own, so that one that fails does not stop the others.
`--config.FIELD=VALUE` changes a setting of every run.

A cell's results are OUT/NAME.json, where OUT is results/table3/MODE_STEPS; from these come OUT/table.md,
OUT/curves.svg (with matplotlib), and by experiments/update_readme.py the README's table. Checkpoints, metrics
and what the processes print (log.txt) lie in WORKDIR/MODE_STEPS/NAME/.

Exit status: 0 all cells there; 1 some failed, listed at the end; 2 bad input, said in one line; 143 stopped
by a signal or by --limit_seconds, with everything saved.
"""

import argparse
import contextlib
import math
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments import results
from experiments.table import cells
from hax_jax.config import ConfigError

FINISHED, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 143
FOLDER = results.CHECKOUT / results.FOLDER / "table3"


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    try:
        options = _options(argv[1:])
        table = Table(options, shlex.join(["python", *argv]))
        return table.show() if options.dry_run else table.run()
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = results.Parser(__doc__)
    add = parser.add_argument
    add("--configs", type=_split, default=cells.ORDER, metavar="NAME,...", help="rows; default all 19")
    add("--mode", choices=cells.MODES, default="causal", help="routing and precision; default causal")
    add("--small", action="store_true", help="the configs' small form, for a machine without a GPU")
    add("--steps", type=int, help="of every run; default what the configs say")
    add("--seeds", type=_numbers(int), default=(0,), metavar="N,...", help="default 0")
    add("--learning_rates", type=_numbers(float), default=(), metavar="X,...", help="default the configs'")
    add("--together", type=_least(int, 1), default=16, help="most runs of a row in one program; default 16")
    add("--jobs", type=_least(int, 1), default=1, help="processes at a time; default 1")
    add("--gpus", type=_split, default=(), metavar="N,...", help="the processes take one each, in turn")
    add("--limit_seconds", type=_least(float, 0), default=math.inf, help="then stop, to go on later")
    add("--workdir", type=pathlib.Path, default=pathlib.Path("runs/table3"), help="default runs/table3")
    add("--out", type=pathlib.Path, help="default results/table3/MODE_STEPS")
    add("--compilation_cache", help="as of experiments/joint_recall.py")
    add("--commit", help="the code's commit, where git does not know it")
    add("--dry_run", action="store_true", help="list the cells and how far they are")
    options, rest = parser.parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") and not re.match(r"--?(no)?config\.", word)]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    options.overrides = tuple(rest)
    return options


class Table:
    """The cells that a command line asks for, each held against what is there already.

    Args:
      options: the command line.
      command: it as text.

    Raises:
      ConfigError: something cannot be trained, or would not fit what is there. Nothing has been changed.
    """

    def __init__(self, options: argparse.Namespace, command: str):
        self.options, self.command = options, command
        self.wish = cells.Wish(
            options.configs,
            options.mode,
            options.small,
            options.steps,
            options.seeds,
            options.learning_rates,
            options.together,
            options.overrides,
            options.compilation_cache,
        )
        self.cells = cells.plan(self.wish, options.workdir)
        self.out = options.out or FOLDER / cells.name_of(self.wish, self.cells)
        _check_folder("--workdir", options.workdir)
        _check_folder("--out", self.out)
        _keep_off_devices()
        # Imported here, so that a mistyped command line is answered at once.
        from experiments.table import record

        self.record = record
        record.check_commit(options.commit)
        _check_data(self.cells)
        self.left = {
            cell.row: cells.missing(cell, record.finished_of(cell, self.out), self.wish)
            for cell in self.cells
        }
        self.states = {group.folder: record.state_of(group) for group in self._groups()}

    def show(self) -> int:
        """Lists the cells and how far they are."""
        for cell in self.cells:
            print(f"{cell.row}: {self._state(cell)}")
        print(self._counts())
        return FINISHED

    def run(self) -> int:
        """Trains what is missing, then draws the table."""
        from experiments.table import running
        from hax_jax.training.progress import Console
        from hax_jax.training.signals import StopRequest

        console = Console()
        self._note(console.line)
        of_row = {cell.row: cell for cell in self.cells}

        def finished(group: cells.Group) -> str:
            self._take(of_row[group.row], group)
            return f"{group.row}: {self._state(of_row[group.row])}"

        options = self.options
        with StopRequest() as stop:
            plan = running.Plan(options.jobs, options.gpus, options.limit_seconds)
            ended = [group for group in self._groups() if self.states[group.folder][0]]
            others = [group for group in self._groups() if group not in ended]
            training = running.Training(others, plan, finished, self._counts, console)
            for group in ended:
                training.collect(group)
            why = training.run(stop)
        self._draw(console.line)
        for group, reason in training.failures:
            print(f"failed: {group.row} in {group.folder}: {reason}", file=sys.stderr)
        if why is not None:
            console.line(f"stopped by {why}, all saved; the same command goes on. {self._counts()}")
            return INTERRUPTED
        return FAILED if training.failures else FINISHED

    def _groups(self) -> list[cells.Group]:
        return [group for cell in self.cells for group in self.left[cell.row]]

    def _counts(self) -> str:
        done = sum(not groups for groups in self.left.values())
        return f"{done} of {len(self.cells)} cells finished"

    def _state(self, cell: cells.Cell) -> str:
        left = self.left[cell.row]
        if not left:
            return f"finished, {self._result(cell)}"
        parts = []
        for group in left:
            ended, step = self.states.get(group.folder, (False, 0))
            runs = f"{len(group.members)} runs " if len(group.members) > 1 else ""
            saved = f"to go on from step {step:,} of {group.num_steps:,}" if step else "not begun"
            parts.append(runs + ("finished, not yet collected" if ended else saved))
        done = len(cell.members) - sum(len(group.members) for group in left)
        return "; ".join([*([f"{done} runs finished"] if done else []), *parts])

    def _result(self, cell: cells.Cell) -> str:
        summary = self.record.read(self.out / f"{cell.row}.json")["summary"]
        if summary["test_accuracy"] is None:
            return "all runs diverged"
        spread = summary["test_accuracy_std"]
        text = f"test accuracy {100 * summary['test_accuracy']:.2f}%"
        return text + ("" if spread is None else f", standard deviation {100 * spread:.2f} over seeds")

    def _take(self, cell: cells.Cell, group: cells.Group) -> None:
        self.record.add(cell, group, self.wish, self.out, self.command, self.options.commit)
        self.left[cell.row].remove(group)

    def _note(self, say: Callable[[str], None]) -> None:
        training = self.cells[0].shared.training
        if training.num_steps <= training.warmup_steps:
            say(
                f"note: {training.num_steps:,} steps end within the warm-up of {training.warmup_steps:,}; "
                "--config.training.warmup_steps=N shortens it"
            )

    def _draw(self, say: Callable[[str], None]) -> None:
        from experiments.table import drawing

        if not any(self.out.glob("*.json")):
            return
        try:
            for line in drawing.table(self.record.read_all(self.out)):
                say(line)
            drawing.write(self.out)
            say(f"table and figure: {os.path.relpath(self.out)}")
        except ConfigError as error:
            # A figure that cannot be drawn is no reason to call the training a failure.
            say(f"note: {' '.join(str(error).split())}")


def _keep_off_devices() -> None:
    """This process reads results and starts others: the GPUs are theirs."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _check_folder(option: str, path: pathlib.Path) -> None:
    """Raises ConfigError where a folder is neither there, to be written, nor can be made."""
    try:
        # A name that is too long or has a null byte raises something else.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        fault = None if there.is_dir() and os.access(there, os.W_OK) else f"{there} cannot be written"
    except (OSError, ValueError) as error:
        fault = str(getattr(error, "strerror", error))
    if fault:
        raise ConfigError(option, "a folder that can be written", str(path), f"{fault}; choose another")


def _check_data(planned: Sequence[cells.Cell]) -> None:
    """Raises ConfigError where a stored data set is wished for that is not there, before anything begins."""
    from hax_jax.data import make_split

    data = planned[0].shared.data
    if "dataset" in (data.train_source, data.eval_source):
        for name in ("train", "valid", "test"):
            make_split(data, name)


def _split(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if not all(words) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different names separated by commas")
    return words


def _numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        try:
            found = tuple(kind(word) for word in text.split(","))
        except ValueError:
            found = ()
        if not found or len(set(found)) < len(found):
            name = {int: "integers", float: "numbers"}[kind]
            raise argparse.ArgumentTypeError(f"{text!r} is no list of different {name} separated by commas")
        return found

    return parse


def _least(kind: type, low: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of at least {low}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main(sys.argv))
