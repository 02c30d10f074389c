"""Reading golden files, and what a comparison reports."""

import dataclasses
import json
import pathlib
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from hax_jax.config import ModelConfig

# What NumPy raises over a file that is cut off, damaged or something else.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    SyntaxError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


class GoldenError(ValueError):
    """A golden file that cannot be used: which file, what is wrong, what to do."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: the largest error found, and the largest allowed."""

    quantity: str
    error: float
    tolerance: float

    @property
    def inside(self) -> bool:
        # Written so that NaN is outside.
        return bool(self.error <= self.tolerance)


def largest(errors: Iterable[float]) -> float:
    """The largest error, or NaN if there is one, which Python's own max may drop."""
    return float(np.max(list(errors)))


class GoldenFile:
    """The arrays of one `.npz` file, read without pickle and refused if damaged.

    Raises:
      GoldenError: the file is missing, truncated, not an archive of plain arrays, or holds NaN or infinity.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                self.arrays = {name: archive[name] for name in archive.files}
        except FileNotFoundError as error:
            raise GoldenError(f"{self.path}: no such file; check the path") from error
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise GoldenError(
                f"{self.path}: must be a whole .npz archive of plain arrays ({reason}); copy it again"
            ) from error
        for name, array in self.arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise GoldenError(
                    f"{self.path}: {name} must be finite, got NaN or infinity; the file is damaged"
                )

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self.arrays[name]
        except KeyError:
            raise GoldenError(
                f"{self.path}: array {name} is missing; the file is of another kind or cut short"
            ) from None

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose names start with `prefix`, by the rest of the name."""
        return {name[len(prefix) :]: array for name, array in self.arrays.items() if name.startswith(prefix)}

    @property
    def meta(self) -> dict[str, Any]:
        """The file's description of itself."""
        try:
            meta = json.loads(str(self["meta_json"]))
        except (json.JSONDecodeError, RecursionError) as error:
            raise GoldenError(
                f"{self.path}: meta_json must be JSON ({error}); copy the file again"
            ) from error
        if not isinstance(meta, dict):
            raise GoldenError(f"{self.path}: meta_json must be an object, got {type(meta).__name__}")
        return meta

    def partner(self, suffix: str) -> "GoldenFile":
        """The file that this one, named `..._<suffix>.npz`, takes its inputs from."""
        return GoldenFile(self.path.with_name(self.path.name.removesuffix(f"_{suffix}.npz") + ".npz"))


def model_config(meta: dict[str, Any], precision: str) -> ModelConfig:
    """Our configuration of the model that `meta_json` describes."""
    original = meta["config"]
    arch = meta["base_arch"]
    names: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "state_size",
        "expand",
        "conv_kernel",
        "time_step_rank",
        "pad_token_id",
    )
    if arch == "mamba2":
        names += ("num_heads", "head_dim", "n_groups")
    fields = {name: original[name] for name in names if name in original}
    fields["num_layers"] = original["num_hidden_layers"]
    fields["norm_eps"] = original.get("layer_norm_epsilon", original.get("norm_eps", 1e-5))
    fields["initializer_range"] = original["initializer_range"]
    if arch == "samba":
        attention = original["attn"]
        fields["attention_heads"] = attention["num_heads"]
        fields["attention_window"] = attention["window_size"]
        fields["rope_theta"] = attention["rope_theta"]
        fields["mlp_size"] = _samba_mlp_size(original)
    if meta.get("sparse_arch"):
        fields["sparse_arch"] = meta["sparse_arch"]
        fields |= {name: original[name] for name in ("sparse_keys", "num_hash", "data_max_length")}
    # The chunked selective scan takes XLA long to compile; shorter chunks change nothing but rounding.
    fields["chunk_size"] = 64 if arch == "mamba2" else 16
    return ModelConfig(arch=arch, routing="parity", precision=precision, **fields)


def _samba_mlp_size(original: dict[str, Any]) -> int:
    """The library's rule: two thirds of hidden_ratio times the width, rounded up to a multiple of 256."""
    return 256 * -(-int(original["hidden_size"] * original["hidden_ratio"] * 2 / 3) // 256)
