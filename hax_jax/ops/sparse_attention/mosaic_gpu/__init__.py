"""Sparse attention as Mosaic GPU kernels, for NVIDIA GPUs of the Hopper generation.

bfloat16 inputs multiply as they are. A float32 input is split into three bfloat16 parts, which hold its 24
bits, and a product is the sum of the six products of parts that matter: float32's accuracy from the matrix
units, whose own float32 mode (TF32) keeps 11 bits.
"""

import jax.numpy as jnp

from hax_jax.ops import dispatch
from hax_jax.ops.sparse_attention import chunks
from hax_jax.ops.sparse_attention.mosaic_gpu import building_blocks, dense
from hax_jax.ops.sparse_attention.mosaic_gpu.chunk_kernels import TILE, block_of
from hax_jax.ops.sparse_attention.plan import CHUNK

# The scores of a chunk are kept in registers, which this many keys fill.
MAX_KEYS = 256
# Below, dense tiles: they cost t a query, chunks a constant and many small launches. In a training step on an
# H200, forward and backward cost 3.5 ns a position in dense tiles, with rows of 1,057, and 19 ns in chunks:
# equal near 5,700, if the first grows as t.
MIN_LENGTH_OF_CHUNKS = 4096


def sparse_attention(q, k, v, key_set, segment_ids, scale, uniform_empty_rows, dtype):
    """The contract of the op, on a Hopper GPU."""
    interpreted = building_blocks.interpret is not None
    dispatch.check_mosaic_gpu("sparse_attention", why_not(q, k, v), interpreted=interpreted)
    arguments = (q, k, v, key_set, segment_ids, scale, uniform_empty_rows)
    if q.shape[1] >= MIN_LENGTH_OF_CHUNKS and _fits_chunks(q, v, key_set):
        return chunks.sparse_attention(*arguments, tile=TILE).astype(dtype)
    return dense.sparse_attention(*arguments, dtype)


def why_not(q, k, v) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or dtypes.pop() not in (jnp.bfloat16, jnp.float32):
        return f"`q`, `k` and `v` must be all bfloat16 or all float32, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] > building_blocks.FEATURES[-1]:
        return f"`q` and `k` must have at most {building_blocks.FEATURES[-1]} features, got {q.shape[-1]}"
    return None


def _fits_chunks(q, v, key_set) -> bool:
    if not chunks.can_plan(key_set):
        return False
    keys = CHUNK + max(source.size for source in key_set.sources)
    keys += -keys % building_blocks.KEYS
    num_parts = 1 if q.dtype == jnp.bfloat16 else 3
    features = building_blocks.padded_features(q.shape[-1])
    width = building_blocks.padded_values(v.shape[-1])
    return keys <= MAX_KEYS and block_of(num_parts, keys, features, width) is not None
