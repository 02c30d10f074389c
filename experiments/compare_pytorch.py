"""Trains the same model in PyTorch and in JAX, side by side, and reports how they differ and what they take.

    python experiments/compare_pytorch.py --config=configs/mamba2_hax.py [--steps=20] [--out=FILE.json]
    python experiments/compare_pytorch.py --golden=E_train_mamba2_hax.npz --steps=200

Both begin with the same weights and take the same batches with the same random draws, in parity routing and
float32: the report has loss, gate loss and accuracy step by step and the first decision (hash code,
selected key, ranking) that differs. On a GPU a training step is then timed: PyTorch as the original trains,
ours in the same mode, and our default. Fields are overridden as for joint_recall.py; a figure is drawn
beside FILE.

Where PyTorch lives in another environment, name its interpreter:

    python experiments/compare_pytorch.py --config=configs/mamba2_hax.py:cpu --torch_python=VENV/bin/python

Where it lives on another machine, give --exchange=DIR: the first call writes DIR/inputs.npz and says what to
run there; the second reads DIR/torch.npz.

Exit status: 0 done; 2 bad input, said in one line; 3 waiting for DIR/torch.npz.
"""

import dataclasses
import functools
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Both frameworks share a GPU: JAX must not take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from experiments import command_line, results
from experiments.comparison import exchange, ours, report, timing
from hax_jax.config import ConfigError
from hax_jax.training.environment import describe
from hax_jax.training.files import plain, write_atomically

