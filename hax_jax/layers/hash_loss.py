"""The loss that makes hash codes agree where attention to all keys would look.

Codes are integers: without it they change only where a key that already collides gets more or less weight.
docs/science.md derives it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hax_jax.layers.key_scorer import sample_keys
from hax_jax.layers.sequence import Sequence
from hax_jax.ops import segments
from hax_jax.ops.numerics import einsum, wide

# Positions of an item whose pairs are looked at: all pairs of short items, and 8,128 of any other.
SAMPLES = 128
# Soft bits are tanh(_SLOPE z), z of variance 1 for vectors without a preferred direction.
_SLOPE = 2.0
# The most that two soft bits can agree or disagree: saturated ones still have a finite loss.
_MOST = 0.98
_TINY = 1e-12


class Pairs(NamedTuple):
    """All pairs (i, j) among s sampled positions of each item.

    Attributes:
      take: picks the vectors of the rows (b, t, n) at the sampled positions, (m, s, n), without a gradient.
      earlier: (m, s, s), True where position j is real, of the segment of position i, and before it.
      num_earlier: (m, s), for how many positions, sampled or not, that holds.
    """

    take: Callable[[Array], Array]
    earlier: Bool[Array, "m s s"]
    num_earlier: Int[Array, "m s"]


def sample_pairs(noise: Float[Array, "m p"], sequence: Sequence) -> Pairs:
    """Samples positions by uniform `noise`, one number for each position of padded items (m, p).

    Pads are a segment of their own, as causal routing has it, and count neither way.
    """
    packing, ids, real = sequence.packing, sequence.segment_ids, sequence.padding_mask
    if packing is not None:
        ids, real = None, packing.is_token
    sampled = sample_keys(noise, SAMPLES, real)
    ids = segments.as_array(ids, noise.shape)
    at = lambda x: jnp.take_along_axis(x, sampled, axis=1)  # noqa: E731
    earlier = (sampled[:, :, None] > sampled[:, None]) & (at(ids)[:, :, None] == at(ids)[:, None])
    if real is not None:
        earlier &= at(real)[:, :, None] & at(real)[:, None]
    if packing is None:
        take = lambda x: jnp.take_along_axis(x, sampled[..., None], axis=1)  # noqa: E731
    else:
        take = functools.partial(packing.at, position=sampled)
    return Pairs(take, earlier, at(segments.positions(ids)))


def soft_bits(x: Float[Array, "m s n"], projection: Float[Array, "n r"]) -> Float[Array, "m s r"]:
    """Smooth forms of the signs of x . projection, in (-1, 1), for x of length 1."""
    return jnp.tanh(_SLOPE * einsum("msn,nr->msr", x, projection))


def directions(x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
    """x scaled to a length of 1, so that its product with a normal vector has variance 1."""
    x = x.astype(wide(x.dtype))
    square = (x * x).sum(-1, keepdims=True)
    # Centring leaves nothing of an item's first vector, whose direction then has no gradient.
    return jnp.where(square > _TINY, x * lax.rsqrt(jnp.maximum(square, _TINY)), 0)


def wanted(
    q: Float[Array, "m s n"], k: Float[Array, "m s n"], pairs: Pairs, budget: int
) -> Float[Array, "m s s"]:
    """How much each query i wants to collide with each earlier key j, in [0, 1]; 0 for all other pairs.

    t_ij = min(1, budget w_ij), where w_i is the softmax of (q_i - mean q) . k_j over all earlier keys, of
    which the sampled ones stand for all.
    """
    asks = pairs.earlier.any(-1)[..., None]
    mean = jnp.sum(q, axis=1, keepdims=True, where=asks) / jnp.maximum(asks.sum(1, keepdims=True), 1)
    logits = jnp.where(pairs.earlier, einsum("min,mjn->mij", q - mean, k), -jnp.inf)
    # Rows without an earlier key have a largest logit of minus infinity.
    largest = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(logits.dtype).min)
    weight = jnp.exp(logits - largest)
    share = pairs.earlier.sum(-1) / jnp.maximum(pairs.num_earlier, 1)
    weight = weight * (share / jnp.maximum(weight.sum(-1), _TINY))[..., None]
    return jnp.minimum(budget * weight, 1.0)


@jax.named_scope("hash_loss")
def hash_loss(
    q: Float[Array, "m s n"],
    k: Float[Array, "m s n"],
    query_bits: Float[Array, "m s r"],
    key_bits: Float[Array, "m s r"],
    pairs: Pairs,
    budget: int,
) -> Float[Array, ""]:
    """The cross-entropy of soft collisions against how much the queries want them.

    p_ij = prod_r (1 + c s_ir s_jr) / 2 for soft bits s and c = 0.98, the probability that two codes agree
    whose bits are drawn one by one; loss = sum_ij BCE(p_ij, t_ij) / sum_ij t_ij, with t as in `wanted`.

    Args:
      q, k: (m, s, n) queries and keys at the sampled positions, whose products are the attention's scores;
        held constant.
      query_bits, key_bits: (m, s, r), their `soft_bits`, the only inputs that a gradient reaches.
      pairs: of the sampled positions.
      budget: keys that a query wants to collide with.

    Returns:
      A scalar, at least float32; 0 where there are no pairs. Memory grows as m s^2.
    """
    target = lax.stop_gradient(wanted(q, k, pairs, budget))
    log_p = jnp.log((1 + _MOST * query_bits[:, :, None] * key_bits[:, None]) / 2).sum(-1)
    losses = -(target * log_p + (1 - target) * jnp.log1p(-jnp.exp(log_p)))
    return jnp.where(pairs.earlier, losses, 0).sum() / jnp.maximum(target.sum(), _TINY)
