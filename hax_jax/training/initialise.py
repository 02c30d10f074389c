"""The model and state that a run begins with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hax_jax.config import Experiment
from hax_jax.training.sharding import replicated
from hax_jax.training.state import ModelStructure, Purpose, TrainState, make_state, split_model


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What is known of a run before it starts.

    Attributes:
      structure: the module without its arrays.
      shapes: the `TrainState` as shapes and dtypes.
      make: makes the state of a seed, by default the experiment's, on the devices, repeated on each.
      compile: compiles what `make` runs and runs nothing, so that a later `make` has only that to do.
    """

    structure: ModelStructure
    shapes: TrainState
    make: Callable[..., TrainState]
    compile: Callable[[], object]


def prepare(
    experiment: Experiment,
    model: nnx.Module | None,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> Beginning:
    """Finds out the structure of a run's state without making it, since a resumed run reads its own.

    Args:
      experiment: the run; its `model` says what to build where `model` is None. Of a population, arrays and
        shapes have a leading axis of members.
      model: a module to train instead. Its arrays are copied, never changed.
      optimizer: whose state is part of the run's.
      mesh: the devices.
    """
    if model is None:
        structure, _, _ = split_model(nnx.eval_shape(lambda: build(experiment)))

        def arrays(seed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            return split_model(build(experiment, seed))[1:]

        given: tuple[Any, ...] = ()
    else:
        structure, *given_arrays = split_model(model)
        given = tuple(jax.tree.map(jnp.copy, given_arrays))

    def make(seed, *given):
        params, buffers = given or arrays(seed)
        return make_state(params, buffers, optimizer, seed)

    # The seed is an argument, so that all members of a population begin by the same program.
    shapes = jax.eval_shape(make, np.int32(0), *given)
    compiled = jax.jit(make, out_shardings=replicated(mesh))
    one = Beginning(
        structure,
        shapes,
        make=lambda seed=experiment.seed: compiled(np.int32(seed), *given),
        # A jitted function finds again, when it is called, what was compiled for such arguments.
        compile=lambda: compiled.lower(np.int32(0), *given).compile(),
    )
    return _stacked(one, [member.seed for member in experiment.members], mesh) if experiment.members else one


def _stacked(beginning: Beginning, seeds: list[int], mesh: jax.sharding.Mesh) -> Beginning:
    """The beginning of a population: arrays and shapes with a leading axis, a member a seed.

    Each member is made by the program that makes it alone.
    """

    def stack(*states):
        return jax.tree.map(lambda *x: jnp.stack(x), *states)

    shapes = jax.eval_shape(stack, *[beginning.shapes] * len(seeds))
    compiled = jax.jit(stack, out_shardings=replicated(mesh))

    def compile_both() -> None:
        beginning.compile()
        sharding = replicated(mesh)
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), beginning.shapes
        )
        compiled.lower(*[one] * len(seeds)).compile()

    return Beginning(
        beginning.structure,
        shapes,
        make=lambda: compiled(*map(beginning.make, seeds)),
        compile=compile_both,
    )


def build(experiment: Experiment, seed: Any = None) -> nnx.Module:
    """The experiment's model with the initial values of its seed, or of another one, () int32."""
    from hax_jax.models import build_model

    key = jax.random.fold_in(jax.random.key(experiment.seed if seed is None else seed), Purpose.INIT)
    return build_model(experiment.model, rngs=nnx.Rngs(key))
