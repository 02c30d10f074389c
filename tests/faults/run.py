"""Puts training to the test: what it must survive, tried at random, counted in results/faults/.

    python tests/faults/run.py kills --form=plain --trials=100
    python tests/faults/run.py power --form=plain --trials=1000
    python tests/faults/run.py damage --trials=10000
    python tests/faults/run.py commands --trials=1000
    python tests/faults/run.py devices

`kills` ends runs by kill -9 at random moments and holds what comes of them to an undisturbed run, bit for
bit; `power` does the same to states of the disk after an outage, with torn and reordered writes; `damage`
spoils checkpoints and reads them; `commands` mutates command lines and config files; `devices` compares runs
on 1, 2 and 8 simulated devices. Counts add up over calls; failures are kept with what led to them, and the
exit status is 1. --seed repeats the draws of an earlier call (the moments of kills depend on the machine's
speed all the same).
"""

import argparse
import os
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{tempfile.gettempdir()}/hax_jax_faults_{os.getuid()}"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

from hax_jax.training.environment import describe
from hax_jax.training.files import write_json
from tests.faults import commands, damage, devices, kills, power, report
from tests.faults.forms import FORMS

KINDS = ("kills", "power", "damage", "commands", "devices")


def main() -> int:
    """Runs what the command line asks for and returns the exit status."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--form", action="append", choices=FORMS, help="of kills and power; default: each")
    parser.add_argument("--trials", type=int, default=100, help="of each form; default 100")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most, for each form; default 60")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--fresh", type=float, default=0.1, help="share of processes not forked; default 0.1")
    parser.add_argument("--report", type=pathlib.Path, default=report.FOLDER)
    options = parser.parse_args()
    options.report.mkdir(parents=True, exist_ok=True)
    cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    limits = options.trials, options.seed, 60 * options.minutes
    if options.kind == "kills":
        tries: dict[str, Callable[[], Any]] = {
            form: lambda form=form: kills.try_form(form, *limits, options.fresh, cache)
            for form in options.form or FORMS
        }
    elif options.kind == "power":
        tries = {
            form: lambda form=form: power.try_power(form, *limits)
            for form in options.form or FORMS
            if FORMS[form].devices == 1
        }
    elif options.kind == "devices":
        return _devices(options.report, cache)
    else:
        attempt = {"damage": damage.try_damage, "commands": commands.try_commands}[options.kind]
        tries = {"all": lambda: attempt(*limits)}
    return 1 if sum(_count(form, attempt, options) for form, attempt in tries.items()) else 0


def _devices(folder: pathlib.Path, cache: pathlib.Path) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        found = devices.compare(pathlib.Path(temporary), cache)
    failed = [x for x in found.values() if max(x["loss"], x["parameter"]) > devices.TOLERANCE]
    about = {**describe(), "command": "python tests/faults/run.py devices"}
    write_json(
        folder / "devices.json",
        {"tolerance": devices.TOLERANCE, "steps": 50, "from_1_device": found, **about},
    )
    print(f"devices: {len(failed)} of {len(found)} comparisons beyond {devices.TOLERANCE:g}", flush=True)
    return 1 if failed else 0


def _count(form: str, attempt: Callable[[], Any], options: argparse.Namespace) -> int:
    begin = time.monotonic()
    tally = attempt()
    seconds = time.monotonic() - begin
    sums = report.add(options.report / f"{options.kind}.json", form, tally.counts(), options.seed, seconds)
    print(
        f"{options.kind}, {form}: {tally.failures} of {tally.trials} trials failed in {seconds:.0f} s; "
        f"{sums['failures']} of {sums['trials']} in all",
        flush=True,
    )
    return tally.failures


if __name__ == "__main__":
    sys.exit(main())
