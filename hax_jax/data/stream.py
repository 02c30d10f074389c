"""Joint recall made on the device: item = f(seed, split, index), inside the compiled program.

The items have the distribution of the published generator (values uniform and independent, every order of
contexts and keys uniform and independent) but a random stream of their own: nothing is stored, nothing
repeats with the epoch, and each item depends on its index alone, whatever batch it comes in. Items can
repeat by chance where a table size has few of them; at the published sizes there are more than 10^55.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt

from hax_jax.config import DataConfig
from hax_jax.data.joint_recall import (
    FIRST_VALUE,
    PAD,
    SEPARATOR,
    SPLITS,
    START,
    first_context,
    first_key,
)

# An arbitrary number, the letters JR.
_PURPOSE = 0x4A520000


def table_sizes(index: UInt[Array, " b"], config: DataConfig) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
    """Contexts and keys of the tables of items, `index mod num_pairs` in the order of a sweep, int32."""
    n_keys = config.max_n_key - config.min_n_key + 1
    pair = (index % jnp.uint32(config.num_pairs)).astype(jnp.int32)
    return config.min_n_context + pair // n_keys, config.min_n_key + pair % n_keys


def scored_places(
    position: Int[Array, "#b t"], n_context: Int[Array, "#b #t"], n_key: Int[Array, "#b #t"]
) -> Int[Array, "b t"]:
    """Which of the questions of its item each position asks, from 0, and -1 for those that ask none.

    The questions are the keys after the separator; there are n_context * n_key.

    Args:
      position: int32, counted from the item's start token; negative ones ask nothing.
      n_context, n_key: int32, the sizes of the item's table.
    """
    half, place, in_half = _places(position, n_context, n_key)
    row, in_row = place // (2 * n_key + 1), place % (2 * n_key + 1)
    asks = (half == 1) & in_half & (in_row % 2 == 1)
    return jnp.where(asks, row * n_key + in_row // 2, -1)


def scored_positions(
    n_context: Int[Array, " b"], n_key: Int[Array, " b"], num_places: int
) -> Int[Array, "b num_places"]:
    """The position in its item of each question, in order; -1 where there are fewer. See `scored_places`."""
    place = jnp.arange(num_places, dtype=jnp.int32)
    c, k = n_context[:, None], n_key[:, None]
    position = c * (2 * k + 1) + 2 + place // k * (2 * k + 1) + 1 + 2 * (place % k)
    return jnp.where(place < c * k, position, -1)


@jax.named_scope("materialize")
def make_items(index: UInt[Array, " b"], split: str, config: DataConfig) -> Int[Array, "b length"]:
    """Makes items by their numbers.

    Args:
      index: (b,) uint32, numbers of the items.
      split: 'train', 'valid' or 'test'; each has its own items.
      config: table sizes, number of values and seed.

    Returns:
      (b, padded_length) int32 tokens.

    Memory: linear in the tokens; the orders of `2 * max_n_context * max_n_key` keys are drawn for each item.
    """
    # The generator is named, so that a change of JAX's default cannot change the items; the first word
    # keeps the key apart from `jax.random.key(seed)` and from the other splits.
    words = jnp.array([_PURPOSE + SPLITS.index(split), config.seed], jnp.uint32)
    split_key = jax.random.wrap_key_data(words, impl="threefry2x32")
    n_context, n_key = table_sizes(index, config)
    make = functools.partial(_make_item, split_key, config=config)
    return jax.vmap(make)(index, n_context, n_key)


def _make_item(
    split_key: Array, index: Array, n_context: Array, n_key: Array, config: DataConfig
) -> Int[Array, " length"]:
    # Everything is drawn for the largest table, so that shapes do not depend on the item.
    most_contexts, most_keys = config.max_n_context, config.max_n_key
    shapes = {
        "values": (most_contexts, most_keys),
        "contexts": (2, most_contexts),
        "keys": (2, most_contexts, most_keys),
    }
    bits = _bits(jax.random.fold_in(split_key, index), shapes)
    # A remainder of 32 bits favours some values by less than n_value / 2^32.
    values = (bits["values"] % jnp.uint32(config.n_value)).astype(jnp.int32)
    contexts = _orders(bits["contexts"], n_context)
    keys = _orders(bits["keys"], n_key)

    position = jnp.arange(config.padded_length, dtype=jnp.int32)
    half, place, in_half = _places(position, n_context, n_key)
    row, in_row = place // (2 * n_key + 1), place % (2 * n_key + 1)
    # Outside the halves these point anywhere; the last line leaves those places out.
    context = contexts.at[half, row].get(mode="clip")
    key = keys.at[half, row, (in_row - 1) // 2].get(mode="clip")
    value = values.at[context, key].get(mode="clip")
    token = jnp.where(
        in_row == 0,
        first_context(config) + context,
        jnp.where(in_row % 2 == 1, first_key(config) + key, FIRST_VALUE + value),
    )
    separator = n_context * (2 * n_key + 1) + 1
    fixed = jnp.where(position == 0, START, jnp.where(position == separator, SEPARATOR, PAD))
    return jnp.where(in_half, token, fixed).astype(jnp.int32)


def _places(position: Array, n_context: Array, n_key: Array) -> tuple[Array, Array, Array]:
    """Which half of an item a position is in, its place there, and whether it is in a half at all."""
    size = n_context * (2 * n_key + 1)
    half = (position > size + 1).astype(jnp.int32)
    place = position - 1 - half * (size + 1)
    return half, place, (place >= 0) & (place < size)


def _bits(key: Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, UInt[Array, "..."]]:
    """Random 32-bit words in several shapes, from one call of the generator: each takes long to compile."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    words = jax.random.bits(key, (sum(sizes),), jnp.uint32)
    parts = jnp.split(words, list(itertools.accumulate(sizes))[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def _orders(bits: UInt[Array, "*shape"], count: Array) -> Int[Array, "*shape"]:
    """Uniform orders of `count` things along the last axis; what follows them there is of no meaning.

    Sorting random bits gives every order the same chance but for ties, which have a chance below
    count^2 / 2^33 and keep their order.
    """
    last = jnp.uint32(2**32 - 1)
    bits = jnp.where(jnp.arange(bits.shape[-1]) < count, bits, last)
    return jnp.argsort(bits, axis=-1, stable=True).astype(jnp.int32)
