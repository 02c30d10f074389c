"""Moves weights between runs of this project and PyTorch, both ways, bit for bit.

    python experiments/convert_checkpoint.py runs/mamba2_hax model.safetensors       # out of a run
    python experiments/convert_checkpoint.py model.pt runs/imported --config=configs/mamba2_hax.py
    python experiments/convert_checkpoint.py model.pt model.safetensors              # one file into another

A .pt file (.pth, .bin) is read and written without PyTorch, and one that holds anything but weights is
refused; names and layouts in files are the original's. A run's folder made from a file can be scored by
evaluate.py and trained on by joint_recall.py with the same --config. --config and overrides of its fields
are those of joint_recall.py; a .safetensors file that came out of a run knows them itself. With --config a
file is checked against the model also where it becomes another file.

Exit status: 0 done, 1 no whole checkpoint, 2 bad input, said in one line.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

import hax_jax
from experiments import command_line, results
from hax_jax.config import ConfigError, Experiment
from hax_jax.interop.files import WeightsError, is_weights_file, read_weights, write_weights
from hax_jax.interop.state_dict import StateDictError

# Where a file from a run keeps the run's settings.
EXPERIMENT = "hax_jax.experiment"


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    from hax_jax.training.errors import CheckpointError

    try:
        options, rest = _parser().parse_known_args(argv[1:])
        experiment = command_line.parse([argv[0], *rest]).experiment if rest else None
        print(convert(options, experiment))
    except (ConfigError, StateDictError, WeightsError) as error:
        print(f"error: {command_line.one_line(error)}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"error: {command_line.one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> results.Parser:
    parser = results.Parser(__doc__)
    parser.add_argument("source", type=pathlib.Path, metavar="FROM")
    parser.add_argument("target", type=pathlib.Path, metavar="TO")
    parser.add_argument("--checkpoint", default="best", help="of a run: best (the default) or latest")
    parser.add_argument(
        "--entry", default="", help="of a .pt file: which dict of tensors, if there are several"
    )
    parser.add_argument("--prefix", default="", help="what precedes a name in the file, such as backbone.")
    parser.add_argument("--round", action="store_true", help="allow a narrower dtype to round the weights")
    return parser


def convert(options: Any, experiment: Experiment | None) -> str:
    """Does what the options say and tells it in a line; nothing that exists is overwritten."""
    source, target = options.source, options.target
    if is_weights_file(target) and target.exists():
        raise ConfigError("TO", "a file that is not there yet", str(target), "delete it or choose another")
    if not is_weights_file(source):
        return _out_of_run(options, experiment)
    weights, metadata = read_weights(source, options.entry)
    weights = _without_prefix(weights, options.prefix, source)
    if experiment is None and EXPERIMENT in metadata:
        experiment = _from_metadata(metadata, source)
    if is_weights_file(target):
        if experiment is not None:
            _check(weights, experiment)
        write_weights(target, weights, metadata)
        return f"{len(weights)} tensors: {target}"
    if experiment is None:
        raise ConfigError("--config", command_line.CONFIG_FILE, None, f"for example {command_line.EXAMPLE}")
    from hax_jax.interop.checkpoint import import_weights

    import_weights(weights, experiment, target, rounding=options.round)
    return f"{len(weights)} tensors as step 0 of {experiment.name}, seed {experiment.seed}: {target}"


def _out_of_run(options: Any, experiment: Experiment | None) -> str:
    if not is_weights_file(options.target):
        raise ConfigError(
            "TO",
            "a file named .safetensors or .pt",
            str(options.target),
            "a run's folder can simply be copied",
        )
    if experiment is not None:
        raise ConfigError("--config", "left out, for a run knows its own", experiment.name, "leave it out")
    from hax_jax.interop.checkpoint import export_weights

    exported = export_weights(options.source, options.checkpoint)
    told = {
        "format": "pt",
        "hax_jax.version": hax_jax.__version__,
        "hax_jax.step": str(exported.step),
        EXPERIMENT: json.dumps(exported.experiment.to_dict(), sort_keys=True),
    }
    write_weights(options.target, _with_prefix(exported.weights, options.prefix), told)
    said = f"{len(exported.weights)} tensors of step {exported.step}: {options.target}"
    if exported.left_out:
        said += (
            f"\n{len(exported.left_out)} fixed hash projections have no place in it: they follow from seed "
            f"{exported.experiment.seed}, so convert back with the same seed"
        )
    return said


def _without_prefix(weights: dict[str, np.ndarray], prefix: str, path: pathlib.Path) -> dict[str, np.ndarray]:
    """The weights whose names begin with the prefix, without it; the others belong to something else."""
    found = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    if not found:
        raise WeightsError(path, f"no name begins with {prefix!r}", f"names begin as {next(iter(weights))!r}")
    return found


def _with_prefix(weights: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {f"{prefix}{name}": array for name, array in weights.items()}


def _from_metadata(metadata: dict[str, str], path: pathlib.Path) -> Experiment:
    try:
        return Experiment.from_dict(json.loads(metadata[EXPERIMENT]))
    except (ValueError, AttributeError) as error:
        raise WeightsError(path, f"its settings cannot be read ({error})", "give --config") from error


def _check(weights: dict[str, np.ndarray], experiment: Experiment) -> None:
    from flax import nnx

    from hax_jax.interop.state_dict import check_fits
    from hax_jax.models import build_model

    check_fits(nnx.eval_shape(lambda: build_model(experiment.model, rngs=nnx.Rngs(0))), weights)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
