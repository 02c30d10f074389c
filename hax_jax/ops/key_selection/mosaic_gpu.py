"""Lifetimes by comparing pairs, in one kernel; in long rows from the best keys of each chunk's prefix."""

import jax.numpy as jnp
from jax import lax

from hax_jax.ops import pairs_mosaic_gpu, running_best_mosaic_gpu, segments
from hax_jax.ops.key_selection import xla
from hax_jax.ops.sorting import descending


def why_not(scores, num_keys) -> str | None:
    """Why no kernel should be used for these scores, or None if one should."""
    if scores.dtype == jnp.float64:
        return "scores must have at most 32 bits, got float64"
    if running_best_mosaic_gpu.size_of_lists(num_keys) is None:
        return pairs_mosaic_gpu.why_not(scores.shape)
    return None


def key_lifetimes(scores, num_keys, segment_ids):
    pairs_mosaic_gpu.check("key_lifetimes")
    if why_not(scores, num_keys):
        return xla.key_lifetimes(scores, num_keys, segment_ids)
    rank = _rank(scores)
    if pairs_mosaic_gpu.why_not(scores.shape) is None:
        return _from_pairs(rank, num_keys, segment_ids)
    return _from_chunks(rank, num_keys, segment_ids)[0]


def finds_alive(scores, num_keys) -> bool:
    """Whether `key_lifetimes_and_alive` can take these scores."""
    return why_not(scores, num_keys) is None and pairs_mosaic_gpu.why_not(scores.shape) is not None


def key_lifetimes_and_alive(scores, num_keys, segment_ids):
    pairs_mosaic_gpu.check("key_lifetimes")
    return _from_chunks(_rank(scores), num_keys, segment_ids)


def _rank(scores):
    # Signed integers in the same order: the smaller, the better.
    return lax.bitcast_convert_type(descending(scores) ^ jnp.uint32(1 << 31), jnp.int32)


def _from_pairs(rank, num_keys, segment_ids):
    length = rank.shape[1]

    def step(other, position, values, mine, state, together):
        found, expiry = state
        # Of equal scores the earlier is better.
        better = together & (values[0] < mine[0] + jnp.where(other < position, 1, 0))
        found = found + jnp.where(better, 1, 0)
        return found, jnp.where(better & (found == num_keys), other, expiry)

    # In one part: cut into parts, the last of the better keys takes a second pass to find, and kernels wait
    # for kernels. That is slower.
    _, expiry = pairs_mosaic_gpu.compare(step, (rank,), (rank,), (0, length), segment_ids)
    return jnp.maximum(expiry[0], jnp.arange(length, dtype=jnp.int32))


def _from_chunks(rank, num_keys, segment_ids):
    """All rows as one list of positions, in which a row is at least one segment."""
    batch, length = rank.shape
    number = None
    if segment_ids is not None or batch > 1:
        number = segments.numbers(segments.as_array(segment_ids, rank.shape)).reshape(-1)
        number = running_best_mosaic_gpu.in_groups(number, -1)
    rank = running_best_mosaic_gpu.in_groups(rank.reshape(-1), running_best_mosaic_gpu.NO_RANK)
    death, alive = running_best_mosaic_gpu.deaths(rank, number, num_keys)
    death = death[: batch * length].reshape(batch, length)
    row_begin = length * jnp.arange(batch, dtype=jnp.int32)[:, None]
    expiry = jnp.where(death == running_best_mosaic_gpu.NEVER, length, death - row_begin)
    return expiry, alive[: -(-batch * length // running_best_mosaic_gpu.CHUNK)]
