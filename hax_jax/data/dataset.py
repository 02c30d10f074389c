"""Creating the published data set on disk: restartable, and never half-written.

The order of things on disk is what keeps a data set whole. `unfinished.json` comes first and claims the
folder for one plan (settings, splits, text files); each shard is written under a temporary name, synced,
renamed, and only then entered there with its sha256; then everything is read back, which gives the sums
of the text form; `manifest.json` comes last. Killed at any moment, the same call goes on: the stream is
drawn again from its seed, which takes seconds, and shards that are already there are kept.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from hax_jax.config import ConfigError, DataConfig
from hax_jax.data import joint_recall
from hax_jax.data.files import Meter, Report, publish, sha256_of, temporary_for, write_whole
from hax_jax.data.joint_recall import SPLITS, PublishedItems, SweepLayout
from hax_jax.data.reader import (
    FORMAT,
    MANIFEST,
    SETTINGS,
    UNFINISHED,
    DatasetError,
    Manifest,
    Shard,
    StoredSplit,
    encode_record,
    parse_manifest,
    read_manifest,
)
from hax_jax.data.text_files import KINDS, SplitText, text_name

_SHARD_BYTES = 2**24
# zstd at its fastest level stores 5.5 bits a token and costs a tenth of the drawing.
_WRITER_OPTIONS = "group_size:1,zstd:1"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be created: the task, how much of it, which splits to store, and whether as text too."""

    config: DataConfig
    n_train_per_pair: int
    splits: tuple[str, ...] = SPLITS
    text: bool = False

    def __post_init__(self):
        if self.n_train_per_pair < 1:
            raise ConfigError(
                "n_train_per_pair", "an integer >= 1", self.n_train_per_pair, "the published set has 10000"
            )
        unknown = [split for split in self.splits if split not in SPLITS]
        if unknown or not self.splits or len(set(self.splits)) != len(self.splits):
            raise ConfigError(
                "splits", f"some of {', '.join(SPLITS)}, each once", self.splits, "the default is all of them"
            )
        # One order, so that the same request is the same claim.
        object.__setattr__(self, "splits", tuple(split for split in SPLITS if split in self.splits))
        joint_recall.token_dtype(self.config)
        joint_recall.check_enough_items(self.config, sum(self.items_per_pair.values()))

    @functools.cached_property
    def layout(self) -> SweepLayout:
        """How a sweep is stored."""
        return SweepLayout(self.config)

    @property
    def items_per_pair(self) -> dict[str, int]:
        """Sweeps of each split."""
        counts = (self.n_train_per_pair, self.config.n_eval_per_pair, self.config.n_eval_per_pair)
        return dict(zip(SPLITS, counts, strict=True))

    @property
    def settings(self) -> dict[str, Any]:
        """What decides every item, as the manifest says it."""
        fields = {name: getattr(self.config, name) for name in SETTINGS}
        return {**fields, "items_per_pair": self.items_per_pair}

    @property
    def claim(self) -> dict[str, Any]:
        """What two calls must agree on to work on one folder."""
        return {"format": FORMAT, "settings": self.settings, "splits": list(self.splits), "text": self.text}

    def shards(self, split: str) -> list[tuple[str, int, int]]:
        """(name, first sweep, number of sweeps) of each shard of a split."""
        size = max(1, _SHARD_BYTES // (self.layout.packed_length * self.layout.dtype.itemsize))
        total = self.items_per_pair[split]
        count = -(-total // size)
        return [
            (f"{split}-{i:05d}-of-{count:05d}.arrayrecord", i * size, min(size, total - i * size))
            for i in range(count)
        ]

    @property
    def text_names(self) -> list[str]:
        """The text files that are asked for."""
        kinds = KINDS if self.text else ()
        return [text_name(self.config, split, kind) for split in self.splits for kind in kinds]


def create_dataset(plan: Plan, report: Report = print) -> Manifest:
    """Creates the data set of a plan in `plan.config.data_dir`, or goes on with an interrupted creation.

    Args:
      plan: what to create. Train, valid and test come from one stream in this order, so the train split is
        drawn even where only the others are stored.
      report: receives lines of progress.

    Returns:
      The manifest of the complete data set.

    Raises:
      ConfigError: the folder holds anything else, or another process is creating there; nothing is
        overwritten.
      DatasetError: the folder's own data set is damaged.

    Memory: about 100 MB whatever the number of items, but for tables so small that items can repeat.
    """
    directory = pathlib.Path(plan.config.data_dir)
    with _claimed(directory, plan) as progress:
        if progress is None:
            report(f"{directory} holds this data set already")
            return read_manifest(directory)
        _write_shards(directory, plan, progress, report)
        shards = {
            split: tuple(Shard(**progress["shards"][name]) for name, _, _ in plan.shards(split))
            for split in plan.splits
        }
        bare = Manifest(directory, plan.settings, shards, text={})
        text = {split: _text_form(plan, bare, split, report, write=plan.text) for split in plan.splits}
        content = {
            "format": FORMAT, "settings": plan.settings, "text": text,
            "splits": {split: [dataclasses.asdict(shard) for shard in shards[split]] for split in shards},
        }
        manifest = parse_manifest(directory, content)
        for leftover in directory.glob("*.tmp"):
            leftover.unlink()
        write_whole(directory / MANIFEST, json.dumps(content, indent=1).encode())
        (directory / UNFINISHED).unlink(missing_ok=True)
    report(f"{directory} is complete: {_described(plan)}")
    return manifest


def verify_dataset(directory: pathlib.Path | str, report: Report = print) -> Manifest:
    """Reads a whole data set and compares every shard and the text form with the manifest's sha256.

    Raises DatasetError at the first difference.
    """
    manifest = read_manifest(directory)
    counts = manifest.settings["items_per_pair"]
    plan = Plan(manifest.config, counts["train"], tuple(manifest.splits))
    for split in manifest.splits:
        StoredSplit(manifest, split, check_sha256=True)
        if _text_form(plan, manifest, split, report, write=False) != manifest.text[split]:
            raise DatasetError(directory, f"the items of its split {split!r} are not those of the manifest")
    report(f"{directory} is as its manifest says: {_described(plan)}")
    return manifest


@contextlib.contextmanager
def _claimed(directory: pathlib.Path, plan: Plan) -> Iterator[dict[str, Any] | None]:
    """Makes the folder this plan's own for as long as the context lasts, or raises ConfigError.

    Gives what `unfinished.json` says, or None if the data set is there already.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise _not_ours(directory, "that is a file") from None
    # A lock on the folder itself ends with the process and leaves no file behind.
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _not_ours(directory, "another process is creating a data set there") from None
        yield _begin_or_resume(directory, plan)
    finally:
        os.close(handle)


def _begin_or_resume(directory: pathlib.Path, plan: Plan) -> dict[str, Any] | None:
    if (directory / MANIFEST).exists():
        manifest = read_manifest(directory)
        if manifest.settings != plan.settings or set(manifest.splits) != set(plan.splits):
            raise _not_ours(directory, f"it holds a data set of {_difference(manifest, plan)}")
        for split in manifest.splits:
            StoredSplit(manifest, split)
        missing = [name for name in plan.text_names if not (directory / name).exists()]
        if missing:
            raise _not_ours(directory, f"it holds this data set without the text file {missing[0]}")
        (directory / UNFINISHED).unlink(missing_ok=True)
        return None
    if (directory / UNFINISHED).exists():
        try:
            progress = json.loads((directory / UNFINISHED).read_text(encoding="utf-8"))
            claim, _ = progress["claim"], {name: Shard(**shard) for name, shard in progress["shards"].items()}
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise _not_ours(directory, f"{UNFINISHED} in it is damaged ({error})") from error
        if claim != plan.claim:
            raise _not_ours(directory, f"it holds an unfinished data set of other settings, see {UNFINISHED}")
        return progress
    # Killed at the very beginning, an earlier call leaves its unfinished claim.
    if any(path != temporary_for(directory / UNFINISHED) for path in directory.iterdir()):
        raise _not_ours(directory, "it holds other files")
    _check_space(directory, plan)
    progress = {"claim": plan.claim, "shards": {}}
    write_whole(directory / UNFINISHED, json.dumps(progress).encode())
    return progress


def _not_ours(directory: pathlib.Path, problem: str) -> ConfigError:
    return ConfigError(
        "data_dir", "a new or empty folder, or one where this same data set was begun", str(directory),
        f"{problem}; nothing was changed, name another folder",
    )


def _difference(manifest: Manifest, plan: Plan) -> str:
    stored = {**manifest.settings, "splits": sorted(manifest.splits)}
    wanted = {**plan.settings, "splits": sorted(plan.splits)}
    return ", ".join(f"{name} {stored[name]}" for name in wanted if stored.get(name) != wanted[name])


def _check_space(directory: pathlib.Path, plan: Plan) -> None:
    items = sum(plan.items_per_pair[split] for split in plan.splits) * len(plan.layout.sizes)
    sweeps = items // len(plan.layout.sizes)
    needed = sweeps * plan.layout.packed_length * plan.layout.dtype.itemsize
    if plan.text:
        # A token and its mask take up to 4 or 6, and 2, characters.
        needed += items * plan.config.padded_length * (plan.layout.dtype.itemsize * 2 + 4)
    if (free := shutil.disk_usage(directory).free) < needed:
        raise ConfigError(
            "data_dir", f"on a disk with {needed / 2**30:.1f} GiB free", str(directory),
            f"there are {free / 2**30:.1f} GiB; free some space or name another folder",
        )


def _write_shards(directory: pathlib.Path, plan: Plan, progress: dict[str, Any], report: Report) -> None:
    """Draws the stream as far as it is needed and writes the shards that are not there yet."""
    wanted = [name for split in plan.splits for name, _, _ in plan.shards(split)]
    missing = {name for name in wanted if not _is_written(directory, progress, name)}
    if len(missing) < len(wanted):
        report(f"going on: {len(wanted) - len(missing)} of {len(wanted)} files are there already")
    published = PublishedItems(plan.config)
    for split in SPLITS:
        if not missing:
            break
        doing = "drawn and written" if split in plan.splits else "drawn, not stored,"
        meter = Meter(f"{split}: {doing}", plan.items_per_pair[split] * len(plan.layout.sizes), report)
        for name, first, count in plan.shards(split):
            with _ShardWriter(directory, name, progress) if name in missing else _Nothing() as writer:
                for start in range(first, first + count, published.sweeps_together):
                    packed = published.sweeps(min(published.sweeps_together, first + count - start))
                    for number, tokens in enumerate(packed, start):
                        writer.write(split, number, tokens)
                    meter.advance(len(packed) * len(plan.layout.sizes))
            missing.discard(name)
        meter.finish()


def _is_written(directory: pathlib.Path, progress: dict[str, Any], name: str) -> bool:
    """Whether an earlier call has finished a shard and its file is still as it was."""
    entry, path = progress["shards"].get(name), directory / name
    return entry is not None and path.exists() and sha256_of(path) == entry["sha256"]


class _Nothing(contextlib.nullcontext):
    """A writer for sweeps that are drawn only because others follow them in the stream."""

    def __enter__(self) -> "_Nothing":
        return self

    def write(self, split: str, number: int, tokens: np.ndarray) -> None:
        pass


class _ShardWriter:
    """Writes one shard, which appears under its name and in `unfinished.json` only when it is complete."""

    def __init__(self, directory: pathlib.Path, name: str, progress: dict[str, Any]):
        self._path, self._progress = directory / name, progress
        self._sweeps = 0
        self._writer = ArrayRecordWriter(str(temporary_for(self._path)), _WRITER_OPTIONS)

    def __enter__(self) -> "_ShardWriter":
        return self

    def write(self, split: str, number: int, tokens: np.ndarray) -> None:
        """Adds a packed sweep."""
        self._writer.write(encode_record(split, number, tokens))
        self._sweeps += 1

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self._writer.close()
        except RuntimeError as failure:
            # ArrayRecord writes in the background, so a full disk shows here at the latest.
            raise OSError(f"{temporary_for(self._path)} cannot be written: {failure}") from failure
        if error is not None:
            return
        temporary = temporary_for(self._path)
        shard = Shard(self._path.name, self._sweeps, temporary.stat().st_size, sha256_of(temporary))
        publish(self._path)
        self._progress["shards"][shard.name] = dataclasses.asdict(shard)
        write_whole(self._path.with_name(UNFINISHED), json.dumps(self._progress).encode())


def _text_form(plan: Plan, manifest: Manifest, split: str, report: Report, write: bool) -> dict[str, Any]:
    """Reads a stored split back as the original's text and describes it; writes the text files if asked."""
    stored = StoredSplit(manifest, split)
    meter = Meter(f"{split}: read back", stored.num_sweeps * len(plan.layout.sizes), report)
    with SplitText(plan.layout, split, manifest.directory if write else None) as text:
        for number in range(stored.num_sweeps):
            text.add(plan.layout.pad(stored.sweep(number)[None])[0])
            meter.advance(len(plan.layout.sizes))
    meter.finish()
    return text.descriptions()


def _described(plan: Plan) -> str:
    return ", ".join(f"{plan.items_per_pair[s] * plan.config.num_pairs:,} {s} items" for s in plan.splits)

