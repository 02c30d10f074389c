"""What a run says while it runs: plain lines in a log, a bar on a terminal."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from hax_jax.training.processes import is_primary

# A bar is redrawn at most this often, in seconds.
_REDRAW = 0.5


class Console:
    """Prints lines at once, and on a terminal keeps a bar below them.

    A reader that goes away (a closed terminal, `| head`) ends the printing, not the run.

    Args:
      stream: a text file; standard output if None.
    """

    def __init__(self, stream: Any = None):
        self._stream = stream or sys.stdout
        self.is_terminal = self._stream.isatty()
        self._silent = not is_primary()
        self._bar = ""

    def line(self, text: str) -> None:
        """Prints a line."""
        self._write(f"{self._erase()}{text}\n{self._bar}")

    def bar(self, text: str) -> None:
        """Replaces the bar; an empty text removes it."""
        if self.is_terminal:
            erase, self._bar = self._erase(), text
            self._write(erase + text)

    def _erase(self) -> str:
        return "\r\x1b[K" if self._bar else ""

    def _write(self, text: str) -> None:
        if self._silent:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._silent = True


class Progress:
    """Speed, time left, and the lines and the bar that show them.

    Speeds leave out evaluation, checkpoints and the first step (its compilation); the time left does not.

    Args:
      console: where to print.
      step: updates made before.
      num_steps: updates in all.
      positions: positions in the batches of one update, padding included.
    """

    def __init__(self, console: Console, step: int, num_steps: int, positions: int):
        self._console, self._num_steps, self._positions = console, num_steps, positions
        self._begin = time.perf_counter()
        self._first = self._mark = step
        self._started = self._marked = self._drawn = self._begin
        self._paused = 0.0
        self.seconds_per_step: float | None = None

    def started(self, step: int) -> float:
        """Notes that the first step is done; returns the seconds it took, compilation included."""
        self._started = self._marked = time.perf_counter()
        self._first = self._mark = step
        return self._started - self._begin

    def pause(self, seconds: float) -> None:
        """Leaves a time out of the speeds."""
        self._paused += seconds

    def log(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Prints a line for the metrics of a log step that is done, and returns the speeds since the last."""
        now = time.perf_counter()
        steps, seconds = step - self._mark, now - self._marked - self._paused
        self._mark, self._marked, self._paused = step, now, 0.0
        speeds = {}
        if steps > 0 and seconds > 0:
            self.seconds_per_step = seconds / steps
            speeds = {
                "steps_per_s": steps / seconds,
                "positions_per_s": steps * self._positions / seconds,
                "tokens_per_s": steps * metrics["tokens"] / seconds,
            }
        parts = [
            f"step {step}/{self._num_steps}",
            f"loss {metrics['loss']:.4f}",
            f"gate loss {metrics['gate_loss']:.4f}",
            f"accuracy {100 * metrics['accuracy']:.2f}%",
            f"lr {metrics['learning_rate']:.2e}",
        ]
        if speeds:
            parts += [
                f"{speeds['steps_per_s']:.4g} steps/s",
                f"{_short(speeds['positions_per_s'])} positions/s",
                f"{_short(speeds['tokens_per_s'])} tokens/s",
                f"{duration(self.seconds_left(step))} left",
            ]
        self._console.line("  ".join(parts))
        return speeds

    def seconds_left(self, step: int) -> float:
        """Estimated time to the last step, evaluations and checkpoints included."""
        done = step - self._first
        if done <= 0:
            return float("nan")
        return (time.perf_counter() - self._started) / done * (self._num_steps - step)

    def draw(self, step: int) -> None:
        """Redraws the bar if it is time; costs nothing otherwise."""
        if not self._console.is_terminal or time.perf_counter() - self._drawn < _REDRAW:
            return
        self._drawn = time.perf_counter()
        width = 30
        filled = width * step // self._num_steps
        left = f"  {duration(self.seconds_left(step))} left" if step > self._first else ""
        self._console.bar(f"[{'#' * filled}{'.' * (width - filled)}] {step}/{self._num_steps}{left}")


def duration(seconds: float) -> str:
    """A time in words short enough for a progress line: 42 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    if not 0 <= seconds < float("inf"):
        return "unknown time"
    whole = round(seconds)
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {part_unit}"
    return f"{whole} s"


def _short(number: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"
