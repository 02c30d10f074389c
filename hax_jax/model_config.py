"""The settings of an architecture, and every check of their ranges and combinations."""

import dataclasses

from hax_jax.fields import Checked, ConfigError, choice, flag, integer, number, text

SOURCES = ("full", "sliding_window", "sink", "dilated", "sign_bin_lsh", "argmax_lsh", "key_selection")

# A longer sequence is refused: positions, orders and expiries are int32, and twice the length (keys
# and queries sorted together) has to fit.
MAX_LENGTH = 2**30

# Fields of the branch that the original does not have, so that only causal routing takes them.
_CAUSAL_ONLY = ("key_size", "query_key", "unit_norm", "projection", "centring")


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
    # Features of queries and keys; 0: as many as `state_size`, as in the original.
    key_size: int = integer(0, 0, 2**16)
    # One matrix for queries and one for keys; two that start equal; or one for both.
    query_key: str = choice("separate", ("separate", "tied_init", "shared"))
    # Whether queries and keys are divided by their root mean square, so that scores are cosines.
    unit_norm: bool = flag(False)
    # The directions whose signs are the code's bits: fixed, independent or orthogonal to each other; or
    # learned, by the hash loss alone, with thresholds and apart for queries and keys.
    projection: str = choice("normal", ("normal", "orthogonal", "learned"))
    # With how many keys a query should share its code, as the hash loss of training has it. The more, the
    # fuller buckets get: with as many as half of all keys there is soon one bucket.
    hash_loss_keys: int = integer(4, 1, MAX_LENGTH)
    # What is taken off queries and keys before they are hashed: nothing, or their mean so far.
    centring: str = choice("none", ("none", "running"))
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
    def key_width(self) -> int:
        """Features of queries and keys."""
        return self.key_size or self.state_size

    @property
    def hashes(self) -> bool:
        """Whether a source of visible keys is a hash code."""
        return bool({"sign_bin_lsh", "argmax_lsh"} & set(self.sources))

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
        if self.routing == "parity":
            self._check_parity()

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

    def _check_parity(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in _CAUSAL_ONLY and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"model.{field.name}",
                    f"{field.default!r} with model.routing='parity'",
                    getattr(self, field.name),
                    "the original knows nothing else; use model.routing='causal'",
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
