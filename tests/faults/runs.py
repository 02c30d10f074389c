"""What a run has left in its folder, and whether it is what an undisturbed run leaves there."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from hax_jax.training.checkpoints import Arrays, Checkpoints, Restored, _digest
from hax_jax.training.errors import CheckpointError
from hax_jax.training.files import plain
from hax_jax.training.metrics import TIMING_FIELDS, read_metrics

KINDS = ("checkpoints", "best")
# The parts of a checkpoint's JSON that belong to the run: where the data is, and what has been best so far.
_PARTS = ("data", "best", "last_valid")


def digest_of(arrays: Arrays, meta: Mapping[str, Any]) -> str:
    """SHA-256 of parameters, optimiser, counters and the place in the data."""
    return _digest(arrays, plain({name: meta[name] for name in _PARTS if name in meta}))


def whole(folder: pathlib.Path) -> dict[int, Restored]:
    """Every checkpoint in a folder that reads back whole, by step, oldest first."""
    checkpoints = Checkpoints(folder, keep=1, say=lambda text: None)
    found = {}
    for step in checkpoints.steps():
        try:
            found[step] = checkpoints.read(step)
        except CheckpointError:
            continue
    checkpoints.close()
    return found


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What a run of one form does when nothing happens to it.

    Attributes:
      folder: the folder that it left.
      record: what `session.Recorder` wrote.
      members: see `forms.Form`.
    """

    folder: pathlib.Path
    record: dict[str, Any]
    members: tuple[str, ...]

    @property
    def num_steps(self) -> int:
        """The step of its last checkpoint."""
        return max(int(name.rpartition("/")[2]) for name in self.record["digests"])

    def wrong_after_kill(
        self,
        folder: pathlib.Path,
        before: dict[str, int],
        whole_ones: Mapping[str, dict[int, Restored]] | None = None,
    ) -> Iterator[str]:
        """What must not be in a folder whose run was killed; brings `before`, the newest steps, up to date.

        Every whole checkpoint and every readable line of metrics has to be one of the undisturbed run, and no
        whole checkpoint may have gone without a newer one in its place. `whole_ones` has them, if
        they have been read already.
        """
        for member in self.members:
            for kind in KINDS:
                found = (whole_ones or {}).get(f"{member}/{kind}")
                found = whole(folder / member / kind) if found is None else found
                for step, restored in found.items():
                    name = f"{(self.folder / member).name}/{kind}/{step}"
                    if digest_of(restored.arrays, restored.meta) != self.record["digests"].get(name):
                        yield f"{member}/{kind}/{step} is not that of the undisturbed run"
                newest = max(found, default=-1)
                if newest < before.get(f"{member}/{kind}", -1):
                    yield f"{member}/{kind} went back from {before[f'{member}/{kind}']} to {newest}"
                before[f"{member}/{kind}"] = newest
            known = lines_of(self.folder / member)
            for line in lines_of(folder / member):
                if line not in known:
                    yield f"{member}/metrics.jsonl holds the foreign line {line}"

    def wrong_at_end(self, folder: pathlib.Path) -> Iterator[str]:
        """What differs between a finished run and the undisturbed one, bit for bit."""
        for member in self.members:
            mine, other = folder / member, self.folder / member
            if lines_of(mine) != lines_of(other):
                yield f"{member}/metrics.jsonl differs"
            result = mine / "result.json"
            if not result.exists():
                yield f"{member}/result.json is missing"
            elif result.read_bytes() != (other / "result.json").read_bytes():
                yield f"{member}/result.json differs"
            for kind in KINDS:
                found, wanted = whole(mine / kind), whole(other / kind)
                newest = max(found, default=None), max(wanted, default=None)
                if newest[0] != newest[1]:
                    yield f"{member}/{kind}: the newest is {newest[0]}, not {newest[1]}"
                for step in found.keys() & wanted.keys():
                    a, b = found[step], wanted[step]
                    if digest_of(a.arrays, a.meta) != digest_of(b.arrays, b.meta):
                        yield f"{member}/{kind}/{step} differs"


def lines_of(folder: pathlib.Path, last: Mapping[str, int] | None = None) -> list[str]:
    """The lines of metrics without what depends on the clock, up to the `last` step of each kind."""
    return [
        json.dumps({name: value for name, value in line.items() if name not in TIMING_FIELDS})
        for line in read_metrics(folder)
        if last is None or line["step"] <= last.get(line["kind"], -1)
    ]
