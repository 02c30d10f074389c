"""Joint recall, the task: token layout, the published generator, and its text form, in plain NumPy.

A table gives every (context, key) its own value. An item states the whole table once, then asks for it:
all contexts and keys come again, in other orders, and at each of these keys the next token, its value,
has to be predicted. A worked example with 2 contexts, 2 keys and 3 values, in tables of at most 2 x 3:

    token ids   1 start, 3 pad, 4 separator, values from 10, keys from 10 + 3 = 13 (3 of them, although
                this item uses 2), contexts from 13 + 3 = 16
    table       context 16: key 13 -> 12, key 14 -> 10; context 17: key 13 -> 10, key 14 -> 11
    position     0   1  2  3  4  5   6  7  8  9 10  11  12 13 14 15 16  17 18 19 20 21  22 ... 29
    token        1  17 14 11 13 10  16 13 12 14 10   4  16 14 10 13 12  17 14 11 13 10   3 ...  3
    scored       .   .  .  .  .  .   .  .  .  .  .   .   .  *  .  *  .   .  *  .  *  .   . ...  .

The prediction at position 13, for context 16 and key 14, should be 10, the token at position 14.

The published data set walks over the table sizes, all (n_context, n_key) with context outer, one item
each: a sweep. Train, valid and test are so many sweeps each, drawn in one stream from one seed.
"""

import math
from typing import Any

import numpy as np

from hax_jax.config import ConfigError, DataConfig

START = 1
PAD = 3
SEPARATOR = 4
FIRST_VALUE = 10
SPLITS = ("train", "valid", "test")

# A table size with at least 2**128 different items never repeats one: for 2**30 items of that size the
# chance is below 2**-68. Only smaller ones are compared with the items drawn before.
_LOG2_NEVER_REPEATS = 128

# Sweeps, and draws of 8 bytes each, beyond which drawing more of them together gains nothing.
_SWEEPS_TOGETHER, _DRAWS_TOGETHER = 100, 2**23


def first_key(config: DataConfig) -> int:
    """Token id of key 0; the values lie below it."""
    return FIRST_VALUE + config.n_value


def first_context(config: DataConfig) -> int:
    """Token id of context 0; the keys lie below it."""
    return first_key(config) + config.max_n_key


def token_dtype(config: DataConfig) -> np.dtype:
    """The unsigned integer that stores a token: uint8, or uint16 for more than 256 token ids.

    Raises ConfigError where 16 bits are not enough.
    """
    if config.min_vocab_size > 2**16:
        raise ConfigError(
            "data.n_value", "small enough for 65536 token ids in all", config.n_value,
            f"these tables need {config.min_vocab_size} ids; lower it, data.max_n_key or data.max_n_context, "
            "or use the stream",
        )
    return np.dtype(np.uint8 if config.min_vocab_size <= 2**8 else np.uint16)


def table_sizes(config: DataConfig) -> np.ndarray:
    """All (n_context, n_key) in the order of a sweep, (num_pairs, 2) int32."""
    contexts = np.arange(config.min_n_context, config.max_n_context + 1, dtype=np.int32)
    keys = np.arange(config.min_n_key, config.max_n_key + 1, dtype=np.int32)
    return np.stack(np.meshgrid(contexts, keys, indexing="ij"), axis=-1).reshape(-1, 2)


def item_length(n_context: Any, n_key: Any) -> Any:
    """Tokens of an item before padding: `2 * n_context * (2 * n_key + 1) + 2`; integers or arrays."""
    return 2 * n_context * (2 * n_key + 1) + 2


def score_mask(n_context: int, n_key: int, length: int) -> np.ndarray:
    """Which tokens of an item are scored, (length,) bool: the keys after the separator."""
    half = n_context * (2 * n_key + 1)
    mask = np.zeros(length, bool)
    in_row = np.arange(half) % (2 * n_key + 1)
    mask[half + 2 : 2 * half + 2] = in_row % 2 == 1
    return mask


def assemble(values: np.ndarray, contexts: np.ndarray, keys: np.ndarray, config: DataConfig) -> np.ndarray:
    """Writes tables as items.

    Args:
      values: (..., c, k), the value number of each context and key.
      contexts: (..., 2, c), the order of the contexts in each half.
      keys: (..., 2, c, k), the order of the keys below the context that comes s-th in each half.
      config: gives the token ids.

    Returns:
      (..., item_length(c, k)) of `token_dtype`: the items, without padding.
    """
    *batch, c, k = values.shape
    half = c * (2 * k + 1)
    tokens = np.empty((*batch, item_length(c, k)), token_dtype(config))
    tokens[..., 0] = START
    tokens[..., half + 1] = SEPARATOR
    for h, start in enumerate((1, half + 2)):
        rows = np.empty((*batch, c, 2 * k + 1), tokens.dtype)
        rows[..., 0] = first_context(config) + contexts[..., h, :]
        rows[..., 1::2] = first_key(config) + keys[..., h, :, :]
        row_values = np.take_along_axis(values, contexts[..., h, :, None], axis=-2)
        rows[..., 2::2] = FIRST_VALUE + np.take_along_axis(row_values, keys[..., h, :, :], axis=-1)
        tokens[..., start : start + half] = rows.reshape(*batch, half)
    return tokens


