"""Creates the joint recall data set: the published one by default, or any other table sizes.

    python experiments/create_dataset.py --data_dir=data/joint_recall

takes about a minute and half a gigabyte for the published 1,440,000 training, 14,400 validation and
14,400 test items, bit for bit what the original generator writes. Interrupted, the same command goes on.

    --splits=valid,test     stores only the small splits, 10 MB (the training split is still drawn: the three
                            splits follow each other in one random stream)
    --text                  also writes the original's text files, 7.5 GB at the published sizes
    --max_n_context=1 --min_n_context=1
                            makes multi-query associative recall
    --verify                creates nothing; reads a data set and compares it with its checksums

Exit status: 0 done, 2 bad input or a folder that cannot be used, 130 interrupted.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from hax_jax.config import ConfigError, DataConfig
from hax_jax.data.dataset import Plan, create_dataset, verify_dataset
from hax_jax.data.joint_recall import SPLITS

_DEFAULTS = DataConfig()


def main(arguments: Sequence[str]) -> int:
    """Runs the command with its arguments, program name first, and returns the exit status."""
    values = _flag_values()
    try:
        rest = values(list(arguments))[1:]
        if values["help"].value:
            print(__doc__, values.get_help(), sep="\n")
            return 0
        if rest:
            raise ConfigError("command line", "flags only, --NAME=VALUE", rest[0], "--help lists them")
        if not values["data_dir"].value:
            raise ConfigError("data_dir", "the folder of the data set", None, "add --data_dir=DIR")
        if values["verify"].value:
            verify_dataset(values["data_dir"].value, _say)
        else:
            create_dataset(_plan(values), _say)
    except (flags.Error, ConfigError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _flag_values() -> flags.FlagValues:
    values = flags.FlagValues()

    def integer(name: str, default: int, text: str) -> None:
        flags.DEFINE_integer(name, default, text, flag_values=values)

    flags.DEFINE_string("data_dir", None, "The folder to create.", flag_values=values)
    integer("min_n_context", _DEFAULTS.min_n_context, "Fewest contexts of a table.")
    integer("max_n_context", _DEFAULTS.max_n_context, "Most contexts of a table.")
    integer("min_n_key", _DEFAULTS.min_n_key, "Fewest keys of a table.")
    integer("max_n_key", _DEFAULTS.max_n_key, "Most keys of a table.")
    integer("n_value", _DEFAULTS.n_value, "Number of values.")
    integer("seed", _DEFAULTS.seed, "Seed of NumPy's legacy generator.")
    integer("n_train_per_pair", 10_000, "Training items for each (n_context, n_key).")
    integer("n_eval_per_pair", _DEFAULTS.n_eval_per_pair, "Items of validation, and of test, for each pair.")
    # The original's names for the two.
    flags.DEFINE_alias("n_train_per_context_key", "n_train_per_pair", flag_values=values)
    flags.DEFINE_alias("n_test_per_context_key", "n_eval_per_pair", flag_values=values)
    flags.DEFINE_list("splits", list(SPLITS), "The splits to store.", flag_values=values)
    flags.DEFINE_bool("text", False, "Write the original's text files too.", flag_values=values)
    flags.DEFINE_bool("verify", False, "Only check the data set in --data_dir.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    return values


def _plan(values: flags.FlagValues) -> Plan:
    names = ("min_n_context", "max_n_context", "min_n_key", "max_n_key", "n_value", "seed", "n_eval_per_pair")
    given: dict[str, Any] = {name: values[name].value for name in values}
    config = DataConfig(data_dir=given["data_dir"], **{name: given[name] for name in names})
    return Plan(config, given["n_train_per_pair"], tuple(given["splits"]), given["text"])


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
