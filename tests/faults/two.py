"""One of two processes that train together: python tests/faults/two.py PORT NUMBER FOLDER [full].

With `full` the disk is full when the last checkpoint is to be written.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from hax_jax.training import processes, train
from hax_jax.training.checkpoints import Checkpoints
from tests.training.tiny import TinyModel, tiny_experiment


def main() -> None:
    """Joins the other process and trains."""
    port, number, folder = sys.argv[1:4]
    os.environ |= {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": number,
    }
    processes.join()
    if sys.argv[4:] == ["full"]:
        _full_at_the_end()
    settings = tiny_experiment(
        num_steps=60, log_every_steps=2, eval_every_steps=10, checkpoint_every_steps=6, learning_rate=2e-3
    )
    print(train(settings, pathlib.Path(folder), model=TinyModel()).stopped, flush=True)


def _full_at_the_end() -> None:
    write = Checkpoints._write

    def fails(checkpoints, step, *arguments):
        if checkpoints.folder.name == "checkpoints" and step == 60:
            raise OSError(28, "No space left on device")
        write(checkpoints, step, *arguments)

    Checkpoints._write = fails


if __name__ == "__main__":
    main()