def draw_item(rng: np.random.RandomState, n_context: int, n_key: int, config: DataConfig) -> np.ndarray:
    """Draws one item with the published generator's calls in the published order.

    The values of the whole table first; then, per half, the order of the contexts, and an order of the
    keys for each context as it comes. `PublishedItems` is the fast way to the same stream.

    Args:
      rng: the legacy generator; it moves on.
      n_context: contexts of the table.
      n_key: keys of the table.
      config: gives `n_value` and the token ids.

    Returns:
      (item_length(n_context, n_key),) of `token_dtype`.
    """
    values = rng.randint(0, config.n_value, (n_context, n_key))
    contexts, keys = [], []
    for _ in range(2):
        contexts.append(rng.permutation(n_context))
        keys.append([rng.permutation(n_key) for _ in range(n_context)])
    return assemble(values, np.array(contexts), np.array(keys), config)


class SweepLayout:
    """Where the items of a sweep lie once they are stored end to end without padding.

    A sweep has one item per table size and the size alone sets the length, so nothing but the tokens has
    to be stored.

    Attributes:
      config: the task.
      sizes: (num_pairs, 2) int32, `table_sizes`.
      lengths: (num_pairs,) int64, tokens of each item.
      offsets: (num_pairs + 1,) int64, where each item begins; the last is the length of a packed sweep.
      dtype: `token_dtype`.
    """

    def __init__(self, config: DataConfig):
        self.config = config
        self.sizes = table_sizes(config)
        self.lengths = item_length(*self.sizes.astype(np.int64).T)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.dtype = token_dtype(config)
        self._is_token = np.arange(config.padded_length) < self.lengths[:, None]

    @property
    def packed_length(self) -> int:
        """Tokens of a packed sweep."""
        return int(self.offsets[-1])

    def pad(self, packed: np.ndarray) -> np.ndarray:
        """Packed sweeps (n, packed_length) as padded items (n, num_pairs, padded_length)."""
        tokens = np.full((len(packed), *self._is_token.shape), PAD, self.dtype)
        tokens[:, self._is_token] = packed
        return tokens

    def score_masks(self) -> np.ndarray:
        """The score mask of each item of a sweep, (num_pairs, padded_length) bool."""
        return np.stack([score_mask(c, k, self.config.padded_length) for c, k in self.sizes.tolist()])


def distinct_items(n_context: int, n_key: int, n_value: int) -> int | float:
    """How many different items a table size has: `n_value^(ck) (c!)^2 (k!)^(2c)`; inf from 2^128 on."""
    c, k = n_context, n_key
    log = c * k * math.log(n_value) + 2 * math.lgamma(c + 1) + 2 * c * math.lgamma(k + 1)
    if log > _LOG2_NEVER_REPEATS * math.log(2):
        return math.inf
    return n_value ** (c * k) * math.factorial(c) ** 2 * math.factorial(k) ** (2 * c)


def check_enough_items(config: DataConfig, items_per_pair: int) -> None:
    """Raises ConfigError if a table size has fewer different items than `items_per_pair`.

    A repeated item is drawn again, so asking for more would never end.
    """
    for c, k in table_sizes(config).tolist():
        if (available := distinct_items(c, k, config.n_value)) < items_per_pair:
            raise ConfigError(
                "items_per_pair", f"at most {available}, in all splits together", items_per_pair,
                f"tables of {c} context(s), {k} key(s) and {config.n_value} values give no more items",
            )