DONE, BAD_INPUT, WAITING = 0, 2, 3
RUNNER = "experiments/pytorch_baseline/run.py"


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    try:
        options, rest = _parser().parse_known_args(argv[1:])
        _check(options, rest)
        experiment = None if options.golden else command_line.parse([argv[0], *rest]).experiment
        start = (
            exchange.from_experiment(experiment, options.steps)
            if experiment
            else exchange.from_golden(options.golden, options.steps)
        )
        # Asked before the run: a checkout may change during it.
        where = describe() | {"command": _told(argv)}
        theirs = _theirs(start, options)
        if theirs is None:
            return WAITING
        result = _compare(start, theirs, experiment, options, where)
        out = options.out or results.CHECKOUT / report.FOLDER / f"{start.name}.json"
        _write(result, out)
    except ConfigError as error:
        print(f"error: {command_line.one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    print(report.summary(result))
    print(f"result: {out}", flush=True)
    _draw(result, out.with_suffix(".svg"))
    return DONE


def _parser() -> results.Parser:
    parser = results.Parser(__doc__)
    parser.add_argument(
        "--golden", type=pathlib.Path, help="begin as this golden file of group E, no --config"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps to compare; default 20")
    parser.add_argument("--timing", choices=("auto", "on", "off"), default="auto", help="auto: on a GPU")
    parser.add_argument("--timed_steps", type=int, default=10, help="steps of each of the rounds; default 10")
    parser.add_argument(
        "--hold",
        type=pathlib.Path,
        help="make FILE.ready when all is compiled and wait for FILE before timing, where several take turns",
        metavar="FILE",
    )
    parser.add_argument("--torch_python", help="interpreter of an environment with PyTorch")
    parser.add_argument("--exchange", type=pathlib.Path, help="folder of the files that are exchanged")
    parser.add_argument("--commit", help="the commit of the code, for a copy of a checkout")
    parser.add_argument("--out", type=pathlib.Path, help="default results/pytorch/NAME.json")
    return parser


def _check(options: Any, rest: Sequence[str]) -> None:
    for name in ("steps", "timed_steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}", "an integer >= 1", getattr(options, name), "20 are usual")
    if options.golden and rest:
        raise ConfigError(
            "command line", "nothing beside --golden that describes a model", rest[0], "the file does so"
        )


def _theirs(start: exchange.Exchange, options: Any) -> exchange.Arrays | None:
    """PyTorch's steps: in this process, in another environment, or from a file made elsewhere."""
    if options.torch_python is None and options.exchange is None:
        return _in_this_process(start)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.exchange or pathlib.Path(temporary)
        inputs, outputs = folder / "inputs.npz", folder / "torch.npz"
        digest = exchange.write(start.arrays, inputs)
        if options.torch_python is not None:
            runner = [options.torch_python, str(results.CHECKOUT / RUNNER), str(inputs), str(outputs)]
            try:
                done = subprocess.run(runner, capture_output=True, text=True, check=False)
            except OSError as error:
                raise ConfigError(
                    "--torch_python", "an interpreter", options.torch_python, str(error.strerror)
                ) from error
            if done.returncode:
                said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
                raise ConfigError(
                    "--torch_python", "an interpreter with PyTorch and NumPy", options.torch_python, said
                )
        elif not outputs.exists():
            print(f"now run where PyTorch is: python {RUNNER} {inputs} {outputs}\nthen this again")
            return None
        return exchange.read_result(outputs, digest)


def _in_this_process(start: exchange.Exchange) -> exchange.Arrays:
    try:
        import torch
    except ImportError:
        raise ConfigError(
            "torch",
            "installed here",
            None,
            "name an environment that has it by --torch_python, or use --exchange",
        ) from None
    from experiments.pytorch_baseline.training import train

    found = train(start.arrays, "cuda" if torch.cuda.is_available() else "cpu")
    # What PyTorch's allocator keeps for itself would be missing to JAX.
    torch.cuda.empty_cache()
    return found


def _compare(start, theirs, experiment, options, where) -> dict[str, Any]:
    found = report.curves(start, theirs, ours.train(start, theirs))
    where["versions"] |= {
        name: version for name, version in found["torch_ran"]["versions"].items() if name != "python"
    }
    if options.commit is not None:
        where |= {"commit": options.commit, "uncommitted_changes": None}
    result: dict[str, Any] = {
        "format_version": results.FORMAT_VERSION,
        "task": report.TASK,
        "name": start.name,
        "origin": start.origin,
        **where,
        "model": dataclasses.asdict(start.model),
        "curves": found,
        "timing": None,
    }
    if experiment is not None:
        training, length = experiment.training, experiment.data.padded_length - 1
        result["batch"] = {"size": training.batch_size, "length": length}
        result["training"] = dataclasses.asdict(training)
        if options.timing == "on" or (options.timing == "auto" and _on_gpu()):
            print(report.summary(result), flush=True)
            result["timing"] = []
            wait = functools.partial(_hold, options.hold)
            for row in timing.measure(experiment, start, options.timed_steps, wait):
                print(row, flush=True)
                result["timing"].append(row)
    return result


def _hold(file: pathlib.Path | None) -> None:
    """Says that all is ready and returns when it is this comparison's turn."""
    if file is not None:
        file.with_name(f"{file.name}.ready").touch()
        while not file.exists():
            time.sleep(0.1)


def _told(argv: Sequence[str]) -> str:
    """The command without what names places on this machine."""
    places = ("--out", "--commit", "--exchange", "--hold", "--torch_python")
    words = []
    for word in results.without_options(argv[1:], places):
        name, given, value = word.partition("=")
        words.append(f"--golden={pathlib.Path(value).name}" if name == "--golden" and given else word)
    return shlex.join(["python", "experiments/compare_pytorch.py", *words])


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu" and "torch" in sys.modules


def _write(result: dict[str, Any], out: pathlib.Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, (results.to_text(plain(result)) + "\n").encode())
    except OSError as error:
        raise ConfigError("--out", "a file that can be written", str(out), str(error.strerror)) from error


def _draw(result: dict[str, Any], out: pathlib.Path) -> None:
    """Draws the figure if it can; the result is written already."""
    from experiments import plot_pytorch

    try:
        plot_pytorch.draw(result, out)
    except ConfigError as error:
        print(f"no figure: {command_line.one_line(error)}", file=sys.stderr)
    else:
        print(f"figure: {out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
