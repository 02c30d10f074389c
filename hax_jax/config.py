"""The settings of an experiment, and every check of their ranges and combinations.

A config file under `configs/` builds an `ml_collections.ConfigDict`; `Experiment.from_dict` turns it
into the frozen dataclasses below. Nothing else in the project checks a setting, and everything that
runs receives these dataclasses, so a bad value is refused here, before anything is compiled or written.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from hax_jax.fields import Checked, ConfigError, as_numbers, choice, flag, integer, number, numbers, text
from hax_jax.model_config import MAX_LENGTH, SOURCES, ModelConfig

# What the rest of the project takes from here, wherever it is written.
__all__ = [
    "MAX_LENGTH",
    "PAD_TOKEN",
    "SOURCES",
    "ConfigError",
    "DataConfig",
    "Experiment",
    "ModelConfig",
    "TrainingConfig",
]

# The task's pad; its other token ids are laid out in `hax_jax.data`.
PAD_TOKEN = 3


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """Joint recall: table sizes, and where each split comes from.

    With `max_n_context` 1 the task is multi-query associative recall. 'stream' makes items on the
    device from (seed, split, index); 'dataset' reads what `experiments/create_dataset.py` wrote to
    `data_dir`.
    """

    min_n_context: int = integer(5, 1)
    max_n_context: int = integer(16, 1)
    min_n_key: int = integer(5, 1)
    max_n_key: int = integer(16, 1)
    n_value: int = integer(16, 2)
    seed: int = integer(1, 0, 2**32 - 1)
    train_source: str = choice("stream", ("stream", "dataset"))
    eval_source: str = choice("stream", ("stream", "dataset"))
    data_dir: str = text("")
    # Items of the validation and of the test split for each (n_context, n_key).
    n_eval_per_pair: int = integer(100, 1, 10**6)
    # Several items a row, in rows of at most so many positions; 0 gives every item a padded row of its own.
    packing: int = integer(0, 0, MAX_LENGTH)
    # A stored training split of at most so many MiB is kept on the device; larger ones are read ahead.
    keep_on_device_mib: int = integer(1024, 0, 2**20)
    # How training walks over the table sizes: as the published file does, or in an order that gives batches
    # nearly equal numbers of tokens. The items are the same.
    order: str = choice("file", ("file", "even"))

    @property
    def padded_length(self) -> int:
        """Tokens of a padded item; a model sees one fewer."""
        return 2 * self.max_n_context * (2 * self.max_n_key + 1) + 2

    @property
    def num_pairs(self) -> int:
        """Number of table sizes (n_context, n_key)."""
        return (self.max_n_context - self.min_n_context + 1) * (self.max_n_key - self.min_n_key + 1)

    @property
    def min_vocab_size(self) -> int:
        """Smallest vocabulary that holds every token id of the task."""
        return 10 + self.n_value + self.max_n_key + self.max_n_context

    def check_combinations(self) -> None:
        for kind in ("context", "key"):
            low, high = getattr(self, f"min_n_{kind}"), getattr(self, f"max_n_{kind}")
            if low > high:
                raise ConfigError(
                    f"data.min_n_{kind}",
                    f"at most data.max_n_{kind}={high}",
                    low,
                    "lower it or raise the maximum",
                )
        if self.padded_length > MAX_LENGTH:
            raise ConfigError(
                "data.max_n_key",
                f"small enough for sequences of at most {MAX_LENGTH} tokens",
                self.max_n_key,
                f"these tables make sequences of {self.padded_length} tokens",
            )
        if 0 < self.packing < self.padded_length - 1:
            raise ConfigError(
                "data.packing",
                f"0, or at least {self.padded_length - 1}, the positions of the longest item",
                self.packing,
                "raise it, or use 0: an item lies whole in one row",
            )
        if "dataset" in (self.train_source, self.eval_source) and not self.data_dir:
            raise ConfigError(
                "data.data_dir",
                "the folder of the data set, since a split comes from 'dataset'",
                self.data_dir,
                "make one with `python experiments/create_dataset.py --data_dir=DIR`",
            )


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Checked):
    """How a model is trained: optimiser, schedule, and what happens every so many steps."""

    batch_size: int = integer(64, 1, 10**7)
    num_steps: int = integer(400_000, 1)
    learning_rate: float = number(2e-3, 0.0, 1e3)
    warmup_steps: int = integer(5_000, 0)
    # After the warm-up: constant, or a decay that reaches `final_learning_rate` at `num_steps`.
    schedule: str = choice("constant", ("constant", "cosine", "linear"))
    final_learning_rate: float = number(0.0, 0.0, 1e3)
    # The last steps, those of the decay; 0: all after the warm-up.
    decay_steps: int = integer(0, 0)
    weight_decay: float = number(0.01, 0.0, 1e3)
    adam_b1: float = number(0.9, 0.0, 0.9999999)
    adam_b2: float = number(0.999, 0.0, 0.9999999)
    adam_eps: float = number(1e-8, 0.0, 1.0, open_low=True)
    # Batches whose mean gradient makes one update; `num_steps` counts updates.
    grad_accumulation_steps: int = integer(1, 1, 10**6)
    gate_loss_weight: float = number(0.1, 0.0, 1e6)
    # Of the loss that makes hash codes agree where attention to all keys would look (docs/science.md).
    hash_loss_weight: float = number(0.0, 0.0, 1e6)
    # In training, hash codes begin with the first so many bits and get one more every so many steps, up to
    # `model.num_hash`; 0: all from the beginning. Evaluation always uses all.
    hash_bits: int = integer(1, 0, 31)
    hash_bits_every: int = integer(0, 0)
    log_every_steps: int = integer(100, 1)
    eval_every_steps: int = integer(500, 1)
    eval_batch_size: int = integer(480, 1, 10**7)
    checkpoint_every_steps: int = integer(1_000, 1)
    # Updates refused for a loss or gradient that is not finite, their batches skipped, before the run stops.
    max_refused_updates: int = integer(10, 0)
    # Updates in one compiled program; 0: as many as suit the device and the intervals above. Same results.
    steps_per_dispatch: int = integer(0, 0, 10_000)
    tensorboard: bool = flag(True)
    # A population: every learning rate with every seed, trained side by side in one program.
    population_seeds: str = numbers("", int, 2**31 - 1)
    population_learning_rates: str = numbers("", float, 1e3)

    def check_combinations(self) -> None:
        if self.schedule != "constant":
            if self.warmup_steps + max(self.decay_steps, 1) > self.num_steps:
                raise ConfigError(
                    "training.warmup_steps",
                    f"below training.num_steps={self.num_steps} less decay_steps for a decaying schedule",
                    self.warmup_steps,
                    "shorten the warm-up or use training.schedule='constant'",
                )
            if self.final_learning_rate > self.learning_rate:
                raise ConfigError(
                    "training.final_learning_rate",
                    f"at most training.learning_rate={self.learning_rate}",
                    self.final_learning_rate,
                    "a schedule decays to a floor",
                )


@dataclasses.dataclass(frozen=True)
class Experiment(Checked):
    """One run: a model, its data and its training, under one seed."""

    name: str = text("experiment")
    seed: int = integer(0, 0)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)

    def check_combinations(self) -> None:
        if self.model.pad_token_id != PAD_TOKEN:
            raise ConfigError(
                "model.pad_token_id",
                f"{PAD_TOKEN}, the task's pad",
                self.model.pad_token_id,
                "leave it as it is",
            )
        if self.data.packing and self.model.routing == "parity" and self.model.arch == "mamba2":
            for field in ("batch_size", "eval_batch_size"):
                if getattr(self.training, field) == 1:
                    raise ConfigError(
                        f"training.{field}",
                        "at least 2 with data.packing, model.routing='parity' and model.arch='mamba2'",
                        1,
                        "there the original treats the pads of a single row as tokens; use data.packing=0",
                    )
        if self.model.precision == "float64":
            raise ConfigError(
                "model.precision",
                "'default', 'float32' or 'bfloat16' in training",
                "float64",
                "float64 is for comparisons in code, under jax.enable_x64",
            )
        self._check_hashing()
        if self.data.min_vocab_size > self.model.vocab_size:
            raise ConfigError(
                "model.vocab_size",
                f"at least {self.data.min_vocab_size} for these tables",
                self.model.vocab_size,
                "raise it, or lower data.n_value, data.max_n_key or data.max_n_context",
            )

    def _check_hashing(self) -> None:
        training, bits = self.training, self.model.num_hash
        for field in ("hash_loss_weight", "hash_bits_every"):
            if getattr(training, field) and "sign_bin_lsh" not in self.model.sources:
                raise ConfigError(
                    f"training.{field}",
                    "0 without 'sign_bin_lsh' in model.sparse_arch",
                    getattr(training, field),
                    "there are no bits that it could change",
                )
        if training.hash_loss_weight and self.model.routing == "parity":
            raise ConfigError(
                "training.hash_loss_weight",
                "0 with model.routing='parity'",
                training.hash_loss_weight,
                "there every call hashes by other directions; use model.routing='causal'",
            )
        if self.model.projection == "learned" and not training.hash_loss_weight:
            raise ConfigError(
                "training.hash_loss_weight",
                "above 0 with model.projection='learned'",
                training.hash_loss_weight,
                "no other loss reaches the directions",
            )
        every = training.hash_bits_every
        if every and training.hash_bits + training.num_steps // every < bits:
            raise ConfigError(
                "training.hash_bits_every",
                f"small enough for all model.num_hash={bits} bits within training.num_steps="
                f"{training.num_steps}",
                training.hash_bits_every,
                "lower it, or begin with more training.hash_bits: evaluation uses all",
            )

    @functools.cached_property
    def members(self) -> "tuple[Experiment, ...]":
        """The members of a population, each as the run that it is when trained alone; none without one."""
        training = self.training
        if not training.population_seeds and not training.population_learning_rates:
            return ()
        alone = dataclasses.replace(training, population_seeds="", population_learning_rates="")
        return tuple(
            dataclasses.replace(
                self,
                name=f"{self.name}_lr{rate!r}_seed{seed}",
                seed=seed,
                training=dataclasses.replace(alone, learning_rate=rate),
            )
            for rate in as_numbers(training.population_learning_rates, float) or [training.learning_rate]
            for seed in as_numbers(training.population_seeds, int) or [self.seed]
        )

    @classmethod
    def from_dict(cls, values: Any) -> "Experiment":
        """Builds and checks an experiment from nested settings, a mapping or an `ml_collections.ConfigDict`.

        A field that is left out has its default; an unknown or misplaced name raises ConfigError.
        """
        return _build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested plain dicts, the inverse of `from_dict`."""
        return dataclasses.asdict(self)


def _build(kind: type, values: Any, prefix: str) -> Any:
    # An ml_collections.ConfigDict is not a Mapping; its keys are checked here all the same.
    values = values.to_dict() if hasattr(values, "to_dict") else values
    fields = {field.name: field for field in dataclasses.fields(kind)}
    arguments = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if name not in fields:
            raise ConfigError(
                path, "a known field", value, f"the fields here are {', '.join(sorted(fields))}"
            )
        group = fields[name].type
        if isinstance(group, type) and dataclasses.is_dataclass(group):
            if not isinstance(value, Mapping) and not hasattr(value, "to_dict"):
                raise ConfigError(path, "a group of fields", value, f"for example {path}.NAME=VALUE")
            value = _build(group, value, f"{path}.")
        arguments[name] = value
    return kind(**arguments)
