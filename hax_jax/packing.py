"""Several items in a row: where each of them lies, and the ways between rows and items.

A packed batch has r rows of l positions that hold m items end to end. What an item would be in a padded
row of its own, (m, padded_length), is its *padded form*. Everything here moves whole vectors from one place
to exactly one other, so that gradients move them back: no sums, no scatters, the same bits every time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from hax_jax.ops import segments


@jax.custom_vjp
def move(x: Array, source: Int[Array, "g p"], target: Int[Array, "g n"]) -> Array:
    """Moves vectors to new places: y[g, p] = x[g, source[g, p]], zeros where the source is negative.

    Args:
      x: (g, n, ...); each of the g groups by itself.
      source: (g, p) int32, which vector comes to each place; -1 for none. No vector may come to two places.
      target: (g, n) int32, the place to which each vector goes, -1 for none: the inverse of `source`, along
        which gradients move back.

    Returns:
      (g, p, ...) in the dtype of x.
    """
    del target
    return _gather(x, source)


def _gather(x, index):
    found = jnp.take_along_axis(x, _like(jnp.maximum(index, 0), x), axis=1, mode="clip")
    return jnp.where(_like(index >= 0, x), found, jnp.zeros((), x.dtype))


def _like(array, x):
    return array.reshape(array.shape + (1,) * (x.ndim - 2))


def _move_forward(x, source, target):
    return _gather(x, source), (source, target)


def _move_backward(saved, d_y):
    _, target = saved
    return _gather(d_y, target), None, None


move.defvjp(_move_forward, _move_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the items of packed rows lie.

    Attributes:
      segment_ids: (r, l) int32, the number of the item at each position, negative where there is none
        (`segments.empty`).
      first: (m,) int32, the position of each item's first token, counted through all rows.
      length: (m,) int32, positions of each item.
      padded_length: positions of an item in a row of its own.
    """

    # As every pytree it also holds shapes or shardings in place of the arrays.
    segment_ids: Any
    first: Any
    length: Any
    padded_length: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, first: Array, length: Array, rows: int, row_length: int, padded_length: int) -> "Packing":
        """The packing of items that begin at `first` and have `length` positions, (m,) int32 each.

        Memory grows as m + rows * row_length, and time as m * rows * row_length.
        """
        # All pairs in one pass are cheaper than a sort and a search, each a handful of kernels.
        item = jnp.arange(first.shape[0], dtype=jnp.int32)[:, None]
        flat = jnp.arange(rows * row_length, dtype=jnp.int32)
        inside = (flat >= first[:, None]) & (flat < (first + length)[:, None])
        ids = jnp.where(inside, item, segments.empty(flat)).max(axis=0).reshape(rows, row_length)
        return cls(ids, first, length, padded_length)

    @property
    def num_items(self) -> int:
        """m."""
        return self.first.shape[0]

    @property
    def positions(self) -> Int[Array, "r l"]:
        """The position of each token in its item; of no meaning where there is no item."""
        shape = self.segment_ids.shape
        flat = jnp.arange(self.segment_ids.size, dtype=jnp.int32).reshape(shape)
        return flat - self.spread(self.first)

    @property
    def is_item(self) -> Bool[Array, "r l"]:
        """True where the rows hold an item."""
        return self.segment_ids >= 0

    @property
    def is_token(self) -> Bool[Array, "m padded_length"]:
        """True where the padded form of an item holds one of its positions."""
        return jnp.arange(self.padded_length, dtype=jnp.int32) < self.length[:, None]

    @jax.named_scope("packing")
    def spread(self, values: Array) -> Array:
        """Gives every position its item's value: (m,) integers to (r, l); of no meaning without an item."""
        return jnp.take(values, jnp.maximum(self.segment_ids, 0), axis=0, mode="clip")

    @jax.named_scope("packing")
    def to_items(self, x: Array) -> Array:
        """Rows (r, l, ...) as padded items (m, padded_length, ...), zeros beyond an item's end."""
        in_items, in_rows = self._places()
        moved = move(x.reshape(1, -1, *x.shape[2:]), in_items.reshape(1, -1), in_rows.reshape(1, -1))
        return moved.reshape(*in_items.shape, *x.shape[2:])

    @jax.named_scope("packing")
    def at(self, x: Array, position: Int[Array, "m k"]) -> Array:
        """The vectors of rows x (r, l, ...) at positions of each item, (m, k, ...), zeros beyond its end.

        To be looked at only: gradients, where there are any, are scattered.
        """
        source = jnp.where(position < self.length[:, None], self.first[:, None] + position, -1)
        found = _gather(x.reshape(1, -1, *x.shape[2:]), source.reshape(1, -1))
        return found.reshape(*source.shape, *x.shape[2:])

    @jax.named_scope("packing")
    def to_rows(self, x: Array) -> Array:
        """Padded items (m, padded_length, ...) as rows (r, l, ...), zeros where there is no item."""
        in_items, in_rows = self._places()
        moved = move(x.reshape(1, -1, *x.shape[2:]), in_rows.reshape(1, -1), in_items.reshape(1, -1))
        return moved.reshape(*in_rows.shape, *x.shape[2:])

    def _places(self) -> tuple[Int[Array, "m padded_length"], Int[Array, "r l"]]:
        """The place in the rows of each position of the padded items, and the reverse; -1 for none."""
        position = jnp.arange(self.padded_length, dtype=jnp.int32)
        in_items = jnp.where(self.is_token, self.first[:, None] + position, -1)
        in_rows = self.segment_ids * self.padded_length + self.positions
        return in_items, jnp.where(self.is_item, in_rows, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoredPositions:
    """The positions of a batch where predictions count: s places an item, of which the first few are used.

    Attributes:
      position: (m, s) int32, the position in the item, -1 in unused places.
      place: (b, t) int32, the place of each position among those of its item, -1 where nothing counts.
    """

    position: Any
    place: Any

    @property
    def used(self) -> Bool[Array, "m s"]:
        """True in used places."""
        return self.position >= 0

    @jax.named_scope("packing")
    def take(self, x: Array, packing: Packing | None = None) -> Array:
        """The vectors of x (b, t, ...) at scored positions, (m, s, ...), zeros in unused places."""
        if packing is None:
            return move(x, self.position, self.place)
        places = self.position.shape[1]
        source = jnp.where(self.used, packing.first[:, None] + self.position, -1)
        target = jnp.where(self.place >= 0, packing.segment_ids * places + self.place, -1)
        moved = move(x.reshape(1, -1, *x.shape[2:]), source.reshape(1, -1), target.reshape(1, -1))
        return moved.reshape(*source.shape, *x.shape[2:])
