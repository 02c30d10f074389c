"""Kernels on several devices: each runs them on its own rows of the batch.

The compiler divides what XLA does by itself, but cannot look into a Pallas kernel: it would gather the
inputs and run all of it on every device. Rows of a batch know nothing of each other, so `jax.shard_map`
around the kernel alone is enough; all around it, random numbers and statistics of the batch included, stays
what it is on one device.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

# The axis of a mesh that batches are divided over.
BATCH_AXIS = "data"


_described: list[jax.Device] = []


@contextlib.contextmanager
def compiling_for(device: jax.Device) -> Iterator[None]:
    """Within it ops choose their forms for one device that is only described, not for the process' own."""
    _described.append(device)
    try:
        yield
    finally:
        _described.pop()


def default_device() -> jax.Device:
    """The device that ops choose their forms for."""
    return _described[-1] if _described else jax.devices()[0]


def may_run_kernels() -> bool:
    """Whether a kernel called here does no work twice: on one device, or with a mesh in force."""
    return (
        bool(_described)
        or jax.device_count() == 1
        or BATCH_AXIS in jax.sharding.get_abstract_mesh().axis_names
    )


def share(array: Any) -> Any:
    """What one device sees of an array whose first axis is the batch: a shape and a dtype."""
    mesh = _mesh_to_divide_over()
    if mesh is None:
        return array
    rows = -(-array.shape[0] // mesh.shape[BATCH_AXIS])
    return jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype)


def divided(function: Callable, batched: tuple[int, ...], otherwise: Callable | None = None) -> Callable:
    """`function` on each device's rows where a mesh with an axis 'data' is in force; else `function`.

    In force is a mesh under `jax.set_mesh`, or in a function that is being traced under
    `jax.sharding.use_abstract_mesh`; not inside a `shard_map` over that axis, where rows are divided already.
    Arguments without a batch are repeated, and their gradients summed over the devices by one `psum`.

    Args:
      function: takes positional arguments, returns arrays whose first axis is the batch.
      batched: which arguments are trees of arrays with the batch as first axis. One of size 1 is repeated.
      otherwise: what runs where the batch does not divide evenly; None to refuse that.

    Raises:
      ValueError: when called, the batch does not divide evenly.
    """
    mesh = _mesh_to_divide_over()
    if mesh is None or not batched:
        return function

    def call(*arguments):
        leaves, structure = jax.tree.flatten(arguments)
        owners = [index for index, argument in enumerate(arguments) for _ in jax.tree.leaves(argument)]
        arrays = {place: leaf for place, leaf in enumerate(leaves) if hasattr(leaf, "ndim")}
        rows = next(leaf.shape[0] for place, leaf in arrays.items() if owners[place] == batched[0])
        if rows % mesh.shape[BATCH_AXIS]:
            if otherwise is not None:
                return otherwise(*arguments)
            raise ValueError(
                f"a batch that kernels work on must divide evenly over {mesh.shape[BATCH_AXIS]} devices, got "
                f"{rows} rows; change the batch size or use implementation 'xla'"
            )
        specs = tuple(
            PartitionSpec(BATCH_AXIS)
            if owners[place] in batched and leaf.shape[0] == rows
            else PartitionSpec()
            for place, leaf in arrays.items()
        )

        def on_one_device(*own):
            local = list(leaves)
            for place, array in zip(arrays, own, strict=True):
                local[place] = array
            return function(*jax.tree.unflatten(structure, local))

        # Kernels do not say over which axes their outputs vary.
        mapped = jax.shard_map(
            on_one_device, in_specs=specs, out_specs=PartitionSpec(BATCH_AXIS), check_vma=False
        )
        return mapped(*arrays.values())

    return call


def divides_batches() -> bool:
    """Whether `divided` would divide a function called here."""
    return _mesh_to_divide_over() is not None


def count() -> int:
    """Over how many devices batches are divided here."""
    mesh = _mesh_to_divide_over()
    return 1 if mesh is None else mesh.shape[BATCH_AXIS]


def _mesh_to_divide_over() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh if types.get(BATCH_AXIS) == AxisType.Auto else None
