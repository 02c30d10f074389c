"""Counts of trials in one process."""

import dataclasses
import os
from collections import Counter
from typing import Any

# Of each call of the harness no more failures than this are kept in full.
_MOST_KEPT = 40


@dataclasses.dataclass
class Tally:
    """Trials and failures, in all and by kind."""

    trials: int = 0
    failures: int = 0
    of_kind: Counter[str] = dataclasses.field(default_factory=Counter)
    details: list[Any] = dataclasses.field(default_factory=list)

    def add(self, kind: str, problems: list[str], what: Any) -> None:
        """Counts one trial; it failed if there are problems, which are kept with `what` led to them."""
        self.trials += 1
        self.note(kind, problems, what)

    def note(self, kind: str, problems: list[str], what: Any) -> None:
        """Counts what belongs to a trial that has been counted."""
        self.of_kind[kind] += 1
        if problems:
            self.failures += 1
            if len(self.details) < _MOST_KEPT:
                self.details.append({"kind": kind, "problems": problems, "what": what})

    def counts(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "trials": self.trials,
            "failures": self.failures,
            "of_kind": dict(self.of_kind),
            "details": self.details,
        }


def memory() -> str | None:
    """A folder in memory, where there is one: what is tried is the order of things, not the disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
