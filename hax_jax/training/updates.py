"""The updates of one run: their compiled programs, and what these are called with."""

import functools
from typing import Any

import numpy as np
from jax.sharding import Mesh

from hax_jax.config import Experiment
from hax_jax.data.pipeline import Split
from hax_jax.training.dispatch import in_one_graph, make_read, make_update, steps_per_dispatch, take_raws
from hax_jax.training.initialise import Beginning
from hax_jax.training.sharding import put_batch


class Updates:
    """How a run's state is changed; the training loop and the benchmarks call the same programs.

    Args:
      experiment: the run.
      split: its training items.
      beginning: what its first state is made of.
      mesh: the devices, or what devices are described as.
      per_dispatch: updates in a dispatch, None for as many as the settings say.

    Attributes:
      positions: of an update, pads included, those of all members and accumulated batches together.
      per_dispatch: updates in a dispatch, where nothing is due before.
      batches: the endless raw batches, with a place in them that can be saved.
      peak: the learning rate, of a population one for each member, float32.
      read: read(state, peak) -> metrics of the last update, compiled.
    """

    def __init__(
        self,
        experiment: Experiment,
        split: Split,
        beginning: Beginning,
        mesh: Mesh,
        per_dispatch: int | None = None,
    ):
        training, members = experiment.training, experiment.members
        is_population = bool(members)
        self._mesh, self._accumulation = mesh, training.grad_accumulation_steps
        rows, row_length = split.row_shape(training.batch_size)
        self.positions = max(len(members), 1) * self._accumulation * rows * row_length
        self._share = self.positions / mesh.size
        platform = mesh.devices.flat[0].platform
        self.per_dispatch = per_dispatch or steps_per_dispatch(training, platform, self._share)
        self.batches = split.iterator(training.batch_size * self._accumulation, repeat=True)
        rates = [member.training.learning_rate for member in members or [experiment]]
        self.peak = np.asarray(rates if is_population else rates[0], np.float32)
        self.read = make_read(training, mesh, population=is_population)
        make = functools.partial(make_update, beginning, split.materialize, training, mesh)
        self._programs = functools.cache(lambda is_one: make(population=is_population, one_graph=is_one))

    def program(self, count: int) -> Any:
        """The program of a dispatch of `count` updates, as `make_update` says."""
        return self._programs(in_one_graph(count, self._share))

    def take_raws(self, count: int) -> Any:
        """The raw batches of the next `count` updates, on the host."""
        return take_raws(self.batches, count, self._accumulation)

    def next_raws(self, count: int) -> Any:
        """The raw batches of the next `count` updates, as the program takes them."""
        raws = self.take_raws(count)
        # One device takes NumPy arrays as they are, ten times faster than through device_put.
        return put_batch(self._mesh, raws, axis=2) if self._mesh.size > 1 else raws
