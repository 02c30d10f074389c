"""Dense tiles for the kernels in `dense_kernels.py`: how positions are laid out, and the gradient.

All rows of a batch are one list of positions, cut into tiles of 64: a batch whose b t is a multiple of 64 is
read as it is, whatever the length of its rows. A tile may hold the end of one row and the beginning of the
next; the integers tell them apart.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hax_jax.ops.numerics import pad_time
from hax_jax.ops.sparse_attention.chunks import NO_KEY, NO_QUERY, uniform_rows
from hax_jax.ops.sparse_attention.mosaic_gpu import building_blocks as bb
from hax_jax.ops.sparse_attention.mosaic_gpu import dense_kernels as kernels


def sparse_attention(q, k, v, key_set, segment_ids, scale, uniform_empty_rows, dtype):
    """The contract of the op, for any key set."""
    out, seen = _attend(q, k, v, key_set, segment_ids, scale, dtype)
    if uniform_empty_rows:
        out = jnp.where(seen, out, uniform_rows(q, k, v, scale).astype(dtype))
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, key_set, segment_ids, scale, dtype):
    return _forward(q, k, v, key_set, segment_ids, scale, dtype)[0]


def _forward(q, k, v, key_set, segment_ids, scale, dtype):
    laid_out = _lay_out(key_set, segment_ids, q.shape[:2])
    arrays = _parts_of_features(q), _parts_of_features(k), _parts_of_values(v)
    form = _form(arrays, key_set, segment_ids, scale, q.shape, v.dtype)
    order, first_key_tile = laid_out.walks_of_queries
    out, lse, *visited = kernels.forward(
        form, *arrays, laid_out.rows, laid_out.columns, order, first_key_tile, dtype
    )
    result = _unflat(out, v.shape)
    seen = _unflat((lse > -jnp.inf).T[..., None], (*q.shape[:3], 1))
    return (result, seen), (q, k, v, key_set, segment_ids, laid_out, result, lse, visited)


def _backward(scale, dtype, saved, d_outputs):
    del dtype
    q, k, v, key_set, segment_ids, laid_out, out, lse, (by_query, by_key) = saved
    d_out = d_outputs[0]
    arrays = _parts_of_features(q), _parts_of_features(k), _parts_of_values(v)
    form = _form(arrays, key_set, segment_ids, scale, q.shape, v.dtype)
    # Sums over the blocks of values, each of which has its own share of the gradients.
    products = bb.pad_values(out.astype(jnp.float32) * d_out.astype(jnp.float32))
    delta = _flat(products.reshape(*q.shape[:3], -1, form.width).sum(-1))
    delta = jnp.transpose(delta, (1, 2, 0))
    d_out = _parts_of_values(d_out.astype(v.dtype))
    arguments = (*arrays, d_out, laid_out.rows, laid_out.columns, lse, delta)
    order, first_key_tile = laid_out.walks_of_queries
    d_q = kernels.query_gradient(form, *arguments, order, first_key_tile, by_query)
    order, last_query_tile = laid_out.walks_of_keys
    d_k, d_v = kernels.key_gradients(form, *arguments, order, last_query_tile, by_key)
    d_q, d_k = (x[0] if x.shape[0] == 1 else x.sum(0) for x in (d_q, d_k))
    gradients = (_unflat(d, x.shape).astype(x.dtype) for d, x in ((d_q, q), (d_k, k), (d_v, v)))
    # The integers of the key set and the segment ids have no gradient.
    return *gradients, None, None


_attend.defvjp(_forward, _backward)


class _LaidOut(NamedTuple):
    """Integers (number, positions): position in the row, what must be equal, what the sources ask for.

    The walks of tiles, (tiles,) each: the order in which tiles begin theirs, and the furthest tile that
    shares a row and a segment with each, an earlier one of keys for queries, a later one of queries for keys.
    """

    rows: jax.Array
    columns: jax.Array
    walks_of_queries: tuple[jax.Array, jax.Array]
    walks_of_keys: tuple[jax.Array, jax.Array]


def _lay_out(key_set, segment_ids, shape):
    position = jnp.arange(shape[1], dtype=jnp.int32)[None]
    groups = []
    if _rows_share_tiles(shape):
        groups.append(jnp.arange(shape[0], dtype=jnp.int32)[:, None])
    if segment_ids is not None:
        groups.append(segment_ids)

    def stack(integers, absent):
        flat = jnp.stack([jnp.broadcast_to(x, shape).reshape(-1) for x in (position, *groups, *integers)])
        padding = -flat.shape[1] % bb.ROWS
        if padding == 0:
            return flat
        filler = jnp.zeros((flat.shape[0], padding), jnp.int32).at[0].set(absent)
        return jnp.concatenate([flat, filler], axis=1)

    sources = key_set.sources
    rows = stack([x for source in sources for x in source.rows()], NO_QUERY)
    columns = stack([x for source in sources for x in source.columns()], NO_KEY)
    orders, furthest = _longest_first(shape), _furthest_tiles(segment_ids, shape)
    return _LaidOut(rows, columns, *zip(orders, furthest, strict=True))


def _rows_share_tiles(shape):
    return shape[0] > 1 and shape[1] % bb.ROWS != 0


def _max_distance(length):
    """Tiles that a row may touch, wherever it begins."""
    return (length + bb.ROWS - 2) // bb.ROWS + 1


def _longest_first(shape):
    """Tiles in the order of how far they may have to walk, the furthest first: as queries, and as keys.

    What rows allow is known before segments are; where a row's first segment is its longest, as packed rows
    have it, hardly anything is lost.
    """
    num_positions, length = shape[0] * shape[1], shape[1]
    tile = np.arange(-(-num_positions // bb.ROWS))
    first = tile * bb.ROWS
    last = np.minimum(first + bb.ROWS, num_positions) - 1
    back = tile - first // length * length // bb.ROWS
    ahead = ((last // length + 1) * length - 1) // bb.ROWS - tile
    return tuple(jnp.asarray(np.argsort(-walk, kind="stable"), jnp.int32) for walk in (back, ahead))


def _furthest_tiles(segment_ids, shape):
    """The first tile of keys for each tile of queries, and the last tile of queries for each tile of keys.

    A segment that two tiles share holds everything between them: the last position of the earlier tile, and
    the first of the later one.
    """
    num_positions = shape[0] * shape[1]
    tile = np.arange(-(-num_positions // bb.ROWS), dtype=np.int32)
    first = tile * bb.ROWS
    last = np.minimum(first + bb.ROWS, num_positions) - 1
    distance = np.arange(1, _max_distance(shape[1]), dtype=np.int32)
    # (tiles, distances): the pair of tile and tile - distance.
    earlier = tile[:, None] - distance
    exists = earlier >= 0
    earlier = np.maximum(earlier, 0)
    shared = exists & (first[:, None] // shape[1] == last[earlier] // shape[1])
    later = np.minimum(tile[:, None] + distance, tile[-1])
    of_later = tile[:, None] + distance <= tile[-1]
    if segment_ids is not None:
        ids = segment_ids.reshape(-1)
        ids_first, ids_last = ids[first], ids[last]
        shared = shared & (ids_first[:, None] == ids_last[earlier])
    # What the pair (tile, tile - distance) shares, seen from its earlier tile.
    shared_later = shared[later, distance[None] - 1] & of_later
    back, ahead = (x.sum(1, dtype=np.int32) for x in (shared, shared_later))
    return jnp.asarray(tile - back), jnp.asarray(tile + ahead)


def _form(arrays, key_set, segment_ids, scale, shape, dtype):
    q, _, v = arrays
    width, slots = kernels.fit(q.shape[0], q.shape[-1], v.shape[-1])
    return kernels.Form(
        kinds=jax.tree.map(lambda _: None, key_set.sources),
        num_groups=_rows_share_tiles(shape) + (segment_ids is not None),
        scale=scale,
        max_distance=_max_distance(shape[1]),
        width=width,
        slots=slots,
        dtype=dtype,
    )


def _flat(x):
    """(b, t, h, f) to (positions, h, f), in whole tiles."""
    return pad_time(x.reshape(-1, *x.shape[2:]), bb.ROWS, axis=0)


def _parts_of_features(x):
    return bb.parts(_flat(bb.pad_features(x)))


def _parts_of_values(x):
    return bb.parts(_flat(bb.pad_values(x)))


def _unflat(x, shape):
    """(positions, h, f) to (b, t, h, f), without what was padded."""
    b, t, h, width = shape
    return x[: b * t, :, :width].reshape(b, t, h, width)
