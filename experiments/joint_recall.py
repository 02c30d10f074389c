"""Trains a model on joint recall and tests the best of it: one row of Table 3, or any other settings.

    python experiments/joint_recall.py --config=configs/mamba2_hax.py
    python experiments/joint_recall.py --config=configs/mamba2_hax.py:cpu --config.training.num_steps=500

The second is the small form for a machine without a GPU. The run lives in --workdir (default runs/NAME);
the same command again goes on where it stopped. --help lists every field that can be overridden.

Several seeds and learning rates side by side in one program, every rate with every seed:

    python experiments/joint_recall.py --config=configs/mamba2_hax.py \
        --config.training.population_seeds=0,1,2 --config.training.population_learning_rates=3e-3,1e-3,3e-4

Each member then has the folder of an ordinary run in WORKDIR/members; the test accuracy is their mean.

Exit status: 0 finished; 1 the run could not go on; 2 bad input, said in one line; 143 stopped by a signal,
with everything saved.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

# Works from a checkout that is not installed; the config files import `configs.common`.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments import command_line
from hax_jax.config import ConfigError

FINISHED, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 143


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    if command_line.HELP_FLAGS.intersection(argv[1:]):
        print(__doc__, command_line.describe(), sep="\n")
        return FINISHED
    try:
        command = command_line.parse(argv)
        return run(command)
    except ConfigError as error:
        print(f"error: {command_line.one_line(error)}", file=sys.stderr)
        return BAD_INPUT


def run(command: command_line.Command) -> int:
    """Trains, and prints the test accuracy on the last line."""
    # Imported here, so that a mistyped command line is answered at once.
    from hax_jax import training

    _prepare_jax(command)
    try:
        result = training.train(command.experiment, command.workdir)
    except training.TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    if result.test_accuracy is None:
        return INTERRUPTED
    for member in result.members or ():
        accuracy = member["test_accuracy"]
        ended = member["stopped"] if accuracy is None else f"{100 * accuracy:.2f}%"
        print(f"{member['name']}: {ended}")
    print(f"test accuracy: {100 * result.test_accuracy:.2f}%", flush=True)
    return FINISHED


def _prepare_jax(command: command_line.Command) -> None:
    """Joins the run's other processes, keeps compiled programs, and checks that there is a device at all."""
    import jax

    from hax_jax.training import processes
    from hax_jax.training.compilation import keep_programs

    if command.distributed:
        processes.join()
    keep_programs(command.compilation_cache)
    try:
        jax.devices()
    except RuntimeError as error:
        raise ConfigError(
            "JAX_PLATFORMS",
            "a platform that is there",
            os.environ.get("JAX_PLATFORMS"),
            command_line.one_line(error),
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv))