class PublishedItems:
    """The published data set's items, in order, bit for bit, a sweep at a time.

    Every draw of the published generator, `randint(0, n)` or a step of a Fisher-Yates permutation, takes
    32-bit words from the same stream until one, masked to the bits of n - 1, is in range. One
    `randint(0, [n0, n1, ...])` for all draws of a sweep therefore consumes the same words as the
    generator's own many small calls, and the permutations are carried out afterwards, on many items at
    once: about 7 times faster than `draw_item`, to which the tests hold it.

    An item whose text line came before, in any split, is drawn again. Memory: 8 bytes per draw (0.4 MB a
    sweep at the published sizes), and the items seen so far of table sizes that can repeat.

    Attributes:
      layout: the layout of a sweep.
      sweeps_together: how many sweeps are best drawn by one call.
    """

    def __init__(self, config: DataConfig):
        self.layout = SweepLayout(config)
        self._config = config
        self._rng = np.random.RandomState(config.seed)
        sizes = self.layout.sizes.tolist()
        self._limits = [_draw_limits(c, k, config.n_value) for c, k in sizes]
        self._ends = np.cumsum([len(limits) for limits in self._limits])
        self._all_limits = np.concatenate(self._limits)
        self.sweeps_together = max(1, min(_SWEEPS_TOGETHER, _DRAWS_TOGETHER // len(self._all_limits)))
        can_repeat = [distinct_items(c, k, config.n_value) < math.inf for c, k in sizes]
        self._seen: dict[int, set[bytes]] = {int(pair): set() for pair in np.flatnonzero(can_repeat)}

    def sweeps(self, count: int) -> np.ndarray:
        """The next `count` sweeps, packed: (count, packed_length) of `token_dtype`."""
        state = self._rng.get_state(legacy=False)
        packed = self._draw_together(count)
        if self._all_new(packed):
            return packed
        # Somewhere in here an item has to be drawn again, which shifts all that follows.
        self._rng.set_state(state)
        if count == 1:
            return self._draw_one_by_one()[None]
        return np.concatenate([self.sweeps(count // 2), self.sweeps(count - count // 2)])

    def _draw_together(self, count: int) -> np.ndarray:
        draws = np.stack([self._rng.randint(0, self._all_limits, dtype=np.int64) for _ in range(count)])
        packed = np.empty((count, self.layout.packed_length), self.layout.dtype)
        for pair, (c, k) in enumerate(self.layout.sizes.tolist()):
            mine = draws[:, self._ends[pair] - len(self._limits[pair]) : self._ends[pair]]
            halves = mine[:, c * k :].reshape(count, 2, c - 1 + c * (k - 1))
            items = assemble(
                mine[:, : c * k].reshape(count, c, k),
                _permutations(halves[:, :, : c - 1]),
                _permutations(halves[:, :, c - 1 :].reshape(count, 2, c, k - 1)),
                self._config,
            )
            packed[:, self.layout.offsets[pair] : self.layout.offsets[pair + 1]] = items
        return packed

    def _all_new(self, packed: np.ndarray) -> bool:
        """Whether no item repeats; if so, they are remembered."""
        new = {}
        for pair, seen in self._seen.items():
            items = packed[:, self.layout.offsets[pair] : self.layout.offsets[pair + 1]]
            new[pair] = {item.tobytes() for item in items}
            if len(new[pair]) < len(items) or not seen.isdisjoint(new[pair]):
                return False
        for pair, seen in self._seen.items():
            seen |= new[pair]
        return True

    def _draw_one_by_one(self) -> np.ndarray:
        items = []
        for pair, (c, k) in enumerate(self.layout.sizes.tolist()):
            item = draw_item(self._rng, c, k, self._config)
            if pair in self._seen:
                while item.tobytes() in self._seen[pair]:
                    item = draw_item(self._rng, c, k, self._config)
                self._seen[pair].add(item.tobytes())
            items.append(item)
        return np.concatenate(items)


def _draw_limits(n_context: int, n_key: int, n_value: int) -> np.ndarray:
    """The exclusive upper limit of every draw of an item, in order."""
    half = [*range(n_context, 1, -1), *(list(range(n_key, 1, -1)) * n_context)]
    return np.array([n_value] * (n_context * n_key) + half * 2, np.int64)


def _permutations(draws: np.ndarray) -> np.ndarray:
    """Permutations of n from Fisher-Yates draws (..., n - 1), which run from the last position down."""
    n = draws.shape[-1] + 1
    count = math.prod(draws.shape[:-1])
    picks = np.ascontiguousarray(draws.reshape(count, n - 1).T)
    order = np.empty((n, count), np.int16 if n < 2**15 else np.int64)
    order[:] = np.arange(n)[:, None]
    columns = np.arange(count)
    for last, pick in zip(range(n - 1, 0, -1), picks, strict=True):
        picked = order[pick, columns]
        order[pick, columns] = order[last]
        order[last] = picked
    return order.T.reshape(*draws.shape[:-1], n)


def text_lines(items: np.ndarray) -> bytes:
    """Items (n, length) as the original's text: decimal numbers with spaces between, a line per item."""
    numbers = range(int(items.max(initial=0)) + 1)
    width = 4 if len(numbers) <= 1000 else 8
    # Each number at a fixed width, as one machine word, filled up with zero bytes that are then dropped.
    words = [str(number).encode() for number in numbers]
    inside = np.frombuffer(b"".join((word + b" ").ljust(width, b"\0") for word in words), f"u{width}")
    at_end = np.frombuffer(b"".join((word + b"\n").ljust(width, b"\0") for word in words), f"u{width}")
    text = inside[items]
    text[:, -1] = at_end[items[:, -1]]
    return text.tobytes().translate(None, b"\0")
