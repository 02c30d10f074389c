"""Key sets: which keys each query sees, as a few integers per position instead of a t x t mask.

Every source is a rule that says, from integers of the query's position and integers of the key's position
alone, whether the key is visible. Implementations evaluate the rule where they need it: on a whole matrix,
on a tile, in registers. All rules imply j <= i.
"""

import dataclasses
import functools
from typing import Any, Protocol, dataclass_transform, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# (b, t) int32; not annotated as an array, since `jax.tree.map` also builds sources of shapes and shardings,
# and of nothing: a source without its arrays stands for its rule.
PerPosition = Any
Integers = tuple[PerPosition, ...]


@runtime_checkable
class Source(Protocol):
    """One source of visible keys."""

    def rows(self) -> Integers:
        """Integers of the queries, each (b, t)."""

    def columns(self) -> Integers:
        """Integers of the keys, each (b, t)."""

    def rule(self, i: jax.Array, j: jax.Array, rows: Integers, columns: Integers) -> jax.Array:
        """Whether query position i sees key position j; elementwise over arrays that broadcast."""


@dataclass_transform(frozen_default=True)
def _source(*, static: tuple[str, ...] = (), arrays: tuple[str, ...] = ()):
    """Makes a frozen dataclass a pytree: `arrays` are its leaves, `static` is part of its type."""

    def decorate(kind):
        kind = dataclasses.dataclass(frozen=True)(kind)
        return jax.tree_util.register_dataclass(kind, data_fields=list(arrays), meta_fields=list(static))

    return decorate


class _Positional:
    """A source that needs nothing but the two positions."""

    def rows(self) -> Integers:
        return ()

    def columns(self) -> Integers:
        return ()


@_source()
class Full(_Positional):
    """Every key up to the query: j <= i."""

    def rule(self, i, j, rows, columns):
        del rows, columns
        return j <= i


@_source(static=("size",))
class SlidingWindow(_Positional):
    """The query's own position and the size - 1 before it: 0 <= i - j < size."""

    size: int

    def rule(self, i, j, rows, columns):
        del rows, columns
        return (j <= i) & (i - j < self.size)


class _ByKeyPosition:
    """A source that looks at the key's position inside its segment."""

    key_position: PerPosition

    def rows(self) -> Integers:
        return ()

    def columns(self) -> Integers:
        return (self.key_position,)


@_source(static=("size",), arrays=("key_position",))
class Sink(_ByKeyPosition):
    """The first `size` keys of a segment."""

    size: int
    key_position: PerPosition

    def rule(self, i, j, rows, columns):
        (position,) = columns
        return (j <= i) & (position < self.size)


@_source(static=("stride",), arrays=("key_position",))
class Dilated(_ByKeyPosition):
    """Every stride-th key of a segment: position mod stride == stride - 1."""

    stride: int
    key_position: PerPosition

    def rule(self, i, j, rows, columns):
        (position,) = columns
        return (j <= i) & (position % self.stride == self.stride - 1)


@_source(static=("size", "num_codes"), arrays=("query_code", "query_count", "key_code", "key_order"))
class HashBuckets:
    """The `size` most recent keys with the query's hash code; counts and orders as `ops.lsh` numbers them.

    `num_codes` says that codes are in 0..num_codes - 1, where that is known; it shortens sorts.
    """

    size: int
    query_code: PerPosition
    query_count: PerPosition
    key_code: PerPosition
    key_order: PerPosition
    num_codes: int | None = None

    def rows(self) -> Integers:
        return self.query_code, self.query_count

    def columns(self) -> Integers:
        return self.key_code, self.key_order

    def rule(self, i, j, rows, columns):
        # Within a segment age >= 0 implies j <= i; across segments the numbers mean nothing.
        (query_code, count), (key_code, order) = rows, columns
        age = count - 1 - order
        return (query_code == key_code) & (age >= 0) & (age < self.size) & (j <= i)


@_source(static=("size",), arrays=("expiry", "alive"))
class Lifetimes:
    """Keys in the running top-k: j <= i < expiry_j; expiries are `ops.key_selection.key_lifetimes`'.

    `size` is that k: the caller's word that no query sees more keys. `alive`, where it is not None, are the
    keys that are alive where each chunk begins, as `key_lifetimes_and_alive` finds them.
    """

    size: int
    expiry: PerPosition
    alive: Any = None

    def rows(self) -> Integers:
        return ()

    def columns(self) -> Integers:
        return (self.expiry,)

    def rule(self, i, j, rows, columns):
        (expiry,) = columns
        return (j <= i) & (i < expiry)


@_source(arrays=("sources",))
class KeySet:
    """The union of sources; a key that several of them show counts once."""

    sources: tuple[Source, ...]

    def tile(self, i: Int[Array, " r"], j: Int[Array, " c"]) -> Bool[Array, "b r c"]:
        """Visibility of every key position in `j` to every query position in `i`; the batch axis may be 1."""
        return self._union(
            i[None, :, None],
            j[None, None, :],
            lambda array: array[:, i][:, :, None],
            lambda array: array[:, j][:, None, :],
        )

    def pairs(self, i: Int[Array, "b m"], j: Int[Array, "b m"]) -> Bool[Array, "b m"]:
        """Visibility of key position j[b, m] to query position i[b, m]."""
        return self._union(
            i,
            j,
            lambda array: jnp.take_along_axis(
                jnp.broadcast_to(array, (i.shape[0], array.shape[1])), i, axis=1
            ),
            lambda array: jnp.take_along_axis(
                jnp.broadcast_to(array, (j.shape[0], array.shape[1])), j, axis=1
            ),
        )

    def places(self, row: Int[Array, "*#n"], i: Int[Array, "*#n"], j: Int[Array, "*#n"]) -> Bool[Array, "*n"]:
        """Visibility of key position j to query position i of batch row `row`, element by element."""
        row, i, j = jnp.broadcast_arrays(row, i, j)
        take = lambda array, at: array.at[jnp.minimum(row, len(array) - 1), at].get(mode="clip")  # noqa: E731
        return self._union(i, j, lambda array: take(array, i), lambda array: take(array, j))

    def _union(self, i, j, take_rows, take_columns):
        visible = [
            source.rule(
                i, j, tuple(map(take_rows, source.rows())), tuple(map(take_columns, source.columns()))
            )
            for source in self.sources
        ]
        return functools.reduce(jnp.logical_or, visible)
