"""The sizes of a model, read from the description that golden and exchange files carry."""

import dataclasses
from collections.abc import Mapping
from typing import Any

SOURCES = ("full", "sliding_window", "sink", "dilated", "sign_bin_lsh", "argmax_lsh", "key_selection")


@dataclasses.dataclass(frozen=True)
class Settings:
    """One architecture; the names are the original's.

    `arch` is 'mamba', 'mamba2' or 'samba'; `sparse_arch` is None or sources joined by '+', among which
    `sparse_keys` are split equally.
    """

    arch: str = "mamba2"
    vocab_size: int = 100
    pad_token_id: int = 3
    hidden_size: int = 64
    num_layers: int = 2
    state_size: int = 32
    expand: int = 2
    conv_kernel: int = 4
    norm_eps: float = 1e-5
    initializer_range: float = 0.1
    time_step_rank: int = 8
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    num_heads: int = 8
    head_dim: int = 16
    n_groups: int = 1
    chunk_size: int = 256
    attention_heads: int = 4
    attention_window: int = 64
    rope_theta: float = 10_000.0
    mlp_size: int = 256
    sparse_arch: str | None = None
    sparse_keys: int = 64
    num_hash: int = 8
    data_max_length: int = 2048

    def __post_init__(self):
        unknown = [source for source in self.sources if source not in SOURCES]
        if unknown:
            raise ValueError(
                f"`sparse_arch` must join {', '.join(SOURCES)} by '+', got {self.sparse_arch!r}; "
                f"{unknown[0]!r} is none of them"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of visible keys, in order."""
        return tuple(self.sparse_arch.split("+")) if self.sparse_arch else ()

    @property
    def keys_per_source(self) -> int:
        return self.sparse_keys // max(len(self.sources), 1)

    @property
    def inner_size(self) -> int:
        return self.expand * self.hidden_size

    @property
    def dilation(self) -> int:
        return self.data_max_length // self.keys_per_source

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> "Settings":
        """From the `meta_json` of a golden file of group A, B or E, or of an exchange file."""
        original = dict(meta["config"])
        original["num_layers"] = original["num_hidden_layers"]
        if "layer_norm_epsilon" in original:
            original["norm_eps"] = original["layer_norm_epsilon"]
        if "attn" in original:
            attention = original["attn"]
            original["attention_heads"] = attention["num_heads"]
            original["attention_window"] = attention["window_size"]
            original["rope_theta"] = attention["rope_theta"]
        if "hidden_ratio" in original and "mlp_size" not in original:
            # Two thirds of the nominal width, rounded up to a multiple of 256.
            nominal = int(original["hidden_size"] * original["hidden_ratio"] * 2 / 3)
            original["mlp_size"] = 256 * -(-nominal // 256)
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in original.items() if name in names and value is not None}
        return cls(**{**known, "arch": meta["base_arch"], "sparse_arch": meta.get("sparse_arch")})
