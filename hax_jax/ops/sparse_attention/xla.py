"""Attention a tile of queries at a time, on any device, in linear memory.

A tile evaluates the key set's rule on (block_q, keys). The backward pass keeps one number a row, the
log-sum-exp, and computes the weights again from it; so nothing that outlives a tile is longer than the
sequence. Work grows as t^2: what XLA gains on dense tiles it would lose on gathers, at the lengths this
form is for.

Up to `MAX_UNROLLED` tiles are laid out one after the other, each with just the keys that causality leaves
it, which halves the work; more are a loop whose every tile looks at all keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hax_jax.ops import segments
from hax_jax.ops.numerics import einsum, pad_time, wide

BLOCK_Q = 256
MAX_UNROLLED = 16


def sparse_attention(q, k, v, key_set, segment_ids, scale, uniform_empty_rows):
    ids = segments.as_array(segment_ids, q.shape[:2])
    return _attend(q, k, v, key_set, ids, scale, uniform_empty_rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, key_set, ids, scale, uniform_empty_rows):
    return _forward(q, k, v, key_set, ids, scale, uniform_empty_rows)[0]


def _forward(q, k, v, key_set, ids, scale, uniform_empty_rows):
    scores_of = functools.partial(_scores, key_set, ids, scale, uniform_empty_rows)

    def tile(rows, num_keys, q_tile):
        scores = scores_of(rows, q_tile, k[:, :num_keys])
        highest = scores.max(-1, keepdims=True)
        highest = jnp.where(highest == -jnp.inf, 0, highest)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        # A row without keys: total 0, output 0, and with a log-sum-exp of 0 its weights are 0 again later.
        total = jnp.where(total == 0, 1, total)
        out = einsum("bhts,bshe->bthe", weights.astype(v.dtype), v[:, :num_keys])
        return out / _rows_first(total), _rows_first(highest + jnp.log(total))

    out, lse = _map_tiles(tile, (q,), all_keys=uniform_empty_rows)
    return out, (q, k, v, key_set, ids, out, lse)


def _backward(scale, uniform_empty_rows, saved, d_out):
    q, k, v, key_set, ids, out, lse = saved
    scores_of = functools.partial(_scores, key_set, ids, scale, uniform_empty_rows)
    delta = (out * d_out).sum(-1, keepdims=True)

    def tile(rows, num_keys, q_tile, d_tile, lse_tile, delta_tile):
        weights = jnp.exp(scores_of(rows, q_tile, k[:, :num_keys]) - _rows_first(lse_tile))
        d_weights = einsum("bthe,bshe->bhts", d_tile, v[:, :num_keys])
        d_scores = (scale * weights * (d_weights - _rows_first(delta_tile))).astype(q.dtype)
        d_q = einsum("bhts,bshn->bthn", d_scores, k[:, :num_keys])
        d_k = einsum("bhts,bthn->bshn", d_scores, q_tile)
        d_v = einsum("bhts,bthe->bshe", weights.astype(v.dtype), d_tile)
        return (d_q,), (d_k, d_v)

    zeros = tuple(jnp.zeros(x.shape, wide(x.dtype)) for x in (k, v))
    rowwise = (q, d_out.astype(v.dtype), lse, delta)
    (d_q,), (d_k, d_v) = _map_tiles(tile, rowwise, all_keys=uniform_empty_rows, sums=zeros)
    # The integers of the key set and the segment ids have no gradient.
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)


def _rows_first(x):
    """(b, h, t, 1) to (b, t, h, 1), and back."""
    return jnp.moveaxis(x, 1, 2)


def _scores(key_set, ids, scale, uniform_empty_rows, rows, q_tile, k_tile):
    """Scores (b, h, rows, keys) of a tile, -inf where the key is hidden."""
    columns = jnp.arange(k_tile.shape[1], dtype=jnp.int32)
    mask = key_set.tile(rows, columns) & (ids[:, rows][:, :, None] == ids[:, columns][:, None, :])
    mask = mask[:, None]
    scores = scale * einsum("bthn,bshn->bhts", q_tile, k_tile)
    hidden: jax.Array | float = -jnp.inf
    if uniform_empty_rows:
        # Equal scores in a row without keys give equal weights, and the gradient of an unmasked softmax.
        hidden = jnp.where(mask.any(-1, keepdims=True), -jnp.inf, 0.0)
    return jnp.where(mask, scores, hidden)


def _map_tiles(tile, rowwise, *, all_keys, sums=None):
    """Applies `tile(rows, num_keys, *slices)` to tiles of queries.

    Returns its results joined along time; with `sums`, where `tile` returns (results, parts), also the sum of
    the parts over the tiles, always added in the same order. A part may cover the first `num_keys` keys only.
    """
    length = rowwise[0].shape[1]
    block = min(BLOCK_Q, length)
    num_tiles = -(-length // block)
    if num_tiles <= MAX_UNROLLED:
        joined = []
        for begin in range(0, length, block):
            end = min(begin + block, length)
            num_keys = length if all_keys else end
            result = tile(
                jnp.arange(begin, end, dtype=jnp.int32), num_keys, *(x[:, begin:end] for x in rowwise)
            )
            if sums is not None:
                result, parts = result
                sums = tuple(
                    total.at[:, :num_keys].add(part) for total, part in zip(sums, parts, strict=True)
                )
            joined.append(result)
        results = tuple(jnp.concatenate(pieces, axis=1) for pieces in zip(*joined, strict=True))
        return results if sums is None else (results, sums)

    def split(x):
        x = pad_time(x, block)
        return jnp.moveaxis(x.reshape(x.shape[0], num_tiles, block, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    # Rows past the end repeat the last one's visibility; what they attend to is cut off, and what they would
    # add to sums is 0, since their padded gradients are.
    rows = np.minimum(np.arange(num_tiles * block, dtype=np.int32), length - 1).reshape(num_tiles, block)

    def step(sums, inputs):
        result = tile(inputs[0], length, *inputs[1:])
        if sums is None:
            return None, result
        result, parts = result
        return tuple(map(jnp.add, sums, parts)), result

    sums, results = lax.scan(step, sums, (jnp.asarray(rows), *map(split, rowwise)))
    results = tuple(map(join, results))
    return results if sums is None else (results, sums)
