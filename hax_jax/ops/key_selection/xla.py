"""Lifetimes by a sort and a wavelet matrix.

In order of score, best first, the keys better than the one at rank r are exactly those at ranks below r. Its
expiry is the num_keys-th smallest of their positions. Such order statistics of all prefixes at once are
what a wavelet matrix answers: walk the bits of the position from the highest down, at each bit partition
the sequence (zeros first, order kept), and follow every prefix to the side where its answer lies.
"""

import jax
import jax.numpy as jnp

from hax_jax.ops import segments
from hax_jax.ops.sorting import descending, stable_order


def key_lifetimes(scores, num_keys, segment_ids):
    batch, length = scores.shape
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segment_ids is None:
        by_rank = stable_order(descending(scores))
        first = jnp.zeros_like(position)
    else:
        number = segments.numbers(segment_ids)
        by_rank = stable_order(number, descending(scores))
        # Segments lie one after the other by rank as they do in time. Only better keys of the same one count.
        first = segments.begins(number)
    expiry = jax.vmap(lambda p, low: _smallest_in_range(p, low, position[0], num_keys))(by_rank, first)
    expiry = jnp.where(position - first >= num_keys, expiry, length)
    # A key that is never visible dies when it is born.
    expiry = jnp.maximum(expiry, by_rank)
    row = jnp.arange(batch)[:, None]
    return jnp.zeros_like(expiry).at[row, by_rank].set(expiry, unique_indices=True, mode="promise_in_bounds")


def _smallest_in_range(values, low, high, k):
    """The k-th smallest of values[low:high] for many ranges; `values` is a permutation of 0..t-1.

    Where a range holds fewer than k values the answer is meaningless.
    """
    length = values.shape[0]
    index = jnp.arange(length, dtype=jnp.int32)
    rest = jnp.full_like(low, k - 1)
    answer = jnp.zeros_like(low)
    for bit in reversed(range(max(length - 1, 1).bit_length())):
        one = (values >> bit) & 1
        zeros_before = jnp.pad(jnp.cumsum(1 - one), (1, 0)).astype(jnp.int32)
        zeros = zeros_before[-1]
        low_zero, high_zero = zeros_before[low], zeros_before[high]
        go_zero = rest < high_zero - low_zero
        rest = jnp.where(go_zero, rest, rest - (high_zero - low_zero))
        low = jnp.where(go_zero, low_zero, zeros + low - low_zero)
        high = jnp.where(go_zero, high_zero, zeros + high - high_zero)
        answer = jnp.where(go_zero, answer, answer | (1 << bit))
        moved_to = jnp.where(one == 0, zeros_before[:-1], zeros + index - zeros_before[:-1])
        values = jnp.zeros_like(values).at[moved_to].set(values, unique_indices=True)
    return answer
