"""Runs the tests marked `gpu` and writes their counts, with device and versions, to results/gpu_tests.json.

    python tests/gpu.py
    python tests/gpu.py --workers=5 --seconds=300 --out=gpu_tests.json tests/ops

It needs an NVIDIA GPU of the Hopper generation or newer, and nothing that uses its memory beside it. The
exit status is that of pytest; failures are kept in the file with their first line. After --seconds pytest is
interrupted: what had ended by then is counted, and the file says that it was cut short.
"""

import argparse
import collections
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.record import Record
from experiments.results import CHECKOUT
from hax_jax.config import ConfigError


def main() -> int:
    """Runs what the command line asks for and returns the exit status."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("tests", nargs="*", default=["tests"], help="files and folders; default tests")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side; default 1")
    parser.add_argument("--seconds", type=float, help="interrupt the tests then; default never")
    parser.add_argument("--out", type=pathlib.Path, default=CHECKOUT / "results" / "gpu_tests.json")
    parser.add_argument("--commit", help="of the code, where this is not a checkout that git knows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", f"--junitxml={log}"]
        if options.workers > 1:
            # Each process takes memory as it needs it, rather than most of the card at its start.
            command.append(f"--numprocesses={options.workers}")
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        status, cut_short = run([*command, *options.tests], environment, options.seconds)
        if not log.exists():
            return status
        counts = read(log)
    try:
        record = Record(options.out, "gpu_tests", commit=options.commit)
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    record.note(cut_short=cut_short)
    for file, count in sorted(counts.items()):
        record.add(file, **count)
    return status


def run(command: list[str], environment: dict[str, str], seconds: float | None) -> tuple[int, bool]:
    """Runs pytest; its exit status, and whether it was interrupted because so many seconds were over."""
    # A shell's background ignores the signal, and what ignores it passes that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tests = subprocess.Popen(command, cwd=CHECKOUT, env=environment)
    try:
        return tests.wait(seconds), False
    except subprocess.TimeoutExpired:
        # As Ctrl-C does: pytest then writes what it knows.
        tests.send_signal(signal.SIGINT)
        return tests.wait(), True


def read(log: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What became of the tests of each module, from pytest's XML: counts, seconds, and failures by name."""
    found: dict[str, dict[str, Any]] = collections.defaultdict(
        lambda: {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": []}
    )
    for case in ElementTree.parse(log).iter("testcase"):
        if case.get("name") is None:
            # The test that was running when pytest was interrupted.
            continue
        module = found[case.get("classname", "")]
        module["seconds"] += float(case.get("time", 0))
        fault = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        if fault is not None:
            module["failed"] += 1
            module["failures"].append(f"{case.get('name')}: {fault.get('message', '').splitlines()[0]}"[:300])
        elif case.find("skipped") is not None:
            module["skipped"] += 1
        else:
            module["passed"] += 1
    return dict(found)


if __name__ == "__main__":
    sys.exit(main())
