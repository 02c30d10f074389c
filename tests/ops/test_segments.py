"""Running sums that begin anew in every segment."""

import jax.numpy as jnp
import numpy as np
import pytest

from hax_jax.ops import segments
from tests.ops.cases import rng


def one_by_one(x, ids):
    y = np.array(x, np.float64)
    for time in range(1, y.shape[1]):
        goes_on = ids[:, time] == ids[:, time - 1]
        y[:, time] += np.where(goes_on[:, None], y[:, time - 1], 0)
    return y


# Less than a block, whole blocks, and so many blocks that their sums are summed in blocks too.
@pytest.mark.parametrize("length", [1, 17, 128, 1057, 64 * 66])
@pytest.mark.parametrize("share", [0.1, 0.003], ids=["short", "long"])
def test_sums_begin_anew_in_every_segment(length, share):
    generator = rng(0, length)
    number = np.cumsum(generator.random((2, length)) < share, axis=1)
    # No id is used twice, and they do not ascend.
    ids = jnp.asarray((number * 7) % 1009 - 5, jnp.int32)
    # Small integers, so that no sum is rounded.
    x = generator.integers(-8, 9, (2, length, 3)).astype(np.float32)
    np.testing.assert_array_equal(segments.running_sum(jnp.asarray(x), ids), one_by_one(x, np.asarray(ids)))


def test_a_boundary_leaves_no_rounding_behind():
    x = jnp.full((1, 200, 1), 1e-3).at[:, :100].set(1e8)
    ids = (jnp.arange(200) >= 100).astype(jnp.int32)[None]
    alone = segments.running_sum(x[:, 100:], ids[:, 100:])
    np.testing.assert_allclose(segments.running_sum(x, ids)[:, 100:], alone, rtol=1e-6)


def test_narrow_numbers_are_summed_in_float32():
    ids = jnp.zeros((1, 300), jnp.int32)
    ones = jnp.ones((1, 300, 1), jnp.bfloat16)
    for segment_ids in (ids, None):
        total = segments.running_sum(ones, segment_ids)
        assert total.dtype == jnp.float32
        assert total[0, -1, 0] == 300


def test_pads_are_short_segments_that_no_other_position_shares():
    is_real = jnp.asarray([[True] * 70 + [False] * 130, [False] * 200])
    ids = jnp.zeros((2, 200), jnp.int32).at[:, 30:].set(-1)
    apart = segments.apart(is_real, ids)
    np.testing.assert_array_equal(apart[0, :70], ids[0, :70])
    for row, real in ((0, 70), (1, 0)):
        found, counts = np.unique(np.asarray(apart[row, real:]), return_counts=True)
        assert counts.max() == segments.EMPTY == 64 and not set(found) & {0, -1}
    # As segments they are numbered and bounded like any other.
    assert int(segments.numbers(apart)[1, -1] - segments.numbers(apart)[1, 0]) == 3
    np.testing.assert_array_equal(segments.ends(apart)[1, [0, 63, 64, 199]], [64, 64, 128, 200])
