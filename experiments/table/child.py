"""The process of one group of a table: `joint_recall.py`, which ends when the table's process does.

Started by `experiments/table3.py` with a pipe as standard input that nobody writes to: it ends with the
process that holds its other end, however that one ends. What is killed goes on from its checkpoint.
"""

import os
import pathlib
import sys
import threading

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments import joint_recall

KILLED = 137


def main(argv: list[str]) -> int:
    """Runs the command line of `joint_recall.py`, this program's name first."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What the run records as its command: the one that does the same by hand.
    sys.argv = [os.path.relpath(joint_recall.__file__), *argv[1:]]
    return joint_recall.main(sys.argv)


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(KILLED)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
