"""Attention by plans: cost linear in the length, the same bits at each run.

Each source is laid out in chunks (`plan.py`) and attended to on its own, without the keys that an earlier
source already shows; the parts are joined by their log-sum-exps into the one softmax over the union. The
backward pass computes the weights again from the joint log-sum-exp. A key has one slot of its own and some
carried ones; the carried gradients are added up in a fixed order.

What happens inside a chunk is a `Tile`: dense algebra on the queries and keys of a chunk. Here it is XLA's;
`mosaic_gpu/chunk_kernels.py` has kernels.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hax_jax.ops import segments
from hax_jax.ops.numerics import einsum, pad_time, wide
from hax_jax.ops.sparse_attention.key_set import KeySet
from hax_jax.ops.sparse_attention.ordered_sum import sum_of_runs
from hax_jax.ops.sparse_attention.plan import PLANNED, make_plan

# The positions of empty slots: every rule asks for j <= i, so none shows them.
NO_QUERY, NO_KEY = -1, 1 << 30


class Tile(NamedTuple):
    """Attention inside chunks, forward and backward.

    forward(kinds, scale, q (h,c,q,n), k (h,c,k,n), v (h,c,k,e), rows, columns)
        -> out (h,c,q,e), lse (h,c,q), both at least float32; a query without keys gets zeros and -inf.
    backward(kinds, scale, q, k, v, rows, columns, d_out, lse, delta)
        -> gradient of q (h,c,q,n), and of the keys in any form that `sums` takes.
    sums(plan, gradient of the keys, n, e) -> gradients of k (h,N,n) and v (h,N,e), slots of a key added up.

    `kinds`, `rows`, `columns` are those of `visible`; the integers are (c,q) and (c,k).
    """

    forward: Callable
    backward: Callable
    sums: Callable
    # The number of keys of a chunk has to be a multiple of this.
    multiple: int = 1
    # A kernel for `make_plan`, or None.
    alive_at_chunks: Callable | None = None


def visible(kinds, rows, columns):
    """Whether the last of `kinds`, sources without their arrays, shows a key that none of the others shows.

    `rows` and `columns` hold position and segment, then the integers of every kind; they broadcast.
    """
    (i, segment_i), (j, segment_j) = rows[:2], columns[:2]
    shown = shown_by_each(kinds, i, j, rows[2:], columns[2:])
    mask = shown[-1] & (segment_i == segment_j)
    for earlier in shown[:-1]:
        # Not `mask & ~earlier`: Mosaic GPU cannot negate booleans in registers.
        mask = jnp.where(earlier, False, mask)
    return mask


def shown_by_each(kinds, i, j, rows, columns):
    """What each of `kinds`, sources without their arrays, shows; integers of one kind after another."""
    shown = []
    for kind in kinds:
        num_rows, num_columns = len(kind.rows()), len(kind.columns())
        shown.append(kind.rule(i, j, rows[:num_rows], columns[:num_columns]))
        rows, columns = rows[num_rows:], columns[num_columns:]
    return shown


def can_plan(key_set: KeySet) -> bool:
    """Whether every source has few keys a query, laid out close together."""
    return all(isinstance(source, PLANNED) for source in key_set.sources)


def sparse_attention(q, k, v, key_set, segment_ids, scale, uniform_empty_rows, *, tile):
    """The contract of the op, for a key set that `can_plan`."""
    heads_first = map(_heads_first, (q, k, v))
    out, seen = _attend(*heads_first, key_set, segment_ids, q.shape[:2], scale, tile)
    out = _heads_last(out, q.shape[:3])
    if uniform_empty_rows:
        seen = _heads_last(seen[..., None], q.shape[:3])
        out = jnp.where(seen, out, uniform_rows(q, k, v, scale))
    return out


def uniform_rows(q, k, v, scale):
    """What the original gives a query without visible keys: the mean of v over the row, later positions too.

    Its gradient is that of a softmax which hides nothing and whose weights happen to be equal: with
    scores s_ij = scale q_i . k_j, d out_i = mean_j (d s_ij - mean_j d s_ij) v_j + mean_j d v_j.
    """
    dtype = wide(q.dtype, v.dtype)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    length = q.shape[1]
    mean_k, mean_v = k.mean(1), v.mean(1)
    held = jax.lax.stop_gradient(v - mean_v[:, None])
    slope = einsum("bthn,bthe->bhne", k - mean_k[:, None], held) / length
    linear = scale * einsum("bthn,bhne->bthe", q, slope)
    return mean_v[:, None] + linear - jax.lax.stop_gradient(linear)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, key_set, ids, shape, scale, tile):
    return _forward(q, k, v, key_set, ids, shape, scale, tile)[0]


def _forward(q, k, v, key_set, ids, shape, scale, tile):
    parts = [_Part(key_set, index, ids, shape, tile) for index in range(len(key_set.sources))]
    results = []
    for part in parts:
        out, lse = tile.forward(
            part.kinds, scale, part.by_query(q), part.by_key(k), part.by_key(v), part.rows, part.columns
        )
        results.append((part.in_time(out), part.in_time(lse[..., None])))
    lse = functools.reduce(jnp.logaddexp, (lse for _, lse in results))
    seen = lse > -jnp.inf
    # Weights of 0 in rows without keys, here and in the backward pass.
    lse = jnp.where(seen, lse, 0)
    out = sum(jnp.exp(part_lse - lse) * part_out for part_out, part_lse in results)
    return (out, seen[..., 0]), (q, k, v, [(p.plan, p.rows, p.columns) for p in parts], key_set, out, lse)


def _backward(shape, scale, tile, saved, d_outputs):
    q, k, v, laid_out, key_set, out, lse = saved
    d_out = d_outputs[0]
    delta = (out * d_out).sum(-1, keepdims=True)
    totals = [jnp.zeros(x.shape, wide(x.dtype)) for x in (q, k, v)]
    for index in range(len(key_set.sources)):
        part = _Part(key_set, index, None, shape, tile, laid_out[index])
        d_q, d_keys = tile.backward(
            part.kinds, scale, part.by_query(q), part.by_key(k), part.by_key(v), part.rows, part.columns,
            part.by_query(d_out.astype(v.dtype)), part.by_query(lse)[..., 0], part.by_query(delta)[..., 0],
        )  # fmt: skip
        gradients = part.in_time(d_q), *tile.sums(part.plan, d_keys, k.shape[-1], v.shape[-1])
        totals = [total + x for total, x in zip(totals, gradients, strict=True)]
    d_q, d_k, d_v = (total.astype(x.dtype) for total, x in zip(totals, (q, k, v), strict=True))
    # The integers of the key set and the segment ids have no gradient.
    return d_q, d_k, d_v, None, None


_attend.defvjp(_forward, _backward)


class _Part:
    """One source's plan, and the ways from positions to slots and back; positions are (h, N, ...)."""

    def __init__(self, key_set, index, ids, shape, tile, laid_out=None):
        sources = key_set.sources[: index + 1]
        # The rules without their arrays: they say what the kernel computes, so they are part of its type.
        self.kinds = jax.tree.map(lambda _: None, sources)
        if laid_out is not None:
            self.plan, self.rows, self.columns = laid_out
            return
        self.plan = make_plan(sources[-1], ids, shape, tile.multiple, tile.alive_at_chunks)
        position = jnp.arange(shape[1], dtype=jnp.int32)
        # Without ids every row is a segment.
        segment = jnp.arange(shape[0], dtype=jnp.int32)[:, None] if ids is None else segments.numbers(ids)
        rows = (position, segment, *(x for source in sources for x in source.rows()))
        columns = (position, segment, *(x for source in sources for x in source.columns()))

        def at(table, integers, absent):
            flat = (jnp.broadcast_to(x, shape).reshape(-1) for x in integers)
            return tuple(
                x.at[table].get(mode="fill", fill_value=absent if number == 0 else 0)
                for number, x in enumerate(flat)
            )

        self.rows = at(self.plan.queries, rows, NO_QUERY)
        self.columns = at(self.plan.keys, columns, NO_KEY)

    def by_query(self, x):
        """(h, N, f) to (h, c, q, f)."""
        if self.plan.natural:
            chunk = self.plan.queries.shape[1]
            return pad_time(x, chunk).reshape(x.shape[0], -1, chunk, x.shape[-1])
        return _take(x, self.plan.queries)

    def by_key(self, x):
        """(h, N, f) to (h, c, k, f)."""
        return _take(x, self.plan.keys)

    def in_time(self, x):
        """(h, c, q, f) to (h, N, f); what stands in empty slots is never read."""
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return x[:, : self.plan.query_slot.shape[0]] if self.plan.natural else x[:, self.plan.query_slot]


