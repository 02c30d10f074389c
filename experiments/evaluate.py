"""Scores a trained run on a split, with accuracy by table size.

    python experiments/evaluate.py WORKDIR [--split=test] [--checkpoint=best] [--data.FIELD=VALUE ...]

WORKDIR is the folder of a run. Any field of the task can be set, to other table sizes above all:
--data.min_n_context=2 --data.max_n_context=8 scores tables of 2 to 8 contexts. Tables larger than those of
the training use token ids that the model has never seen, as far as its vocabulary goes, and a line says how
many. A run that was validated on a data set is scored on the stream when the sizes differ, unless
--data.data_dir names a data set of them.

Exit status: 0 done, 1 no whole checkpoint, 2 bad input (one line on stderr).
"""

import argparse
import dataclasses
import pathlib
import sys
from typing import Any, NoReturn

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from hax_jax.config import ConfigError, DataConfig
from hax_jax.training import TrainingError
from hax_jax.training.evaluate import EvalResult
from hax_jax.training.files import write_json
from hax_jax.training.relabel import check_fits
from hax_jax.training.restore import FOLDERS, Trained, load, score

_SIZES = ("min_n_context", "max_n_context", "min_n_key", "max_n_key", "n_value")


def main(arguments: list[str] | None = None) -> int:
    """Scores a run as the command line says and returns the exit status."""
    try:
        options = vars(_parser().parse_args(arguments))
        _check(options)
        trained = load(options["workdir"], checkpoint=options["checkpoint"], say=_say)
        data = _task(trained.experiment.data, options)
        unseen = check_fits(data, trained.experiment.data, trained.experiment.model.vocab_size)
        if unseen:
            _say(f"{unseen} token ids of these tables were never trained")
        result = score(trained, options["split"], data, options["batch_size"])
        _report(trained, data, options, result)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError("command line", "WORKDIR and flags that --help lists", message, "see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument("--split", default="test", help="test (the default) or valid")
    parser.add_argument("--checkpoint", default="best", help=f"{' or '.join(FOLDERS)}; default best")
    parser.add_argument("--batch_size", type=int, help="sequences at once; default as in the run")
    parser.add_argument("--json", type=pathlib.Path, help="also write the scores to this file")
    for field in dataclasses.fields(DataConfig):
        # Every field of the task is an integer or a string.
        kind = int if isinstance(field.default, int) else str
        parser.add_argument(f"--data.{field.name}", type=kind, help=field.metadata["expected"])
    return parser


def _check(options: dict[str, Any]) -> None:
    for name in ("split", "checkpoint"):
        # argparse makes a list of `--split=--`.
        if not isinstance(options[name], str):
            raise ConfigError(f"--{name}", "a name", options[name], "see --help")
    if options["split"] not in ("valid", "test"):
        raise ConfigError("--split", "valid or test", options["split"], "the training items have no end")
    if options["batch_size"] is not None and options["batch_size"] < 1:
        raise ConfigError("--batch_size", "an integer >= 1", options["batch_size"], "leave it out")


def _task(trained: DataConfig, options: dict[str, Any]) -> DataConfig:
    """The run's task with the fields that the command line sets."""
    given = {
        field.name: options[f"data.{field.name}"]
        for field in dataclasses.fields(DataConfig)
        if options[f"data.{field.name}"] is not None
    }
    data = dataclasses.replace(trained, **given)
    other_sizes = any(getattr(data, name) != getattr(trained, name) for name in _SIZES)
    if other_sizes and data.eval_source == "dataset" and not given.keys() & {"eval_source", "data_dir"}:
        _say("tables of other sizes than the run's data set: scoring on the stream")
        data = dataclasses.replace(data, eval_source="stream", train_source="stream")
    return data


def _report(trained: Trained, data: DataConfig, options: dict[str, Any], result: EvalResult) -> None:
    print(
        f"{trained.experiment.name}, {options['checkpoint']} checkpoint (step {trained.step}), "
        f"{options['split']} split: accuracy {100 * result.accuracy:.2f}%, loss {result.loss:.4f}, "
        f"{result.num_items} sequences"
    )
    print("accuracy in % by table size:")
    print(result.text())
    if options["json"] is not None:
        scores = {"accuracy": result.accuracy, "loss": result.loss, "by_size": result.table()}
        asked = {"step": trained.step, **{name: options[name] for name in ("split", "checkpoint")}}
        write_json(options["json"], {**asked, "data": dataclasses.asdict(data), **scores})


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
