"""What the config files share: the defaults, and the arguments after a colon.

The defaults of every field stand in `hax_jax/config.py` alone; a config file names what its row changes.
`--config=configs/mamba2_hax.py:cpu` hands 'cpu' to the file's `get_config`. The arguments, joined by a
comma where several are wanted:

- cpu: a joint recall of 3 contexts x 3 keys x 16 values that two CPU cores learn in minutes;
- parity: the original's routing, faults included, in bfloat16 throughout as the paper trained.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from hax_jax.config import ConfigError, Experiment

MAMBA = {"arch": "mamba", "state_size": 16}
MAMBA2 = {"arch": "mamba2", "state_size": 32}


def experiment(name: str, argument: str, **model: Any) -> ConfigDict:
    """The settings of one row: the defaults, the row's own `model` fields, then the arguments."""
    config = ConfigDict(Experiment(name=name).to_dict())
    config.model.update(model)
    for word in argument.split(",") if argument else ():
        if word not in ARGUMENTS:
            raise ConfigError(
                "config argument", f"one of {', '.join(ARGUMENTS)}", word,
                f"for example --config=configs/{name}.py:cpu",
            )
        ARGUMENTS[word](config)
        config.name += f"_{word}"
    return config


def _cpu(config: ConfigDict) -> None:
    config.data.update(min_n_context=3, max_n_context=3, min_n_key=3, max_n_key=3, n_eval_per_pair=1_000)
    # Twice the width: narrower models need more time, and with some seeds stay near 80 % for long. Fewer keys
    # than the 43 positions.
    config.model.update(
        hidden_size=2 * config.model.hidden_size, head_dim=2 * config.model.head_dim, sparse_keys=16
    )
    config.training.update(
        batch_size=16,
        num_steps=2_000,
        learning_rate=2e-3,
        warmup_steps=100,
        schedule="cosine",
        adam_b2=0.98,
        log_every_steps=50,
        eval_every_steps=250,
        eval_batch_size=250,
        checkpoint_every_steps=500,
    )


def _parity(config: ConfigDict) -> None:
    config.model.update(routing="parity", precision="bfloat16")


ARGUMENTS: dict[str, Callable[[ConfigDict], None]] = {"cpu": _cpu, "parity": _parity}
