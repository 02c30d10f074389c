"""Everything a step changes, as one pytree of plain dicts, and the way from a module to it and back."""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

# Metrics that are summed on the device from one log step to the next.
SUMMED = ("loss", "gate_loss", "accuracy", "grad_norm", "tokens", "steps")
# What is kept of an update that was refused.
BAD_PARTS = ("loss", "gate_loss", "grad_norm")


class Purpose(enum.IntEnum):
    """What a random number is for; folded into the run's key so that no two purposes share numbers."""

    INIT = 0
    TRAIN = 1
    VALID = 2
    TEST = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole state of a run on the device; together with the data iterator's state it is the run.

    The arrays lie in dicts by dotted name, not in an `nnx.State`: flattening those is C++, so that a step
    costs the host microseconds. Memory: four copies of the parameters while a step runs.

    Attributes:
      step: () int32, batches taken: updates made, and updates refused.
      params: trainable arrays by name.
      buffers: the module's other variables by name (fixed hash projections, running statistics).
      opt_state: the optimiser's state.
      key: the run's PRNG key; never changes, everything random is folded from it, a purpose and the step.
      sums: () float32 each, the metrics of `SUMMED` added up since the last log step.
      refused: () int32, updates refused because a loss or gradient was not finite. Above
        `max_refused_updates` nothing changes any more.
      bad_step: () int32, -1, or the step last refused.
      bad_parts: () float32 each, what that step had computed for `BAD_PARTS`.
    """

    # As every pytree it also holds shapes, dtypes or shardings in place of the arrays.
    step: Any
    params: dict[str, Any]
    buffers: dict[str, Any]
    opt_state: Any
    key: Any
    sums: dict[str, Any]
    refused: Any
    bad_step: Any
    bad_parts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelStructure:
    """A module without its arrays: with them it becomes the module again.

    Attributes:
      graphdef: the static part of `nnx.split`.
      params: names of the trainable arrays, in order, and their tree structure.
      buffers: the same of all other variables.
    """

    graphdef: Any
    params: tuple[tuple[str, ...], Any]
    buffers: tuple[tuple[str, ...], Any]

    def merge(self, params: dict[str, Any], buffers: dict[str, Any]) -> nnx.Module:
        """The module with these arrays."""
        trees = [
            jax.tree.unflatten(treedef, [arrays[name] for name in names])
            for arrays, (names, treedef) in ((params, self.params), (buffers, self.buffers))
        ]
        return nnx.merge(self.graphdef, *trees)


def split_model(model: nnx.Module) -> tuple[ModelStructure, dict[str, Any], dict[str, Any]]:
    """Takes a module apart once: structure, trainable arrays by name, other arrays by name.

    `nnx.Param` variables are trained, every other variable is state. The arrays are the module's own, not
    copies.
    """
    graphdef, *(params, buffers) = nnx.split(model, nnx.Param, ...)
    (param_names, param_tree, param_arrays) = _by_name(params)
    (buffer_names, buffer_tree, buffer_arrays) = _by_name(buffers)
    structure = ModelStructure(graphdef, (param_names, param_tree), (buffer_names, buffer_tree))
    return structure, param_arrays, buffer_arrays


def buffers_of(model: nnx.Module) -> dict[str, Any]:
    """The arrays by name of every variable that is not trained, as they are now."""
    _, *(_, buffers) = nnx.split(model, nnx.Param, ...)
    return _by_name(buffers)[2]


def make_state(
    params: dict[str, Any], buffers: dict[str, Any], optimizer: optax.GradientTransformation, seed: Any
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        buffers=buffers,
        opt_state=optimizer.init(params),
        key=jax.random.key(seed),
        sums={name: jnp.zeros((), jnp.float32) for name in SUMMED},
        refused=jnp.zeros((), jnp.int32),
        bad_step=jnp.full((), -1, jnp.int32),
        bad_parts={name: jnp.zeros((), jnp.float32) for name in BAD_PARTS},
    )


def _by_name(state: Any) -> tuple[tuple[str, ...], Any, dict[str, Any]]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = tuple(_name(path) for path, _ in leaves)
    return names, treedef, dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def _name(path: tuple[Any, ...]) -> str:
    """The attribute path of a variable, joined by dots."""
    # The last entry is the variable's own value, which has no name in the module.
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
