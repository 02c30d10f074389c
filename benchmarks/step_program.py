"""The compiled update of a run as the training loop builds and calls it, with each phase timed."""

import copy
import importlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hax_jax.config import ConfigError, Experiment
from hax_jax.data import make_split
from hax_jax.training import initialise
from hax_jax.training.optimizer import make_optimizer
from hax_jax.training.sharding import batch_sharding, make_mesh, put_replicated, replicated, split_rows
from hax_jax.training.updates import Updates

# In a CUDA graph a kernel loses the name of the operation it belongs to.
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
# What `tiny` changes.
TINY = ("model.num_layers=1", "training.batch_size=2", "training.steps_per_dispatch=2")


def load(name: str, changes: Sequence[str], tiny: bool = False) -> Experiment:
    """The experiment of configs/NAME.py, `NAME:argument` as on the training's command line, with changes.

    Args:
      name: of a config file, with an argument after a colon or without.
      changes: FIELD=VALUE each, such as 'training.batch_size=32'.
      tiny: one layer and few rows, for tests.

    Raises:
      ConfigError: an unknown config, field or value.
    """
    file, _, argument = name.partition(":")
    try:
        module = importlib.import_module(f"configs.{file}")
    except ImportError as error:
        raise ConfigError("--configs", "names of files in configs/", name, str(error)) from error
    config = module.get_config(argument or ("cpu" if tiny else ""))
    for change in [*(TINY if tiny else ()), *changes]:
        path, equals, text = change.partition("=")
        *groups, field = path.split(".")
        group = config
        for part in groups:
            group = group.get(part)
        if not equals or group is None or field not in group:
            raise ConfigError("--set", "FIELD=VALUE with a field of a config", change, "see --help of a run")
        kind = type(group[field])
        try:
            group[field] = text == "True" if kind is bool else kind(text)
        except ValueError as error:
            expected = f"{path}= and a value of type {kind.__name__}"
            raise ConfigError("--set", expected, change, str(error)) from error
    return Experiment.from_dict(config)


class StepProgram:
    """One run's update on all devices, without evaluation, checkpoints and logs.

    Args:
      experiment: the run.
      steps: updates in a dispatch, None for as many as the loop would take.
      mesh: of devices that are only described, to compile for them; None for all devices of the process.

    Attributes:
      steps: updates in a dispatch.
      mesh, materialize, beginning: the devices; from raw batches to batches; what the first state is made of.
      state: after the last dispatch, None before `begin`.
      positions: positions of a batch, pads included, of all members together.
      members: runs of a population, 1 without one.
      num_parameters: trained numbers of all members.
      seconds: what each phase took: build, trace (to the compiler's input), compile, state (with what is
        compiled for it, also if that was done before), first_dispatch.
    """

    def __init__(self, experiment: Experiment, steps: int | None = None, mesh: Mesh | None = None):
        begin = time.perf_counter()
        training = experiment.training
        self._described = mesh is not None
        self.mesh = mesh or make_mesh(batch_size=training.batch_size)
        split = make_split(experiment.data, "train", self.mesh.size)
        self.beginning = initialise.prepare(experiment, None, make_optimizer(training), self.mesh)
        self.materialize = split_rows(self.mesh, split.materialize)
        self.members = max(len(experiment.members), 1)
        self._updates = Updates(experiment, split, self.beginning, self.mesh, steps)
        self.positions, self.steps = self._updates.positions, self._updates.per_dispatch
        self._rate: Any = self._updates.peak
        self._count: Any = np.int32(self.steps)
        if self._described:
            everywhere = replicated(self.mesh)
            self._rate = jax.ShapeDtypeStruct(self._rate.shape, self._rate.dtype, sharding=everywhere)
        else:
            self._rate = put_replicated(self.mesh, self._rate)
            self._count = put_replicated(self.mesh, self._count)
        self.num_parameters = sum(x.size for x in jax.tree.leaves(self.beginning.shapes.params))
        self.seconds = {"build": time.perf_counter() - begin}
        self.compiled: Any = None
        self.state: Any = None
        self._next: Any = None

    def compile(self, options: dict[str, str] | None = None) -> None:
        """Compiles the update, with compiler options where they are given."""
        begin = time.perf_counter()
        everywhere = replicated(self.mesh)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), self.beginning.shapes
        )
        update = self._updates.program(self.steps)
        lowered = update.lower(shapes, self._first_raws(), self._count, self._rate, None)
        traced = time.perf_counter()
        self.compiled = lowered.compile(compiler_options=options)
        self.seconds |= {"trace": traced - begin, "compile": time.perf_counter() - traced}

    def compile_state(self) -> None:
        """Compiles what makes the first state; `begin` then only runs it."""
        begin = time.perf_counter()
        self.beginning.compile()
        self.seconds["state"] = time.perf_counter() - begin

    def without_graphs(self) -> "StepProgram":
        """The same update compiled without CUDA graphs, for a state of its own."""
        other = copy.copy(self)
        other.seconds, other.state = dict(self.seconds), None
        other.compile(NO_GRAPHS)
        return other

    def start(self) -> None:
        """Makes the first state and takes the first dispatch."""
        self.begin()
        made = time.perf_counter()
        jax.block_until_ready(self.dispatch())
        self.seconds["first_dispatch"] = time.perf_counter() - made

    def begin(self) -> None:
        """Makes the first state."""
        begin = time.perf_counter()
        self.state = jax.block_until_ready(self.beginning.make())
        self.seconds["state"] = self.seconds.get("state", 0.0) + time.perf_counter() - begin

    def dispatch(self) -> dict[str, jax.Array]:
        """Starts `steps` updates and returns the metrics of the last, without waiting for them."""
        raws, self._next = self.next_raws(), None
        self.state = self.compiled(self.state, raws, self._count, self._rate, None)
        # While the device is busy, as in a run.
        self.next_raws()
        return self._updates.read(self.state, self._rate)

    def _first_raws(self) -> Any:
        """What is compiled for: raw batches, or their shapes where the devices are only described."""
        if not self._described:
            return self.next_raws()
        sharding = batch_sharding(self.mesh, axis=2)
        raws = self._updates.take_raws(self.steps)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), raws)

    def next_raws(self) -> Any:
        """The raw batches of the next dispatch."""
        if self._next is None:
            self._next = self._updates.next_raws(self.steps)
        return self._next
