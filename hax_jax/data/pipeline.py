"""One interface to both forms of the data: an iterator with a state, one pure function to a `Batch`.

The host only counts items (and for a data set reads them); everything else happens inside the compiled
program, where `Split.materialize` turns what the iterator yields into a `Batch`.
"""

import abc
import dataclasses
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from hax_jax.config import ConfigError, DataConfig
from hax_jax.data import stream
from hax_jax.data.batch import Batch
from hax_jax.data.joint_recall import PAD, SPLITS
from hax_jax.data.layout import RowLayout, num_positions, row_layout, walk
from hax_jax.data.raw_batches import (
    MOST_ITEMS,
    BatchNumbers,
    CountedBatches,
    RawBatch,
    RawBatches,
    ReadBatches,
)
from hax_jax.data.reader import StoredSplit, check_settings, read_manifest
from hax_jax.packing import Packing, ScoredPositions

# Batches of a data set that one thread reads ahead while the device works.
_READ_AHEAD = 8


def make_split(config: DataConfig, split: str, row_multiple: int = 1) -> "Split":
    """The items of a split, as `config.train_source` or `config.eval_source` says.

    Args:
      config: the task, where its items come from and whether they are packed.
      split: 'train', 'valid' or 'test'.
      row_multiple: what the number of rows of a packed batch has to be a multiple of: the devices that
        share them.

    Raises:
      ConfigError: an unknown split, or a data set made with other settings; the message names the field.
      DatasetError: the data set is missing, unfinished or damaged.
    """
    if split not in SPLITS:
        raise ConfigError("split", f"one of {', '.join(SPLITS)}", split, "name one of these")
    source = config.train_source if split == "train" else config.eval_source
    if split != "train":
        config = dataclasses.replace(config, order="file")
    items: Split = _StoredItems(config, split) if source == "dataset" else _StreamItems(config, split)
    items.row_multiple = row_multiple
    items.walk = walk(items.config)
    return items


