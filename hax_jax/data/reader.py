"""Reading a data set that `experiments/create_dataset.py` has written, with every check of its files.

A data set is a folder with ArrayRecord shards and `manifest.json`, which is written last: without it the
folder holds no data set. A record is one sweep: 8 bytes that say what it is (`encode_record`), then the
tokens of its items end to end, unpadded. `SweepLayout` knows where each item lies; score masks and table
sizes follow from the order, so they are not stored. ArrayRecord has a checksum for each record, the
manifest the size and sha256 of each shard. Nothing in a data set is ever executed.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import struct
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from hax_jax.config import ConfigError, DataConfig
from hax_jax.data.files import sha256_of
from hax_jax.data.joint_recall import SPLITS, SweepLayout

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
FORMAT = "hax_jax joint recall, version 1"
# What of DataConfig makes the items; the rest says where they come from.
SETTINGS = ("min_n_context", "max_n_context", "min_n_key", "max_n_key", "n_value", "seed")
# Mark, version, number of the split in SPLITS, number of the sweep within the split.
_HEADER = struct.Struct("<2sBBI")
_MARK, _VERSION = b"JR", 1

# Splits up to this size are compared with their sha256 each time they are opened, which takes less than
# 0.1 s; for larger ones the size of the files and the checksum of each record have to do.
_HASHED_BYTES = 2**26


class DatasetError(ConfigError):
    """A data set that is missing, unfinished, damaged or another one than was asked for."""

    def __init__(self, directory: pathlib.Path | str, problem: str, remedy: str = ""):
        remedy = remedy or "delete the folder and create the data set again, or name another folder"
        # Messages of libraries may have several lines.
        problem = " ".join(problem.split())[:500]
        super().__init__("data.data_dir", "a complete data set", str(directory), f"{problem}; {remedy}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a split: its name, how many sweeps it has, its size and its sha256."""

    name: str
    sweeps: int
    bytes: int
    sha256: str

    def __post_init__(self):
        if not re.fullmatch(r"(train|valid|test)-\d{5}-of-\d{5}\.arrayrecord", self.name):
            raise ValueError(f"{self.name!r} is not the name of a shard")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256) or self.sweeps < 1 or self.bytes < 1:
            raise ValueError(f"the entry of {self.name} makes no sense")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a data set holds.

    Attributes:
      directory: the folder.
      settings: the fields of `SETTINGS`, and `items_per_pair` for every split. The splits are drawn in one
        stream, so all of it matters even where a split is not stored.
      splits: the shards of each stored split.
      text: per stored split the description (sha256, bytes, lines, ...) of the original's two text files,
        which may or may not be there.
    """

    directory: pathlib.Path
    settings: Mapping[str, Any]
    splits: Mapping[str, tuple[Shard, ...]]
    text: Mapping[str, Mapping[str, Mapping[str, Any]]]

    @property
    def config(self) -> DataConfig:
        """The task of the data set, as the settings of an experiment that reads it."""
        return DataConfig(
            **{name: self.settings[name] for name in SETTINGS},
            n_eval_per_pair=self.settings["items_per_pair"]["valid"],
            train_source="dataset",
            eval_source="dataset",
            data_dir=str(self.directory),
        )


def read_manifest(directory: pathlib.Path | str) -> Manifest:
    """Reads and checks the manifest of a data set; raises DatasetError if there is none or it is damaged."""
    directory = pathlib.Path(directory)
    try:
        text = (directory / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        problem, aim = f"there is no {MANIFEST} in it", "to make one"
        if (directory / UNFINISHED).exists():
            problem, aim = "its creation has not finished", "again to go on"
        command = f"python experiments/create_dataset.py --data_dir={directory}"
        raise DatasetError(directory, problem, f"run `{command}` {aim}") from None
    # Not UTF-8, or a null byte in the path, is a ValueError.
    except (OSError, ValueError) as error:
        raise DatasetError(directory, f"{MANIFEST} cannot be read ({error})") from error
    try:
        return parse_manifest(directory, json.loads(text))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(directory, f"{MANIFEST} is damaged or of another format ({error})") from error


def parse_manifest(directory: pathlib.Path, content: Any) -> Manifest:
    """Builds a manifest from its JSON content; raises ValueError, KeyError or the like if it is not one."""
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}, expected {FORMAT!r}")
    splits = {name: tuple(Shard(**shard) for shard in shards) for name, shards in content["splits"].items()}
    manifest = Manifest(directory, content["settings"], splits, content["text"])
    counts = manifest.settings["items_per_pair"]
    if set(counts) != set(SPLITS) or any(type(count) is not int or count < 1 for count in counts.values()):
        raise ValueError("items_per_pair is not a positive number for each split")
    if counts["valid"] != counts["test"]:
        raise ValueError("items_per_pair differs between validation and test")
    for split, shards in splits.items():
        if any(kind not in content["text"][split] for kind in ("inputs", "mask")):
            raise ValueError(f"the text form of {split!r} is not described")
        if (stored := sum(shard.sweeps for shard in shards)) != counts[split]:
            raise ValueError(f"the shards of {split!r} hold {stored} items per pair, not {counts[split]}")
    # Checks the other settings.
    _ = manifest.config
    return manifest


def check_settings(manifest: Manifest, config: DataConfig) -> None:
    """Raises ConfigError, naming the field, where a data set is not the one an experiment describes.

    An experiment may use fewer items per pair for evaluation than there are: it gets the first ones.
    """
    for name in SETTINGS:
        stored, wanted = manifest.settings[name], getattr(config, name)
        if stored != wanted:
            raise ConfigError(
                f"data.{name}",
                f"{stored}, as in the data set {str(manifest.directory)!r}",
                wanted,
                "use the data set's value, or create another data set",
            )
    stored = manifest.settings["items_per_pair"]["valid"]
    if config.n_eval_per_pair > stored:
        raise ConfigError(
            "data.n_eval_per_pair",
            f"at most {stored}, as in the data set {str(manifest.directory)!r}",
            config.n_eval_per_pair,
            "lower it, or create another data set",
        )


def encode_record(split: str, number: int, tokens: np.ndarray) -> bytes:
    """The record of a packed sweep, (packed_length,), which is the `number`-th of its split."""
    return _header(split, number) + tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).tobytes()


def _header(split: str, number: int) -> bytes:
    return _HEADER.pack(_MARK, _VERSION, SPLITS.index(split), number)


class StoredSplit:
    """One split of a data set, read through Grain's ArrayRecord source.

    Opening checks that every shard is there with the size, and for small splits the sha256, of the
    manifest; reading checks each record. All raise DatasetError. Reading from several threads is safe.
    Memory: the padded items of a few sweeps.
    """

    def __init__(self, manifest: Manifest, split: str, check_sha256: bool | None = None):
        if split not in manifest.splits:
            raise DatasetError(
                manifest.directory,
                f"it has no split {split!r}, only {', '.join(manifest.splits)}",
                "create one in another folder with this split among --splits",
            )
        self._manifest, self.split = manifest, split
        self.layout = SweepLayout(manifest.config)
        self.num_sweeps = manifest.settings["items_per_pair"][split]
        self._check_files(check_sha256)
        with self._reading():
            self._source = grain.sources.ArrayRecordDataSource(
                [str(manifest.directory / shard.name) for shard in manifest.splits[split]]
            )
            records = len(self._source)
        if records != self.num_sweeps:
            raise self._damage(f"{records} records instead of {self.num_sweeps}")
        self._lock = threading.Lock()
        # A batch rarely ends where a sweep does; the next one goes on with the same sweep.
        self._cached = functools.lru_cache(maxsize=4)(self._padded_sweep)

    def sweep(self, number: int) -> np.ndarray:
        """The tokens of one sweep, packed: (packed_length,) of `token_dtype`."""
        with self._reading():
            record = self._source[number]
        size = _HEADER.size + self.layout.packed_length * self.layout.dtype.itemsize
        if record[: _HEADER.size] != _header(self.split, number) or len(record) != size:
            raise self._damage(f"record {number} is not sweep {number}")
        tokens = np.frombuffer(record, self.layout.dtype.newbyteorder("<"), offset=_HEADER.size)
        if (largest := int(tokens.max())) >= self.layout.config.min_vocab_size:
            raise self._damage(f"record {number} holds the token id {largest}, which the task does not have")
        return tokens

    def all_sweeps(self) -> np.ndarray:
        """The whole split, packed: (num_sweeps, packed_length) of `token_dtype`."""
        sweeps = np.empty((self.num_sweeps, self.layout.packed_length), self.layout.dtype)
        for number in range(self.num_sweeps):
            sweeps[number] = self.sweep(number)
        return sweeps

    def items(self, indices: np.ndarray) -> np.ndarray:
        """Padded items, (b, padded_length) of `token_dtype`, by their numbers in the split, (b,) integers."""
        sweeps, pairs = np.divmod(indices, len(self.layout.sizes))
        tokens = np.empty((len(indices), self.layout.config.padded_length), self.layout.dtype)
        with self._lock:
            for sweep in np.unique(sweeps):
                rows = sweeps == sweep
                tokens[rows] = self._cached(int(sweep))[pairs[rows]]
        return tokens

    def _padded_sweep(self, number: int) -> np.ndarray:
        return self.layout.pad(self.sweep(number)[None])[0]

    def _check_files(self, check_sha256: bool | None) -> None:
        shards = self._manifest.splits[self.split]
        if check_sha256 is None:
            check_sha256 = sum(shard.bytes for shard in shards) <= _HASHED_BYTES
        for shard in shards:
            path = self._manifest.directory / shard.name
            try:
                size = path.stat().st_size
                if size != shard.bytes:
                    raise self._damage(f"{shard.name} has {size} bytes instead of {shard.bytes}")
                if check_sha256 and sha256_of(path) != shard.sha256:
                    raise self._damage(f"{shard.name} has another sha256 than the manifest says")
            except OSError as error:
                raise self._damage(f"{shard.name} cannot be read ({error.strerror})") from error

    def _damage(self, what: str) -> DatasetError:
        return DatasetError(self._manifest.directory, f"its split {self.split!r} is damaged: {what}")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns what ArrayRecord raises over a damaged file into a DatasetError."""
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            raise self._damage(str(error)) from error
