"""What the device can do at best, measured in the run whose times are held against it."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing


def measure(tiny: bool = False) -> dict[str, Any]:
    """Bytes a second of a large copy, read and written counted, and bfloat16 operations a second of a matmul.

    Both on random numbers, both larger than any cache, and both as this machine's JAX does them.
    """
    # A CPU would be at it for minutes.
    is_small = tiny or jax.devices()[0].platform == "cpu"
    size, width = (2**22, 256) if is_small else (2**30, 8192)
    plan = timing.Plan(samples=5)
    keys = jax.random.split(jax.random.key(0), 4)
    # Two arrays of bfloat16, 2 GiB each.
    arrays = [(jax.random.normal(key, (size,), jnp.bfloat16),) for key in keys[:2]]
    copied = timing.measure(jax.jit(jnp.copy), arrays, plan)
    moved = 2 * arrays[0][0].nbytes
    del arrays
    factors = [
        tuple(jax.random.normal(k, (width, width), jnp.bfloat16) for k in jax.random.split(key))
        for key in keys[2:]
    ]
    product = timing.measure(jax.jit(jnp.matmul), factors, plan)
    return {
        "copy_bytes_per_s": moved / copied["seconds"],
        "matmul_flops_per_s": 2 * width**3 / product["seconds"],
        "copy": {"bytes": moved, **copied},
        "matmul": {"shape": [width, width, width], **product},
    }