class Split(abc.ABC):
    """The items of a split: item i is of sweep i // num_pairs and has its (i mod num_pairs)-th table size.

    Attributes:
      config: the task.
      split: 'train', 'valid' or 'test'.
      num_items: how many there are, or None for an endless stream.
      row_multiple: see `make_split`.
      walk: (num_pairs,), in which order the iterator takes the items of a sweep.
    """

    config: DataConfig
    split: str
    num_items: int | None
    row_multiple: int
    walk: np.ndarray

    def row_shape(self, batch_size: int) -> tuple[int, int]:
        """Rows, and positions of a row, of a batch of so many items."""
        if not self.config.packing:
            return batch_size, self.config.padded_length - 1
        layout = row_layout(self.config, batch_size, self.row_multiple)
        return layout.rows, layout.length

    def iterator(self, batch_size: int, *, repeat: bool, drop_remainder: bool = False) -> RawBatches:
        """Walks the split sweep by sweep, in batches of fixed size.

        Args:
          batch_size: items of a batch.
          repeat: begin again after the last item, in the middle of a batch if need be, for ever. Otherwise
            the last batch is filled up with rows of weight 0.
          drop_remainder: without `repeat`, leave an incomplete last batch out instead.

        Returns:
          An iterator over raw batches: dicts of NumPy arrays with leading axis `batch_size`, to be given to
          `materialize`. Its state is a dict of integers that JSON can hold.

        Raises:
          ValueError: `batch_size` is below 1 or leaves no batch at all.
        """
        return self._load(BatchNumbers(self.num_items, batch_size, repeat, drop_remainder, self.walk))

    def keep(self) -> dict[str, np.ndarray]:
        """Arrays to be kept on the device and added to every raw batch before `materialize`; or none.

        To be called before `iterator`, which then leaves to the device what it can find there.
        """
        return {}

    @jax.named_scope("materialize")
    def materialize(self, raw: RawBatch) -> Batch:
        """Makes the batch; a pure JAX function with static shapes, to be traced inside a jitted program.

        With `config.packing` the batch has to begin as one of the iterator does, at a multiple of its size.
        """
        index = jnp.asarray(raw["index"])
        weight = jnp.asarray(raw["weight"])
        n_context, n_key = stream.table_sizes(index, self.config)
        batch = _padded(self._tokens(raw), n_context, n_key, weight, self.config)
        if not self.config.packing:
            return batch
        layout = row_layout(self.config, index.shape[0], self.row_multiple)
        # Where in its walk the batch begins.
        start = jnp.asarray(np.argsort(self.walk))[(index[0] % jnp.uint32(len(self.walk))).astype(jnp.int32)]
        return _packed(batch, jnp.asarray(layout.first)[start // layout.stride], layout, self.config)

    @abc.abstractmethod
    def _tokens(self, raw: RawBatch) -> Any:
        """The padded items (m, padded_length) of a raw batch, int32."""

    @abc.abstractmethod
    def _load(self, numbers: BatchNumbers) -> RawBatches:
        """Adds to numbered items what the host has to know about them."""


class _StreamItems(Split):
    """Items made on the device; the host only counts."""

    def __init__(self, config: DataConfig, split: str):
        self.config, self.split = config, split
        self.num_items = None if split == "train" else config.num_pairs * config.n_eval_per_pair
        if self.num_items and self.num_items > MOST_ITEMS:
            raise ConfigError(
                "data.n_eval_per_pair",
                f"at most {MOST_ITEMS // config.num_pairs}, 2^32 items in all",
                config.n_eval_per_pair,
                "lower it",
            )

    def _tokens(self, raw: RawBatch) -> Any:
        return stream.make_items(jnp.asarray(raw["index"]), self.split, self.config)

    def _load(self, numbers: BatchNumbers) -> RawBatches:
        return CountedBatches(numbers)


class _StoredItems(Split):
    """Items read from a data set: one sweep at a time, ahead of the device, or all to be kept there."""

    def __init__(self, config: DataConfig, split: str):
        self.config, self.split = config, split
        manifest = read_manifest(config.data_dir)
        check_settings(manifest, config)
        self._stored = StoredSplit(manifest, split)
        per_pair = self._stored.num_sweeps if split == "train" else config.n_eval_per_pair
        self.num_items = per_pair * config.num_pairs
        self._is_kept = False

    def keep(self) -> dict[str, np.ndarray]:
        layout = self._stored.layout
        size = self._stored.num_sweeps * layout.packed_length * layout.dtype.itemsize
        self._is_kept = size <= self.config.keep_on_device_mib * 2**20
        return {"sweeps": self._stored.all_sweeps()} if self._is_kept else {}

    def _tokens(self, raw: RawBatch) -> Any:
        if "sweeps" not in raw:
            return jnp.asarray(raw["tokens"]).astype(jnp.int32)
        # The unpadded items of a sweep lie end to end.
        layout, index = self._stored.layout, jnp.asarray(raw["index"])
        sweep, pair = index // layout.config.num_pairs, index % layout.config.num_pairs
        begin, length = (
            jnp.asarray(x, jnp.int32)[pair][:, None] for x in (layout.offsets[:-1], layout.lengths)
        )
        position = jnp.arange(self.config.padded_length, dtype=jnp.int32)[None]
        tokens = jnp.asarray(raw["sweeps"]).at[sweep[:, None], begin + position].get(mode="clip")
        return jnp.where(position < length, tokens.astype(jnp.int32), PAD)

    def _load(self, numbers: BatchNumbers) -> RawBatches:
        if self._is_kept:
            return CountedBatches(numbers)

        def read(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {**raw, "tokens": self._stored.items(raw["index"])}

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READ_AHEAD)
        return ReadBatches(grain.MapDataset.source(numbers).map(read).to_iter_dataset(options))


def _padded(tokens: Any, n_context: Any, n_key: Any, weight: Any, config: DataConfig) -> Batch:
    """Splits padded items (m, padded_length) into input and target, with all that follows from sizes."""
    position = jnp.arange(config.padded_length - 1, dtype=jnp.int32)[None]
    counts = weight[:, None] > 0
    place = jnp.where(counts, stream.scored_places(position, n_context[:, None], n_key[:, None]), -1)
    scored = stream.scored_positions(n_context, n_key, config.max_n_context * config.max_n_key)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        score_mask=place >= 0,
        padding_mask=position < num_positions(n_context, n_key, config)[:, None],
        n_context=n_context,
        n_key=n_key,
        item_weight=weight,
        scored=ScoredPositions(jnp.where(counts, scored, -1), place),
    )


def _packed(batch: Batch, first: Any, layout: RowLayout, config: DataConfig) -> Batch:
    """The rows of `layout` with a batch of padded items that begin at `first`, (m,)."""
    length = num_positions(batch.n_context, batch.n_key, config)
    packing = Packing.of(first, length, layout.rows, layout.length, config.padded_length - 1)
    is_item = packing.is_item
    tokens, targets = (jnp.where(is_item, packing.to_rows(x), PAD) for x in (batch.tokens, batch.targets))
    assert batch.scored is not None
    place = jnp.where(is_item, packing.to_rows(batch.scored.place), -1)
    return dataclasses.replace(
        batch,
        tokens=tokens,
        targets=targets,
        score_mask=place >= 0,
        padding_mask=is_item,
        scored=ScoredPositions(batch.scored.position, place),
        packing=packing,
    )
