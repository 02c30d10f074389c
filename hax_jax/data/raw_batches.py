"""Which items are in which batch, and iterators over raw batches: counted by the host, or read by Grain."""

import abc
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np

# Items are numbered in 32 bits: at batch 64 an endless stream ends after 67 million steps.
MOST_ITEMS = 2**32

RawBatch = Mapping[str, Any]


class BatchNumbers:
    """Batch number -> numbers and weights of its items; a random-access source for Grain.

    Args:
      num_items: of the split, None for an endless stream.
      batch_size: items of a batch.
      repeat: begin again after the last item; otherwise rows beyond it have weight 0.
      drop_remainder: without `repeat`, leave an incomplete last batch out.
      walk: in which order the items of a sweep are taken.
    """

    def __init__(
        self,
        num_items: int | None,
        batch_size: int,
        repeat: bool,
        drop_remainder: bool,
        walk: np.ndarray | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer >= 1, got {batch_size}; the recipe uses 64")
        self._size = batch_size
        self._walk = np.arange(1) if walk is None else walk
        self._num_items = num_items or MOST_ITEMS // len(self._walk) * len(self._walk)
        whole, rest = divmod(self._num_items, batch_size)
        if num_items is None:
            self._length = whole
        elif repeat:
            self._length = sys.maxsize
        else:
            self._length = whole + (rest > 0 and not drop_remainder)
        if self._length == 0:
            raise ValueError(
                f"`batch_size` must be at most {self._num_items}, the items of the split, got {batch_size}; "
                "lower it or use drop_remainder=False"
            )
        self._repeat = repeat

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: Any) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in self.several(number, 1).items()}

    def several(self, number: Any, count: int) -> dict[str, np.ndarray]:
        """The batches from this number on, with a leading axis: index (count, b) uint32, weight float32."""
        shape = count, self._size
        # Python's integers do not overflow in a run that wraps round very often.
        first = int(number) * self._size % self._num_items
        beyond = np.arange(first, first + count * self._size)
        index = beyond % self._num_items
        in_sweep = index % len(self._walk)
        index = (index - in_sweep + self._walk[in_sweep]).astype(np.uint32)
        weight = np.ones(len(beyond), np.float32)
        if not self._repeat:
            weight[beyond >= self._num_items] = 0.0
        return {"index": index.reshape(shape), "weight": weight.reshape(shape)}


class RawBatches(abc.ABC, Iterator[RawBatch]):
    """An iterator over raw batches: dicts of NumPy arrays with the items of a batch as leading axis."""

    @abc.abstractmethod
    def take(self, count: int) -> RawBatch:
        """The next `count` batches, with an axis for them before the others.

        Raises:
          StopIteration: there are not so many.
        """

    @abc.abstractmethod
    def get_state(self) -> dict[str, Any]:
        """Where it stands: a dict of integers that JSON can hold, the same for all kinds."""

    @abc.abstractmethod
    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `get_state` said."""


class CountedBatches(RawBatches):
    """Batches of which the host knows the numbers of the items alone.

    Many are counted at once: one by one, and through Grain, each would take 60 us, during which a GPU that
    takes a millisecond over an update waits.
    """

    def __init__(self, numbers: BatchNumbers):
        self._numbers, self._next = numbers, 0

    def __next__(self) -> RawBatch:
        return {name: array[0] for name, array in self.take(1).items()}

    def take(self, count: int) -> RawBatch:
        """See `RawBatches`."""
        if self._next + count > len(self._numbers):
            raise StopIteration
        raws = self._numbers.several(self._next, count)
        self._next += count
        return raws

    def get_state(self) -> dict[str, Any]:
        """See `RawBatches`."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """See `RawBatches`."""
        self._next = int(state["next_index"])


class ReadBatches(RawBatches):
    """Batches that Grain reads, ahead of the device."""

    def __init__(self, batches: grain.IterDataset):
        self._iterator = iter(batches)

    def __next__(self) -> RawBatch:
        return next(self._iterator)

    def take(self, count: int) -> RawBatch:
        """See `RawBatches`."""
        return jax.tree.map(lambda *arrays: np.stack(arrays), *[next(self) for _ in range(count)])

    def get_state(self) -> dict[str, Any]:
        """See `RawBatches`."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """See `RawBatches`."""
        self._iterator.set_state(state)
