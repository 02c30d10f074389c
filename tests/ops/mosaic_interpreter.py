"""Runs Mosaic GPU kernels on a CPU, in Pallas' interpreter.

The interpreter checks values, indices and barriers, and starts all memory as NaN. It knows nothing of
layouts, asynchrony or the hardware's limits: lowering and the tests on a GPU are for those.

JAX 0.11's interpreter takes the left operand of a matrix product from shared memory only; the kernels also
have it in registers, so that is added here.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory

SETTINGS = params.InterpretGPUParams()


def install() -> None:
    """Teaches the interpreter products whose left operand is in registers; doing it twice does nothing."""
    if not hasattr(gpu_callbacks.wgmma, "from_registers"):
        gpu_callbacks.wgmma = _with_registers(gpu_callbacks.wgmma)


def _with_registers(original):
    @functools.wraps(original)
    def wgmma(*, a_allocation_key_as_array, **rest):
        a = np.asarray(a_allocation_key_as_array)
        # The name of a buffer is a vector of integers, an operand a matrix of floats.
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return original(a_allocation_key_as_array=a_allocation_key_as_array, **rest)
        return _multiply(a, **rest)

    wgmma.from_registers = True
    return wgmma


@gpu_callbacks.fail_on_exception
def _multiply(
    a, *, token, mesh_location, thread, acc_allocation_key_as_array, acc_transforms, a_transforms,
    b_allocation_key_as_array, b_transforms, source_info=None,
):  # fmt: skip
    del a_transforms
    shared = gpu_callbacks._get_shared_memory()
    logging_info = memory.GPULoggingInfo(mesh_location, thread, source_info)

    def locate(key, transforms):
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        steps = gpu_callbacks._remove_noop_transforms(transforms)
        return key, shared.access(key, gpu_callbacks.jax.tree.map(int, steps))

    def read(place):
        return shared.get_buffer_content(*place, thread, logging_info=logging_info)[0]

    target = locate(acc_allocation_key_as_array, acc_transforms)
    total = read(target)
    product = np.matmul(a, read(locate(b_allocation_key_as_array, b_transforms)), dtype=total.dtype)
    shared.store_buffer_content(*target, total + product, thread, logging_info=logging_info)
    return token
