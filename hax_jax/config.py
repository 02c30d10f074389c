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

SOURCES = ("full", "sliding_window", "sink", "dilated", "sign_bin_lsh", "argmax_lsh", "key_selection")
# The task's pad; its other token ids are laid out in `hax_jax.data`.
PAD_TOKEN = 3

# A longer sequence is refused: positions, orders and expiries are int32, and twice the length (keys
# and queries sorted together) has to fit.
MAX_LENGTH = 2**30


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
    """One architecture.

    The names are the original's where it has one. `sparse_arch` is 'none' or sources joined by '+';
    `sparse_keys` is split equally among them. `routing` is 'causal' (no statistic of the future, a
    fixed hash projection, padding without effect) or 'parity' (the original's behaviour, faults
    included). `precision` is 'default' (float32 parameters and recurrences, bfloat16 matmul inputs),
    'float32', 'bfloat16' (everything, as the original trains) or 'float64' (for checks; needs x64).
    `implementation` is the form of every operation, or 'auto': each chooses (hax_jax/ops/README.md).
    """

    arch: str = choice("mamba2", ("mamba", "mamba2", "samba"))
    vocab_size: int = integer(100, 5)
    pad_token_id: int = integer(3, 0)
    hidden_size: int = integer(64, 1)
    num_layers: int = integer(2, 1, 1000)
    state_size: int = integer(32, 1)
    expand: int = integer(2, 1, 64)
    conv_kernel: int = integer(4, 1, 64)
    norm_eps: float = number(1e-5, 1e-30, 1.0)
    # Mamba-1 and Samba: width of the low-rank time-step projection.
    time_step_rank: int = integer(8, 1)
    time_step_min: float = number(0.001, 1e-30, 1e3)
    time_step_max: float = number(0.1, 1e-30, 1e3)
    time_step_floor: float = number(1e-4, 0.0, 1e3)
    # Mamba-2: heads of the state-space dual form.
    num_heads: int = integer(8, 1)
    head_dim: int = integer(16, 1)
    n_groups: int = integer(1, 1)
    # Positions handled at once by the chunked scans; changes memory and rounding, not the function.
    chunk_size: int = integer(64, 1, 4096)
    # Samba: its attention layers and its MLPs.
    attention_heads: int = integer(4, 1)
    attention_window: int = integer(64, 1, MAX_LENGTH)
    rope_theta: float = number(10_000.0, 0.0, 1e12, open_low=True)
    mlp_size: int = integer(256, 1)
    # The sparse attention branch.
    sparse_arch: str = text("none")
    sparse_keys: int = integer(64, 1, MAX_LENGTH)
    num_hash: int = integer(8, 1, 31)
    data_max_length: int = integer(2048, 1, MAX_LENGTH)
    routing: str = choice("causal", ("causal", "parity"))
    initializer_range: float = number(0.1, 0.0, 1e3, open_low=True)
    precision: str = choice("default", ("default", "float32", "bfloat16", "float64"))
    implementation: str = choice("auto", ("auto", "reference", "xla", "mosaic_gpu"))

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of visible keys, in order; empty without a sparse attention branch."""
        return () if self.sparse_arch == "none" else tuple(self.sparse_arch.split("+"))

    @property
    def keys_per_source(self) -> int:
        """`sparse_keys` split equally among the sources, rounded down."""
        return self.sparse_keys // max(len(self.sources), 1)

    @property
    def op_implementation(self) -> str | None:
        """The ops' `implementation` argument: None, where each op chooses, for 'auto'."""
        return None if self.implementation == "auto" else self.implementation

    @property
    def inner_size(self) -> int:
        """Width inside a mixer, `expand * hidden_size`; also the value width of the sparse branch."""
        return self.expand * self.hidden_size

    @property
    def dilation(self) -> int:
        """Stride of the 'dilated' source: one key in `data_max_length // keys_per_source` is visible."""
        return self.data_max_length // self.keys_per_source

    def check_combinations(self) -> None:
        if self.pad_token_id >= self.vocab_size:
            raise ConfigError(
                "model.pad_token_id",
                f"below model.vocab_size={self.vocab_size}",
                self.pad_token_id,
                "the pad is a token of the vocabulary",
            )
        if self.time_step_min > self.time_step_max:
            expected = f"at most model.time_step_max={self.time_step_max}"
            raise ConfigError("model.time_step_min", expected, self.time_step_min, "swap the two")
        if self.arch == "mamba2":
            self._check_mamba2()
        if self.arch == "samba":
            self._check_samba()
        if self.sources:
            self._check_sources()

    def _check_mamba2(self) -> None:
        if self.num_heads * self.head_dim != self.inner_size:
            raise ConfigError(
                "model.head_dim",
                f"expand * hidden_size / num_heads = {self.inner_size} / {self.num_heads}",
                self.head_dim,
                "the heads together are as wide as the mixer",
            )
        if self.num_heads % self.n_groups:
            raise ConfigError(
                "model.n_groups",
                f"a divisor of model.num_heads={self.num_heads}",
                self.n_groups,
                "every group serves the same number of heads",
            )

    def _check_samba(self) -> None:
        width, odd = divmod(self.hidden_size, self.attention_heads)
        if odd or width % 2:
            raise ConfigError(
                "model.attention_heads",
                f"a divisor of model.hidden_size={self.hidden_size} that leaves an even head width",
                self.attention_heads,
                "rotary embedding turns pairs of features",
            )

    def _check_sources(self) -> None:
        if self.arch == "samba":
            raise ConfigError(
                "model.sparse_arch",
                "'none' for samba",
                self.sparse_arch,
                "use model.arch='mamba' or 'mamba2' for a sparse branch",
            )
        for source in self.sources:
            if source not in SOURCES:
                raise ConfigError(
                    "model.sparse_arch",
                    "'none' or sources joined by '+'",
                    self.sparse_arch,
                    f"{source!r} is not a source; the sources are {', '.join(SOURCES)}",
                )
        if len(set(self.sources)) != len(self.sources):
            raise ConfigError(
                "model.sparse_arch",
                "sources that differ from each other",
                self.sparse_arch,
                "name each source once; raise model.sparse_keys for more keys",
            )
        if self.keys_per_source < 1:
            raise ConfigError(
                "model.sparse_keys",
                f"at least {len(self.sources)}, a key for each source of {self.sparse_arch!r}",
                self.sparse_keys,
                "raise it or name fewer sources",
            )
        if "dilated" in self.sources and self.dilation < 1:
            raise ConfigError(
                "model.sparse_keys",
                f"at most {self.data_max_length * len(self.sources)}, "
                f"a key in model.data_max_length={self.data_max_length} for each source",
                self.sparse_keys,
                "lower it, or raise model.data_max_length",
            )


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
    log_every_steps: int = integer(100, 1)
    eval_every_steps: int = integer(500, 1)
    eval_batch_size: int = integer(480, 1, 10**7)
    checkpoint_every_steps: int = integer(1_000, 1)
    # Updates refused for a loss or gradient that is not finite, their batches skipped, before the run stops.
    max_refused_updates: int = integer(10, 0)
    # Updates in one compiled program; 0: as many as suit the device, the intervals above and the size of an
    # update. The same results but for rounding on a GPU.
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
        if self.data.min_vocab_size > self.model.vocab_size:
            raise ConfigError(
                "model.vocab_size",
                f"at least {self.data.min_vocab_size} for these tables",
                self.model.vocab_size,
                "raise it, or lower data.n_value, data.max_n_key or data.max_n_context",
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
