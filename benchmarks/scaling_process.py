"""What the scaling benchmark asks of one process, on all devices that it sees; the last line is JSON.

python benchmarks/scaling_process.py describe
python benchmarks/scaling_process.py time --config=mamba2_hax --set=training.batch_size=128
python benchmarks/scaling_process.py decide --config=mamba2_hax --steps=40 --out=FILE.npz
"""

import argparse
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from benchmarks import memory, timing
from benchmarks.step_program import StepProgram, load
from experiments.comparison.ours import decisions
from hax_jax.config import Experiment
from hax_jax.training.compilation import keep_programs
from hax_jax.training.environment import describe, resolved_implementation
from hax_jax.training.files import plain
from hax_jax.training.sharding import kernels_over, replicated
from hax_jax.training.state import Purpose


def main() -> None:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("describe", "time", "decide"))
    parser.add_argument("--config")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    keep_programs()
    if given.what == "describe":
        found = describe()
    elif given.what == "time":
        found = measure(load(given.config, given.set, given.tiny), timing.Plan())
    else:
        found = decide(load(given.config, given.set, given.tiny), given.steps, given.out)
    print(json.dumps(plain(found)))


def measure(experiment: Experiment, plan: timing.Plan) -> dict:
    """Seconds of an update, tokens and memory."""
    program = StepProgram(experiment)
    program.compile()
    program.start()
    timed = timing.measure(program.dispatch, [()], plan)
    scale = 1 / program.steps
    repeats = {
        name: x if name == "samples" else [scale * y for y in x] for name, x in timed["repeats"].items()
    }
    seconds = scale * timed["seconds"]
    tokens = float(np.sum(jax.device_get(program.dispatch()["tokens"])))
    return {
        "devices": jax.device_count(),
        "batch_size": experiment.training.batch_size,
        "implementation": resolved_implementation(experiment.model),
        "steps_per_dispatch": program.steps,
        "time": {"seconds": seconds, "spread": timed["spread"], "repeats": repeats},
        "tokens_per_s": tokens / seconds,
        "positions_per_s": program.positions / seconds,
        "memory": {"program": memory.of_program(program.compiled), "device": memory.of_device()},
        "first_step": program.seconds,
    }


def decide(experiment: Experiment, steps: int, path: pathlib.Path) -> dict:
    """Trains, and keeps what the model decides on each batch before the update that learns from it."""
    program = StepProgram(experiment, steps=1)
    structure, mesh = program.beginning.structure, program.mesh

    def look(params, buffers, key, step, raws):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, Purpose.TRAIN), step), 0)
        batch = program.materialize(jax.tree.map(lambda x: x[0, 0], raws))
        model: Any = structure.merge(params, buffers)
        draws = model.draw(key, *batch.tokens.shape, train=True)
        output = model(batch.tokens, padding_mask=batch.padding_mask, draws=draws, train=True)
        return decisions([layer.branch for layer in output.layers], batch, draws)

    looked = jax.jit(kernels_over(mesh, look), out_shardings=replicated(mesh))
    program.compile()
    program.begin()
    kept: dict[str, list[np.ndarray]] = {}
    for _ in range(steps):
        state = program.state
        found = looked(state.params, state.buffers, state.key, state.step, program.next_raws())
        for name, x in jax.device_get(found).items():
            kept.setdefault(name, []).append(x.astype(np.int32))
        jax.block_until_ready(program.dispatch())
    together: dict[str, Any] = {name: np.stack(arrays) for name, arrays in kept.items()}
    np.savez_compressed(path, **together)
    return {"steps": steps, "decisions": sorted(kept)}


if __name__ == "__main__":
    main()
