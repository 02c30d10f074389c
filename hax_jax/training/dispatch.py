"""Several updates in one program, so that the host has to start far fewer of them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hax_jax.config import TrainingConfig
from hax_jax.data.batch import Batch
from hax_jax.data.raw_batches import RawBatches
from hax_jax.training.compilation import compiler_options
from hax_jax.training.flat import FlatStructure
from hax_jax.training.initialise import Beginning
from hax_jax.training.sharding import kernels_over, replicated, split_rows
from hax_jax.training.step import counted, make_rated_step, metrics_of

# Without a setting this is the most: enough that the host costs nothing, few enough that a signal is
# heeded soon. Updates of few positions take about a millisecond, and become one CUDA graph.
_MOST_STEPS = 20
_MOST_SMALL_STEPS = 100
# An update of no more positions on a device takes so little that what lies between two of them counts.
_FEW_POSITIONS = 1 << 17
# Batches of no more positions in all are made side by side.
_SIDE_BY_SIDE = 1 << 23
# The host runs ahead of a device by about this many seconds of steps, and no more dispatches than this.
_AHEAD_SECONDS = 0.05
_AHEAD_DISPATCHES = 16


def make_dispatch(train_step: Callable[..., Any], *, known_length: bool = False) -> Callable[..., Any]:
    """Many updates as one function: dispatch(state, batches, count, *rest) -> state.

    A loop over the leading axis of `batches`, which stands before those that `train_step` takes. `count` is
    its length once more, as an array: the compiler then sees the same loop whatever the length, and an update
    has the same bits in a dispatch of one as in a dispatch of many.

    Args:
      train_step: one update, train_step(state, batches, *rest) -> (state, metrics). The metrics are not
        taken: `metrics_of` finds the last ones in the state.
      known_length: tell the compiler the length of loops of more than one turn. This spares a GPU the
        question, after each update, whether to go on; a dispatch of one may then differ by rounding.
    """

    def dispatch(state, batches, count, *rest):
        length = jax.tree.leaves(batches)[0].shape[0]
        if length == 1:
            # With one row to choose from, the batch would not depend on the turn: work would leave the loop.
            batches = jax.tree.map(lambda x: jnp.concatenate([x, x]), batches)

        # The same number, which the compiler does not know to be that of the turn: knowing it, the host would
        # copy the batch, at another place in each turn, and a CUDA graph would be changed for it.
        offset = count - length

        def body(index, state):
            at = index + offset
            batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, at, keepdims=False), batches)
            # What surrounds an update must not be fused with it, nor rounded together.
            inputs = jax.lax.optimization_barrier((state, batch))
            return jax.lax.optimization_barrier(train_step(*inputs, *rest)[0])

        turns = length if known_length and length > 1 else count
        return jax.lax.fori_loop(0, turns, body, state)

    return dispatch


def make_update(
    beginning: Beginning,
    materialize: Callable[[Any], Batch],
    training: TrainingConfig,
    mesh: Mesh,
    *,
    population: bool,
    one_graph: bool,
) -> Any:
    """The compiled program that a run calls: steps(state, raws, count, peak, kept) -> state.

    Inside it small parameters are one vector (`FlatStructure`); states are taken and given tensor by tensor.
    The batches of all updates are made before the first, so that none waits for its data. They take up to 20
    bytes for each of count * grad_accumulation_steps * b * t positions, and while they are made side by side
    about as much again; many positions are made batch by batch.

    Args:
      beginning: what is known of the run.
      materialize: from a raw batch to a `Batch`.
      training: the settings.
      mesh: the devices, which hold the state whole.
      population: whether state, metrics and `peak` have a leading axis of members. All take the same
        batches, as they do alone: these depend on the data's seed.
      one_graph: whether the updates of a dispatch become one CUDA graph, as `in_one_graph` says. On several
        devices they do not: what passes between them is no part of graphs.

    Returns:
      A jitted function, which takes over the memory of the state.
    """
    shapes = beginning.shapes.params
    if population:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    flat = FlatStructure(beginning.structure, shapes)
    step = make_rated_step(flat, training)
    pack, unpack = flat.pack_state, flat.unpack_state
    if population:
        step = jax.vmap(step, in_axes=(0, None, 0))
        pack, unpack = jax.vmap(pack), jax.vmap(unpack)
    platform = mesh.devices.flat[0].platform
    dispatch = make_dispatch(step, known_length=platform != "cpu")
    prepare = split_rows(mesh, materialize)

    def steps(state, raws, count, peak, kept):
        batches = _make_batches(lambda raw: counted(prepare({**raw, **(kept or {})})), raws, platform)
        # What is made here must not be fused with the updates, or it would be made anew in each.
        packed, batches = jax.lax.optimization_barrier((pack(state), batches))
        return unpack(dispatch(packed, batches, count, peak))

    # Nothing that the loop uses moves in memory: it returns what it was given, and raw batches end before it.
    return jax.jit(
        kernels_over(mesh, steps),
        donate_argnums=0,
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(platform, one_graph=one_graph and mesh.size == 1),
    )


def _make_batches(prepare: Callable[[Any], Batch], raws: Any, platform: str) -> Batch:
    """Batches with the leading axes of `raws`, (count, accumulation)."""
    leading = jax.tree.leaves(raws)[0].shape[:2]
    one = jax.eval_shape(prepare, jax.tree.map(lambda x: x[0, 0], raws))
    if platform != "cpu" and math.prod(leading) * one.tokens.size <= _SIDE_BY_SIDE:
        return jax.vmap(jax.vmap(prepare))(raws)
    return jax.lax.map(lambda several: jax.lax.map(prepare, several), raws)


def in_one_graph(count: int, positions: float) -> bool:
    """Whether a dispatch should be one CUDA graph: where there are a few small updates.

    Args:
      count: updates in it. The loop over one of them has no known length (`make_dispatch`).
      positions: of an update, on each device, those of all members and accumulated batches together.
    """
    return 1 < count <= _MOST_SMALL_STEPS and positions <= _FEW_POSITIONS


def make_read(training: TrainingConfig, mesh: Mesh, *, population: bool) -> Any:
    """A compiled program that finds the metrics in a state: read(state, peak) -> metrics, as `metrics_of`.

    Not part of `make_update`'s: a program's results have new memory each time, which XLA also lends to its
    loop, and the loop's CUDA graph would be made out anew for every dispatch.
    """
    read = functools.partial(metrics_of, training)
    jitted = jax.jit(jax.vmap(read) if population else read, out_shardings=replicated(mesh))
    # Every argument costs the host time: those that it does not look at are left out.
    unused: dict[str, Any] = {"params": {}, "buffers": {}, "opt_state": None, "key": None, "bad_parts": {}}
    return lambda state, peak: jitted(dataclasses.replace(state, **unused), peak)


def steps_per_dispatch(training: TrainingConfig, platform: str, positions: float) -> int:
    """The setting, or where it is 0 a number that fits the run.

    On a GPU or TPU that is the largest one up to 20, or up to 100 where an update is small, that divides
    `num_steps` and everything that happens every so many steps, so that one program serves the whole run. A
    CPU starts a program in microseconds and takes long over a step, so there it is 1.

    Args:
      training: the settings.
      platform: of the devices.
      positions: of an update, on each device.
    """
    if training.steps_per_dispatch:
        return training.steps_per_dispatch
    if platform == "cpu":
        return 1
    common = math.gcd(training.num_steps, *_intervals(training))
    most = _MOST_SMALL_STEPS if positions <= _FEW_POSITIONS else _MOST_STEPS
    return max(size for size in range(1, most + 1) if common % size == 0)


def steps_until_due(step: int, training: TrainingConfig, most: int) -> int:
    """Updates from `step` to the next at which something is due, at most `most`.

    Where dispatches begin depends on the step alone, not on where a run was interrupted: they are counted
    from the last step at which something was due.
    """
    last = max(step - step % every for every in _intervals(training))
    end = min(last + every - last % every for every in _intervals(training))
    return min(last + ((step - last) // most + 1) * most, end, training.num_steps) - step


def dispatches_ahead(seconds_per_step: float | None, per_dispatch: int) -> int:
    """How many dispatches may wait for a GPU or TPU when the host goes on to the next."""
    if not seconds_per_step:
        return 1
    return min(max(math.ceil(_AHEAD_SECONDS / (seconds_per_step * per_dispatch)), 1), _AHEAD_DISPATCHES)


def take_raws(batches: RawBatches, count: int, accumulation: int) -> Any:
    """The raw batches of the next updates, with the leading axes (count, accumulation, batch size)."""
    shape = lambda x: (count, accumulation, -1, *x.shape[2:])  # noqa: E731
    return jax.tree.map(lambda x: x.reshape(shape(x)), batches.take(count))


def _intervals(training: TrainingConfig) -> tuple[int, ...]:
    return training.log_every_steps, training.eval_every_steps, training.checkpoint_every_steps
