"""The raw batches of a dispatch, gathered while the devices work on the one before."""

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hax_jax.training.sharding import put_batch


def take_raws(batches: Iterator[Any], count: int, accumulation: int) -> Any:
    """The raw batches of the next updates, with the leading axes (count, accumulation, batch size)."""
    rows = [next(batches) for _ in range(count)]
    shape = lambda x: (count, accumulation, -1, *x.shape[1:])  # noqa: E731
    return jax.tree.map(lambda *x: np.stack(x).reshape(shape(x[0])), *rows)


class RawBatches:
    """An iterator over raw batches, taken a dispatch at a time.

    A call that starts a CUDA graph comes back when the graph is nearly done. What the host does only then,
    the devices wait for: batches are gathered by a thread of their own, during the call. The state is that of
    what has been taken, whatever has been gathered beyond it.

    Args:
      iterator: a Grain iterator over raw batches without end.
      accumulation: batches of an update.
      mesh: the devices, where there are several that batches are to be sent to.
    """

    def __init__(self, iterator: Any, accumulation: int, mesh: Mesh | None = None):
        self._iterator, self._accumulation, self._mesh = iterator, accumulation, mesh
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "raw_batches")
        self._ahead: tuple[int, concurrent.futures.Future[Any]] | None = None
        self._state = iterator.get_state()

    def take(self, count: int, then: int) -> Any:
        """The raw batches of the next `count` updates, as `take_raws` gives them.

        Args:
          count: at least 1.
          then: updates that will be asked for next, 0 if none; another number then costs gathering anew.
        """
        raws, self._state = self._gathered(count)
        if then:
            self._ahead = then, self._thread.submit(self._gather, then)
        return raws

    def get_state(self) -> Any:
        """Where the iterator was after the last batch that was taken; JSON can hold it."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Goes on from what `get_state` said."""
        self._drop()
        self._iterator.set_state(state)
        self._state = state

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _gathered(self, count: int) -> tuple[Any, Any]:
        if self._ahead is not None:
            if self._ahead[0] == count:
                (_, future), self._ahead = self._ahead, None
                return future.result()
            self.set_state(self._state)
        return self._gather(count)

    def _gather(self, count: int) -> tuple[Any, Any]:
        raws = take_raws(self._iterator, count, self._accumulation)
        if self._mesh is not None and self._mesh.size > 1:
            # One device takes NumPy arrays as they are, ten times faster than through device_put.
            raws = put_batch(self._mesh, raws, axis=2)
        return raws, self._iterator.get_state()

    def _drop(self) -> None:
        if self._ahead is not None:
            (_, future), self._ahead = self._ahead, None
            # It may be at work on the iterator.
            concurrent.futures.wait([future])
