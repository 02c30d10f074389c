"""Raw batches gathered ahead: the same ones, and a state that does not know of what nobody has taken."""

import numpy as np
import pytest

from hax_jax.data import make_split
from hax_jax.training.raw_batches import RawBatches, take_raws
from tests.training.tiny import DATA


def iterator():
    return make_split(DATA, "train").iterator(6, repeat=True)


def numbers(raws):
    return raws["index"].ravel().tolist()


@pytest.fixture
def batches():
    made = RawBatches(iterator(), accumulation=2)
    yield made
    made.close()


def test_dispatches_follow_one_another_with_the_axes_of_an_update(batches):
    raws = batches.take(2, then=3)
    assert raws["index"].shape == (2, 2, 3)
    taken = numbers(raws) + numbers(batches.take(3, then=0)) + numbers(batches.take(1, then=0))
    np.testing.assert_array_equal(taken, numbers(take_raws(iterator(), 6, 2)))


@pytest.mark.parametrize("asked", [1, 3])
def test_another_number_than_was_said_loses_no_batch(batches, asked):
    taken = numbers(batches.take(2, then=2)) + numbers(batches.take(asked, then=0))
    np.testing.assert_array_equal(taken, numbers(take_raws(iterator(), 2 + asked, 2)))


def test_state_is_that_of_what_was_taken(batches):
    batches.take(2, then=4)
    state = batches.get_state()
    following = numbers(batches.take(4, then=4))

    resumed = RawBatches(iterator(), accumulation=2)
    resumed.take(1, then=5)
    resumed.set_state(state)
    assert numbers(resumed.take(4, then=0)) == following
    resumed.close()


def test_what_fails_in_the_thread_fails_where_it_is_taken():
    class Breaking:
        """Has one batch; then its disk is gone."""

        def __init__(self):
            self._whole = iterator()
            self.get_state = self._whole.get_state

        def __iter__(self):
            return self

        def __next__(self):
            if self.get_state() != iterator().get_state():
                raise OSError("the disk is gone")
            return next(self._whole)

    batches = RawBatches(Breaking(), accumulation=1)
    batches.take(1, then=1)
    with pytest.raises(OSError, match="the disk is gone"):
        batches.take(1, then=0)
    batches.close()
