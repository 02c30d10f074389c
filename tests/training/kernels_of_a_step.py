"""The kernels in a training step for Hopper GPUs: python tests/training/kernels_of_a_step.py.

Prints JSON: their operands' and results' types on four (simulated) devices, and on one with a quarter of the
batch, each where nothing but the machine says that kernels should run.
"""

import dataclasses
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from hax_jax.data import make_split
from hax_jax.ops import dispatch
from hax_jax.training.dispatch import make_update, take_raws
from hax_jax.training.initialise import prepare
from hax_jax.training.optimizer import make_optimizer
from hax_jax.training.sharding import make_mesh, put_batch
from tests.faults.devices import experiment


def kernels(batch_size: int, mesh: jax.sharding.Mesh, members: int) -> list[str]:
    """Those of an update as the training loop puts it together; of so many members, 0 for a plain run."""
    settings = experiment()
    sizes = {"num_layers": 1, "hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 16}
    model = dataclasses.replace(settings.model, **sizes)
    training = dataclasses.replace(settings.training, batch_size=batch_size)
    settings = dataclasses.replace(settings, model=model, training=training)
    split = make_split(settings.data, "train", mesh.size)
    beginning = prepare(settings, None, make_optimizer(training), mesh)
    rates = jax.ShapeDtypeStruct((), np.float32)
    if members:
        stack = lambda x: jax.ShapeDtypeStruct((members, *x.shape), x.dtype)  # noqa: E731
        shapes, rates = jax.tree.map(stack, (beginning.shapes, rates))
        beginning = dataclasses.replace(beginning, shapes=shapes)
    raws = put_batch(mesh, take_raws(split.iterator(batch_size, repeat=True), 1, 1), axis=2)
    update = make_update(
        beginning, split.materialize, training, mesh, population=bool(members), one_graph=False
    )
    traced = update.trace(beginning.shapes, raws, np.int32(1), rates, None)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return sorted(re.findall(r"custom_call @mosaic_gpu.* : (\(tensor.*)$", text, re.MULTILINE))


def main() -> None:
    """A plain run and a population, on four devices and on one."""
    assert jax.device_count() == 4
    dispatch.missing_for_mosaic_gpu = lambda: None
    found = {}
    for members in (0, 3):
        four = make_mesh()
        found[f"{members} members"] = {"on_four": kernels(16, four, members)}
    # From here on a machine with one GPU.
    first = jax.devices()[0]
    jax.device_count, jax.devices = lambda: 1, lambda: [first]
    for members in (0, 3):
        found[f"{members} members"]["on_one"] = kernels(4, make_mesh(), members)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
