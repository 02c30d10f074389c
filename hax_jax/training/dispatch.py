"""Several updates in one program, so that the host has to start far fewer of them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hax_jax.config import TrainingConfig

# Without a setting this is the most: enough that the host costs nothing, few enough that a signal is
# heeded soon.
_MOST_STEPS = 20


def make_dispatch(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """Many updates as one function: dispatch(state, raws, count, *rest) -> (state, metrics of the last one).

    A loop over the leading axis of `raws`, which stands before those that `train_step` takes. An update has
    the same bits in a dispatch of any length, because the compiler sees the same loop body: barriers keep
    what surrounds an update out of it, and `count`, the length once more as an array, hides from the
    compiler that a loop of one turn could be dissolved.

    Args:
      train_step: one update, train_step(state, raw, *rest) -> (state, metrics).
    """

    def dispatch(state, raws, count, *rest):
        first = jax.tree.map(lambda x: x[0], raws)
        shapes = jax.eval_shape(train_step, state, first, *rest)[1]
        # In the carry, not among the loop's outputs: only the last ones are wanted.
        metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        length = jax.tree.leaves(raws)[0].shape[0]

        def body(index, carry):
            raw = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), raws)
            inputs = jax.lax.optimization_barrier((carry[0], raw))
            return jax.lax.optimization_barrier(train_step(*inputs, *rest))

        # A length known to the compiler spares a GPU the question, after each step, whether to go on.
        return jax.lax.fori_loop(0, length if length > 1 else count, body, (state, metrics))

    return dispatch


def steps_per_dispatch(training: TrainingConfig, platform: str) -> int:
    """The setting, or where it is 0 a number that fits the run.

    On a GPU or TPU that is the largest one up to 20 that divides `num_steps` and everything that happens
    every so many steps, so that one program serves the whole run. A CPU starts a program in microseconds
    and takes long over a step, so there it is 1.
    """
    if training.steps_per_dispatch:
        return training.steps_per_dispatch
    if platform == "cpu":
        return 1
    common = math.gcd(training.num_steps, *_intervals(training))
    return max(size for size in range(1, _MOST_STEPS + 1) if common % size == 0)


def steps_until_due(step: int, training: TrainingConfig, most: int) -> int:
    """Updates from `step` to the next at which something is due, at most `most`.

    Where dispatches begin depends on the step alone, not on where a run was interrupted: they are counted
    from the last step at which something was due.
    """
    last = max(step - step % every for every in _intervals(training))
    end = min(last + every - last % every for every in _intervals(training))
    return min(last + ((step - last) // most + 1) * most, end, training.num_steps) - step


def _intervals(training: TrainingConfig) -> tuple[int, ...]:
    return training.log_every_steps, training.eval_every_steps, training.checkpoint_every_steps
