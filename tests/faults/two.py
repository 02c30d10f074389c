"""One of two processes that train together: python tests/faults/two.py PORT NUMBER FOLDER [full].

With `full` the disk is full when the last checkpoint is to be written.
"""

import contextlib
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from hax_jax.training import processes, train
from tests.training.tiny import TinyModel, full_disk_at, tiny_experiment


def main() -> None:
    """Joins the other process and trains."""
    port, number, folder = sys.argv[1:4]
    os.environ |= {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": number,
    }
    processes.join()
    settings = tiny_experiment(
        num_steps=60, log_every_steps=2, eval_every_steps=10, checkpoint_every_steps=6, learning_rate=2e-3
    )
    with full_disk_at(settings.training.num_steps) if sys.argv[4:] == ["full"] else contextlib.nullcontext():
        print(train(settings, pathlib.Path(folder), model=TinyModel()).stopped, flush=True)


if __name__ == "__main__":
    main()
