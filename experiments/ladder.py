"""Trains one variant of mamba2_hax on small tables of one size, and writes what came of it to a JSON file.

    python experiments/ladder.py --rung=4 --variant=bits4 [--steps=3000] [--seeds=0,1] [--batch_size=32]

A rung is the size of its tables: 4 means 4 contexts of 4 keys. Each variant below changes a few settings for
a reason and says what it should do. The file, results/ladder/RUNG_VARIANT.json, holds what was predicted, the
settings, and for each seed the validation accuracy and the source recall over the steps, and how many keys of
its bucket a query sees at the end. --list names the variants.

Exit status: 0 done; 2 bad input, said in one line; 143 stopped by a signal, nothing kept.
"""

import dataclasses
import pathlib
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments import results
from hax_jax.config import ConfigError, Experiment

FOLDER = results.CHECKOUT / results.FOLDER / "ladder"
_HASHED = "sign_bin_lsh"
_HAX = f"{_HASHED}+key_selection"


@dataclasses.dataclass(frozen=True)
class Variant:
    """Settings to change, below `model` and `training`, and what that should do, written before the run."""

    prediction: str
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)


VARIANTS = {
    "hax": Variant("The reference: 8 bits, 64 keys. Hashing shows few answers, key selection more."),
    "base": Variant(
        "No sparse branch: as fast as the reference if the recurrent state alone holds the table, far behind "
        "if attention does the work.",
        model={"sparse_arch": "none"},
    ),
    "bits4": Variant(
        "16 buckets in place of 256: many more answers collide with their query, so that hashing gets a "
        "gradient; its recall rises and the plateau ends earlier.",
        model={"num_hash": 4},
    ),
    "bits2": Variant(
        "4 buckets: nearly every answer may collide, limited by the keys that a query may see.",
        model={"num_hash": 2},
    ),
    "lsh": Variant(
        "Hashing alone with 32 keys: what it learns without key selection beside it.",
        model={"sparse_arch": "sign_bin_lsh", "sparse_keys": 32},
    ),
    "lsh_bits3": Variant(
        "Hashing alone with 8 buckets and 32 keys: recall well above that with 8 bits, and accuracy with it.",
        model={"sparse_arch": "sign_bin_lsh", "sparse_keys": 32, "num_hash": 3},
    ),
    "keys8": Variant(
        "8 keys in all: if attention to the answer were what solves the task, far behind the reference.",
        model={"sparse_keys": 8},
    ),
    "base_state4": Variant(
        "No sparse branch and an eighth of the state: too little for the table, so below the reference.",
        model={"sparse_arch": "none", "state_size": 4},
    ),
    "hax_state4": Variant(
        "An eighth of the state, which makes retrieval worth more: recall rises above that of the reference.",
        model={"state_size": 4},
    ),
    "fast": Variant(
        "Second moment forgotten in 50 steps (adam_b2 0.98): plateaus end earlier.",
        training={"adam_b2": 0.98},
    ),
    # What dense attention would learn in the branch's place: hashing can hope for no more.
    "full": Variant(
        "Attention to all keys: solves the table, faster than the reference; what hashing then misses, it "
        "misses because of its codes.",
        model={"sparse_arch": "full"},
    ),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    try:
        options = _options(argv)
        if options.list:
            print("\n".join(f"{name}: {variant.prediction}" for name, variant in VARIANTS.items()))
            return 0
        result = measure(options, ["python", *argv])
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if result is None:
        return 143
    out = options.out or FOLDER / f"{options.rung}x{options.rung}_{options.variant}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(results.to_text(result) + "\n")
    print(f"result: {out}")
    return 0


def _options(argv: Sequence[str]) -> Any:
    parser = results.Parser(__doc__)
    parser.add_argument("--list", action="store_true", help="name the variants and stop")
    parser.add_argument("--rung", type=int, default=4, help="contexts, and keys, of the tables; default 4")
    parser.add_argument("--variant", default="hax", help="default hax")
    parser.add_argument("--steps", type=int, default=3_000, help="default 3000")
    parser.add_argument("--seeds", default="0,1", help="trained side by side; default 0,1")
    parser.add_argument("--batch_size", type=int, default=64, help="default 64")
    parser.add_argument(
        "--precision", default="default", help="float32 on a CPU, which lacks bfloat16 products"
    )
    parser.add_argument("--out", type=pathlib.Path, help="default results/ladder/RUNG_VARIANT.json")
    parser.add_argument("--commit", help="the code's commit, where git does not know it")
    options = parser.parse_args(argv[1:])
    if options.variant not in VARIANTS:
        raise ConfigError("--variant", f"one of {', '.join(VARIANTS)}", options.variant, "see --list")
    return options


def settings(options: Any) -> Experiment:
    """The experiment of a rung and a variant; every setting checked."""
    variant, size = VARIANTS[options.variant], options.rung
    interval = max(options.steps // 20, 1)
    experiment = Experiment(name=f"{size}x{size}_{options.variant}").to_dict()
    experiment["model"] |= {"sparse_arch": _HAX, "precision": options.precision, **variant.model}
    experiment["data"] |= {
        **dict.fromkeys(("min_n_context", "max_n_context", "min_n_key", "max_n_key"), size),
        "n_eval_per_pair": 500,
    }
    experiment["training"] |= {
        "batch_size": options.batch_size,
        "num_steps": options.steps,
        "warmup_steps": min(500, options.steps // 10),
        "schedule": "linear",
        "decay_steps": options.steps // 5,
        "log_every_steps": interval,
        "eval_every_steps": interval,
        "eval_batch_size": 250,
        "checkpoint_every_steps": options.steps,
        "tensorboard": False,
        "population_seeds": options.seeds,
        **variant.training,
    }
    return Experiment.from_dict(experiment)


def measure(options: Any, command: Sequence[str]) -> dict[str, Any] | None:
    """Trains the variant in a folder that is thrown away; what is worth keeping, None if it was stopped."""
    from experiments import explain
    from hax_jax.training import environment, load, train
    from hax_jax.training.metrics import read_metrics
    from hax_jax.training.population import MEMBERS

    experiment = settings(options)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ended = train(experiment, pathlib.Path(folder) / "run")
        if ended.test_accuracy is None:
            return None
        lines = [line for line in read_metrics(pathlib.Path(folder) / "run") if line["kind"] == "valid"]
        runs = [pathlib.Path(folder) / "run" / MEMBERS / member.name for member in experiment.members]
        # Recall is worth little where buckets are full.
        hashes = _HASHED in experiment.model.sources
        seen = [explain.keys_seen(load(run, checkpoint="latest")) if hashes else [] for run in runs]
        (session,) = environment.read_sessions(pathlib.Path(folder) / "run" / "run.json")
    where = {name: session.get(name) for name in ("commit", "uncommitted_changes", "device", "versions")}
    where["commit"] = where["commit"] or options.commit
    members = []
    for index, member in enumerate(experiment.members):
        mine = [line for line in lines if line["member"] == index]
        names = [name for name in mine[0] if name not in ("step", "kind", "member", "seconds")]
        members.append(
            {
                "seed": member.seed,
                "accuracy": round(mine[-1]["accuracy"], 5),
                "buckets": [{name: layer[name] for name in ("seen", "empty")} for layer in seen[index]],
                "curve": {name: [round(line[name], 4) for line in mine] for name in names},
            }
        )
    return {
        "format_version": results.FORMAT_VERSION,
        "name": experiment.name,
        "prediction": VARIANTS[options.variant].prediction,
        "command": results.without_places(shlex.join(command)),
        **where,
        "seconds": round(time.perf_counter() - begin, 1),
        "config": experiment.to_dict(),
        "step": sorted({line["step"] for line in lines}),
        "members": members,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv))
