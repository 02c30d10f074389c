"""Measures speed and memory, and writes the numbers to a small JSON file that is committed.

    python benchmarks/run.py attention        # sparse attention against cuDNN's and the dense form
    python benchmarks/run.py scans            # both recurrences against mamba_ssm's kernels
    python benchmarks/run.py step             # a training step of every row of Table 3
    python benchmarks/run.py curves           # the loss over 2,000 steps: default form against plain form
    python benchmarks/run.py scaling          # data-parallel training on 1, 2, 4, 8 GPUs of this machine

From the repository's root, on one GPU; nothing else should run there. `step` with --workers has a process for
each row, on several GPUs with --gpus. Results go to results/benchmarks/SUITE.json after each measurement;
those of `scaling`, which starts processes on every GPU that it sees, to results/scaling/DEVICE.json. --tiny
measures shapes that a CPU can bear, to see that everything runs. `docs/performance.md` says how to read the
numbers.

Exit status: 0 done, 2 bad input, said in one line.
"""

import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Sequence

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments import results
from hax_jax.config import ConfigError

SUITES = ("attention", "scans", "step", "curves", "scaling")
FOLDER = results.CHECKOUT / results.FOLDER / "benchmarks"


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    started = time.perf_counter()
    try:
        options = _parser().parse_args(argv[1:])
        _run(options, started)
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> results.Parser:
    parser = results.Parser(__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--seconds", type=float, default=540.0, help="begin nothing new after so many; 540")
    parser.add_argument("--only", default="", metavar="WORD,...", help="all of these parts in its id")
    parser.add_argument("--out", type=pathlib.Path, help="default as said above")
    parser.add_argument("--add", action="store_true", help="keep what the file holds, replace same ids")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--commit", help="the code's commit, where git does not know it")
    parser.add_argument("--note", help="a remark on this session")
    parser.add_argument(
        "--workers", type=int, default=0, help="that compile before anything is timed, of attention and step"
    )
    parser.add_argument("--repeats", type=int, default=2, help="of each measurement; default 2")
    step = parser.add_argument_group("step and curves")
    step.add_argument(
        "--configs", default="", metavar="NAME,...", help="rows of Table 3; default all, of curves mamba2_hax"
    )
    step.add_argument("--steps", type=int, help="in a sample, default 50; of a curve 2,000; of a run 200")
    step.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting to change")
    step.add_argument("--label", default="", help="stands before every id, such as 'before'")
    step.add_argument("--breakdown", default="", metavar="NAME,...", help="compiled again without graphs")
    step.add_argument("--cache", type=pathlib.Path, help="folder of compiled programs; default none")
    step.add_argument("--compile_only", action="store_true", help="of step: fill that folder, time nothing")
    step.add_argument("--gpus", default="", metavar="N,...", help="of step: its processes take one each")
    scaling = parser.add_argument_group("scaling", "also --configs (one, default mamba2_hax), --steps, --set")
    scaling.add_argument("--devices", default="", metavar="N,...", help="default 1,2,4,8 as far as there are")
    scaling.add_argument("--simulated", type=int, default=0, metavar="N", help="on N simulated CPU devices")
    return parser


def _run(options, started: float) -> None:
    # Imported here, so that a mistyped command line is answered at once.
    from benchmarks import timing
    from benchmarks.record import Record

    only = tuple(word for word in options.only.split(",") if word)
    plan = timing.Plan(repeats=options.repeats)
    if options.tiny:
        plan = dataclasses.replace(plan, samples=2, sample_seconds=0.0, seconds=0.1)

    def record() -> Record:
        out = options.out or FOLDER / f"{options.suite}.json"
        return Record(out, options.suite, add=options.add, commit=options.commit, note=options.note)

    if options.suite == "attention":
        from benchmarks import attention

        attention.run(record(), attention.Options(options.seconds, only, options.tiny, options.workers, plan))
    elif options.suite == "scans":
        # PyTorch's kernels run in the same process and need memory of their own.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
        from benchmarks import scans

        scans.run(record(), scans.Options(options.seconds, only, options.tiny, plan))
    elif options.suite == "curves":
        from benchmarks import curves

        names = tuple(name for name in options.configs.split(",") if name) or curves.Options.configs
        steps = options.steps or curves.Options.steps
        curves.run(record(), curves.Options(names, tuple(options.set), steps, options.tiny))
    elif options.suite == "scaling":
        from benchmarks import scaling

        scaling.main(options, results.CHECKOUT / results.FOLDER / "scaling")
    else:
        from benchmarks import step

        options.steps = options.steps or step.Options.steps
        step.main(options, plan, record, started)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
