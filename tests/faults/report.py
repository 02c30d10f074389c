"""Reports of the harness: counts that add up over its sessions, each with what it ran on."""

import datetime
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from hax_jax.training.environment import CHECKOUT, commit, describe
from hax_jax.training.files import write_json

FOLDER = CHECKOUT / "results" / "faults"


def add(
    path: pathlib.Path, form: str, counts: Mapping[str, Any], seed: int, seconds: float
) -> dict[str, Any]:
    """Adds one session's counts to a report, which is made if missing, and returns the sums.

    Args:
      path: the report.
      form: what was tried.
      counts: numbers, or dicts of numbers, of this session; `details` of failures are kept as they are.
      seed: from which its trials were drawn.
      seconds: how long it took.
    """
    content = json.loads(path.read_text()) if path.exists() else {"sessions": []}
    about = describe()
    when = datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
    # The state of the checkout while it was tried, since forms and training change.
    mine = {"form": form, "date": when, **commit(), "seed": seed, "seconds": round(seconds, 1), **counts}
    mine |= {"device": about["device"]["kind"], "versions": about["versions"]}
    sessions = [*content["sessions"], mine]
    forms = dict.fromkeys(session["form"] for session in sessions)
    sums = {name: _sum([s for s in sessions if s["form"] == name]) for name in forms}
    totals = _sum(sessions)
    write_json(path, {"total": totals, "forms": sums, "sessions": sessions})
    return sums[form]


def _sum(parts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of all counts; seeds, dates and versions are no counts."""
    total: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if name == "seed" or name == "versions" or isinstance(value, bool | str | list) or value is None:
                continue
            if isinstance(value, Mapping):
                merged = total.setdefault(name, {})
                for key, number in value.items():
                    merged[key] = merged.get(key, 0) + number
            else:
                total[name] = round(total.get(name, 0) + value, 1)
    return total
