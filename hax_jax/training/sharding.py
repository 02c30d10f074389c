"""Data parallelism: a mesh over all devices, batches split over it, the state repeated on each."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hax_jax.config import ConfigError
from hax_jax.data.batch import Batch
from hax_jax.ops.devices import BATCH_AXIS


def make_mesh(**batch_sizes: int) -> Mesh:
    """A mesh of all devices with the one axis 'data'.

    Args:
      batch_sizes: settings of `TrainingConfig` that have to divide evenly over the devices.

    Raises:
      ConfigError: one does not.
    """
    devices = jax.devices()
    for field, size in batch_sizes.items():
        if size % len(devices):
            nearest = max(round(size / len(devices)), 1) * len(devices)
            raise ConfigError(
                f"training.{field}",
                f"a multiple of the {len(devices)} devices",
                size,
                f"use {nearest}, or show fewer devices to the run (CUDA_VISIBLE_DEVICES)",
            )
    # With the axis type Auto the compiler splits the work; results do not depend on the number of devices
    # beyond rounding, random numbers included.
    return Mesh(np.asarray(devices), (BATCH_AXIS,), axis_types=(AxisType.Auto,))


def kernels_over(mesh: Mesh, function: Callable) -> Callable:
    """`function` whose kernels, when it is compiled, are divided over the devices of the mesh."""
    if mesh.size == 1:
        return function

    @functools.wraps(function)
    def divided(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return divided


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of what is split over the devices along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXIS))


def put_batch(mesh: Mesh, raw: Any, axis: int = 0) -> Any:
    """Sends a raw batch to the devices, split along `axis`.

    Every process passes the same whole batch (raw batches are a few bytes an item) and keeps its own rows.
    """
    sharding = batch_sharding(mesh, axis)
    if jax.process_count() == 1:
        return jax.device_put(raw, sharding)
    put = lambda x: jax.make_array_from_process_local_data(sharding, x, x.shape)  # noqa: E731
    return jax.tree.map(put, raw)


def split_rows(mesh: Mesh, materialize: Callable[[Any], Batch]) -> Callable[[Any], Batch]:
    """`materialize` whose packed rows are split over the devices, as padded rows are by their items."""
    if mesh.size == 1:
        return materialize
    sharding = batch_sharding(mesh)

    def split(raw):
        batch = materialize(raw)
        if batch.packing is None:
            return batch
        constrain = lambda tree: jax.lax.with_sharding_constraint(tree, sharding)  # noqa: E731
        rows = {name: constrain(getattr(batch, name)) for name in ("tokens", "targets", "padding_mask")}
        ids = constrain(batch.packing.segment_ids)
        return dataclasses.replace(batch, packing=dataclasses.replace(batch.packing, segment_ids=ids), **rows)

    return split


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Sends a tree of host arrays whole to every device."""
    sharding = replicated(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    put = lambda x: jax.make_array_from_process_local_data(sharding, x, x.shape)  # noqa: E731
    return jax.tree.map(put, tree)
