"""Compares the models, operations, data and training with golden files of the original.

  python experiments/check_golden.py FILE...

Prints one line a file with the largest error of each quantity and what is allowed where it is outside.
Exit status: 0 all inside, 1 something outside, 2 a file that cannot be used.
"""

import pathlib
import sys

import jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from hax_jax.config import ConfigError
from hax_jax.interop.golden import Check, GoldenError, check_file
from hax_jax.interop.state_dict import StateDictError


def describe(check: Check) -> str:
    """One quantity's part of the line."""
    text = f"{check.quantity} {check.error:.1e}"
    return text if check.inside else f"{text} OUTSIDE {check.tolerance:.0e}"


def main(paths: list[str]) -> int:
    """Checks every file, whatever became of those before it."""
    if not paths or any(path in ("-h", "--help") for path in paths):
        print(__doc__.strip(), file=sys.stderr if not paths else sys.stdout)
        return 0 if paths else 2
    status = 0
    for path in paths:
        try:
            checks = check_file(path)
        except (GoldenError, ConfigError, StateDictError) as error:
            print(f"unusable {pathlib.Path(path).name}: {error}", file=sys.stderr, flush=True)
            status = 2
            continue
        inside = all(check.inside for check in checks)
        verdict = "inside " if inside else "OUTSIDE"
        print(f"{verdict} {pathlib.Path(path).name}: {', '.join(map(describe, checks))}", flush=True)
        if not inside:
            status = max(status, 1)
    return status


if __name__ == "__main__":
    # The comparison is defined on a CPU, in float32 and float64, unless the caller asks for something else.
    if jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")
    sys.exit(main(sys.argv[1:]))