def _take(x, table):
    return x.at[:, table].get(mode="fill", fill_value=0)


def _heads_first(x):
    """(b, t, h, f) to (h, b t, f)."""
    return jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, x.shape[3])


def _heads_last(x, shape):
    """(h, b t, f) to (b, t, h, f)."""
    return jnp.moveaxis(x, 0, 1).reshape(*shape[:2], shape[2], x.shape[-1])


def _scores(kinds, scale, q, k, rows, columns):
    mask = visible(kinds, [x[:, :, None] for x in rows], [x[:, None, :] for x in columns])
    return jnp.where(mask, scale * einsum("hcqn,hckn->hcqk", q, k), -jnp.inf)


def _tile_forward(kinds, scale, q, k, v, rows, columns):
    scores = _scores(kinds, scale, q, k, rows, columns)
    highest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(highest == -jnp.inf, 0, highest))
    total = weights.sum(-1, keepdims=True)
    out = einsum("hcqk,hcke->hcqe", weights.astype(v.dtype), v) / jnp.where(total == 0, 1, total)
    return out, (highest + jnp.log(total))[..., 0]


def _tile_backward(kinds, scale, q, k, v, rows, columns, d_out, lse, delta):
    weights = jnp.exp(_scores(kinds, scale, q, k, rows, columns) - lse[..., None])
    d_weights = einsum("hcqe,hcke->hcqk", d_out, v)
    d_scores = (scale * weights * (d_weights - delta[..., None])).astype(q.dtype)
    d_q = einsum("hcqk,hckn->hcqn", d_scores, k)
    d_k = einsum("hcqk,hcqn->hckn", d_scores, q)
    d_v = einsum("hcqk,hcqe->hcke", weights.astype(v.dtype), d_out)
    return d_q, (d_k, d_v)


def _sums(plan, d_keys, features, width):
    """The sums over the slots of each key, in one order."""
    del features, width
    return tuple(_sum_of_slots(plan, x) for x in d_keys)


def own_rows(plan, x):
    """(h, c, k, f) to (h, N, f): what stands in each key's own slot."""
    if plan.natural:
        chunk = plan.queries.shape[1]
        return x[:, :, -chunk:].reshape(x.shape[0], -1, x.shape[-1])[:, : plan.key_slot.shape[0]]
    return x.reshape(x.shape[0], -1, x.shape[-1])[:, plan.key_slot]


def _sum_of_slots(plan, x):
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    own = own_rows(plan, x)
    if plan.carried_slot.shape[0] == 0:
        return own
    # Where there are no more carried keys, what is read belongs to no position's sum.
    return own + sum_of_runs(flat[:, plan.carried_slot], plan.carried_key, plan.first_carried)


XLA_TILE = Tile(_tile_forward, _tile_backward, _sums)
