"""The only writer of metrics: `metrics.jsonl` is the truth, TensorBoard a view of it."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from hax_jax.training.files import plain, write_atomically
from hax_jax.training.processes import is_primary

# Fields that differ between two runs of the same bits.
TIMING_FIELDS = ("steps_per_s", "positions_per_s", "tokens_per_s", "seconds")


class MetricsWriter:
    """Appends one JSON object a line: `step`, `kind` ('train', 'valid' or 'test'), then numbers.

    Of a population there is such a line for each member, whose number is `member`.

    Opening drops what a run that goes on from `step` will write again: lines beyond it, validations beyond
    `last_valid`, the test's line, and lines torn by a crash. The rest stays byte for byte.

    Args:
      workdir: the run's folder.
      step: updates made so far.
      last_valid: the step of the last validation that is part of the run.
      tensorboard: whether to write `workdir/tensorboard` too, through tensorboardX.

    Attributes:
      num_torn: lines of the file that were unreadable, the last one not counted.
    """

    def __init__(self, workdir: pathlib.Path, step: int, last_valid: int, tensorboard: bool = False):
        path = workdir / "metrics.jsonl"
        self._is_primary = is_primary()
        if not self._is_primary:
            path, tensorboard = pathlib.Path(os.devnull), False
        self.num_torn = _keep_lines_until(path, {"train": step, "valid": last_valid}) if path.is_file() else 0
        self._file = path.open("ab")
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            # purge_step hides what an earlier session of the run wrote beyond this point.
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1, flush_secs=30)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Writes one line; it reaches the operating system at once, the disk at `flush`."""
        line = json.dumps(plain({"step": step, "kind": kind, **values}), allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if self._board is not None:
            member = f"/{values['member']}" if "member" in values else ""
            for name, value in values.items():
                if isinstance(value, int | float) and name != "member":
                    self._board.add_scalar(f"{kind}/{name}{member}", value, step)

    def flush(self) -> None:
        """Returns when all lines are on the disk."""
        self._file.flush()
        if self._is_primary:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files. A full disk shows at `flush`; here it must not hide what ended the run."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board is not None:
            self._board.close()


def open_metrics(
    workdir: pathlib.Path, step: int, last_valid: int, tensorboard: bool, say: Callable[[str], None]
) -> MetricsWriter:
    """A `MetricsWriter`, without TensorBoard where that is missing; says so, and what was unreadable."""
    if tensorboard and not has_tensorboard():
        say("tensorboardX is not installed: the metrics go to metrics.jsonl alone")
        tensorboard = False
    writer = MetricsWriter(workdir, step, last_valid, tensorboard)
    if writer.num_torn:
        say(f"left out {writer.num_torn} unreadable lines of metrics.jsonl")
    return writer


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, torn ones left out."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [entry for entry in map(_entry, lines) if entry is not None]


def has_tensorboard() -> bool:
    """Whether tensorboardX is installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        return False
    return True


def _keep_lines_until(path: pathlib.Path, last: Mapping[str, int]) -> int:
    """Keeps lines up to the last step of each kind; returns how many before the last line were unreadable."""
    lines = path.read_bytes().splitlines(keepends=True)
    entries = [_entry(line) for line in lines]
    kept = [
        line
        for line, entry in zip(lines, entries, strict=True)
        if entry is not None and entry["step"] <= last.get(entry["kind"], -1)
    ]
    if kept != lines:
        write_atomically(path, b"".join(kept))
    # A torn last line is what a crash leaves; any other is damage.
    return sum(entry is None for entry in entries[:-1])


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(entry, dict) and "kind" in entry
    return entry if whole and isinstance(entry.get("step"), int) else None
