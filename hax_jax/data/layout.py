"""Which row of a packed batch an item lies in, and where: decided on the host, before anything is compiled.

The length of an item follows from its number alone, and batches are neighbours in a cycle of `num_pairs`
lengths, so there are few different batches as far as lengths go. All of them are laid out here once, in rows
that hold the fullest of them: no item is ever dropped, moved to another batch or cut.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from hax_jax.config import DataConfig
from hax_jax.data.joint_recall import item_length, table_sizes

# Rows longer than this are made a multiple of `_TILE` positions long, which the chunked ops need anyway.
_LONG, _TILE = 1024, 128


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """The places of the items of every batch that occurs.

    Attributes:
      rows: rows of a packed batch.
      length: positions of a row.
      first: (phases, m) int32, where each item begins, counted through all rows; the batch that begins with
        the s-th of the `num_pairs` table sizes of a walk has phase s // stride.
      stride: see `first`.
    """

    rows: int
    length: int
    first: np.ndarray
    stride: int


@functools.lru_cache(maxsize=64)
def row_layout(config: DataConfig, num_items: int, row_multiple: int = 1) -> RowLayout:
    """Lays out all batches of `num_items` items that a split's iterator gives.

    Items go first fit, longest first, into rows of at most `config.packing` positions: as few rows as every
    batch fits into, rounded up to a multiple of `row_multiple` (the devices that share them), and no longer
    than needed.

    Args:
      config: the task; `packing` is not 0.
      num_items: items of a batch, m.
      row_multiple: what the number of rows has to be a multiple of.

    Memory: 4 bytes for each item of each phase; there are num_pairs / gcd(num_pairs, m) phases.
    """
    lengths = _lengths(config)[walk(config)]
    stride = math.gcd(num_items, len(lengths))
    starts = np.arange(0, len(lengths), stride)
    lengths = lengths[(starts[:, None] + np.arange(num_items)) % len(lengths)]

    _, needed = _first_fit(lengths, config.packing, num_items)
    rows = -(-needed // row_multiple) * row_multiple
    step = _TILE if config.packing > _LONG else 1
    fullest = int(lengths.sum(1).max())
    length = max(-(-fullest // rows), int(lengths.max()))
    while True:
        length = min(-(-length // step) * step, config.packing)
        places, used = _first_fit(lengths, length, num_items)
        if used <= rows:
            return RowLayout(rows, length, places.astype(np.int32), stride)
        length += step


def walk(config: DataConfig) -> np.ndarray:
    """The table sizes in the order `config.order`, (num_pairs,) numbers of sizes in a sweep.

    'even' sorts them by length and goes round in steps of 0.618 of their number: any few that follow each
    other then come from all parts of the range.
    """
    if config.order == "file":
        return np.arange(config.num_pairs)
    step = round(config.num_pairs * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, config.num_pairs) > 1:
        step += 1
    by_length = np.argsort(_lengths(config), kind="stable")
    return by_length[np.arange(config.num_pairs) * step % config.num_pairs]


def _lengths(config: DataConfig) -> np.ndarray:
    """Positions of the items of a sweep, (num_pairs,) int64."""
    sizes = table_sizes(config).astype(np.int64)
    return num_positions(sizes[:, 0], sizes[:, 1], config)


def num_positions(n_context: Any, n_key: Any, config: DataConfig) -> Any:
    """Positions of an item that are no pads; integers or arrays.

    All its tokens but for the largest tables: the last token of a padded item is only ever a target.
    """
    length = item_length(n_context, n_key)
    return length - (length == config.padded_length)


def _first_fit(lengths: np.ndarray, row_length: int, most_rows: int) -> tuple[np.ndarray, int]:
    """Places of the items of many batches (batches, m), each batch by itself; and rows of the fullest."""
    batches = np.arange(len(lengths))
    room = np.full((len(lengths), most_rows), row_length, np.int64)
    places = np.empty_like(lengths)
    for item in np.argsort(-lengths, axis=1, kind="stable").T:
        size = lengths[batches, item]
        row = np.argmax(room >= size[:, None], axis=1)
        places[batches, item] = row * row_length + row_length - room[batches, row]
        room[batches, row] -= size
    return places, int((room < row_length).sum(1).max())
