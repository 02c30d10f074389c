"""Puts training to the test: what it must survive, tried at random, counted in results/faults/.

    python tests/faults/run.py kills --form=plain --trials=100

`kills` ends runs by kill -9 at random moments and holds what comes of them to an undisturbed run, bit for
bit. Counts add up over calls; every failure is kept with the orders that led to it, and the exit status is 1.
--seed repeats the draws of an earlier call (the moments depend on the machine's speed all the same).
"""

import argparse
import os
import pathlib
import random
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.faults import kills, report
from tests.faults.forms import FORMS


def main() -> int:
    """Runs what the command line asks for and returns the exit status."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("what", choices=["kills"])
    parser.add_argument("--form", action="append", choices=FORMS, help="by default all, one after the other")
    parser.add_argument("--trials", type=int, default=100, help="of each form; default 100")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most, for each form; default 60")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--fresh", type=float, default=0.1, help="share of processes not forked; default 0.1")
    parser.add_argument("--report", type=pathlib.Path, default=report.FOLDER)
    options = parser.parse_args()
    options.report.mkdir(parents=True, exist_ok=True)
    failures = 0
    for form in options.form or FORMS:
        failures += _kills(form, options)
    return 1 if failures else 0


def _kills(form: str, options: argparse.Namespace) -> int:
    begin = time.monotonic()
    cache = pathlib.Path(tempfile.gettempdir()) / f"hax_jax_faults_{os.getuid()}"
    tally = kills.try_form(
        form, options.trials, options.seed, options.fresh, 60 * options.minutes, cache / form
    )
    counts, seconds = tally.counts(), time.monotonic() - begin
    sums = report.add(options.report / "kills.json", form, counts, options.seed, seconds)
    print(
        f"{form}: {tally.failures} of {tally.trials} trials failed in {seconds:.0f} s; "
        f"{sums['failures']} of {sums['trials']} in all",
        flush=True,
    )
    return tally.failures


if __name__ == "__main__":
    sys.exit(main())
