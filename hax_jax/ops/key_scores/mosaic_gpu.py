"""The network as one Mosaic GPU kernel, for NVIDIA GPUs of the Hopper generation.

A program scores 64 positions: hidden layers pass from one matrix product to the next in registers, and the
last layer is a sum over each of their rows. k and summary are never laid side by side: k multiplies the first
half of w1's rows, the summary the second.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax.ops import dispatch
from hax_jax.ops.key_scores import xla
from hax_jax.ops.numerics import bfloat16_parts, split

# Positions of a program, the rows of a matrix instruction.
ROWS = 64
# Rows of a tile of shared memory, which copies from arrays of whole tiles fill.
_TILED = 8
# A matrix instruction sums over a multiple of this, and has at most so many columns.
_FEATURES, _COLUMNS = 16, 256
# bfloat16 arrays that stand for a factor of a product: their sum is the factor.
_PARTS = {"bfloat16": 1, "float32": 3}
# What a program may use of a multiprocessor's 227 KiB, less a little for barriers and alignment.
_SHARED_MEMORY = 225 * 1024
# One value for each column of an accumulator.
_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def key_scores(k, summary, w1, b1, w2, b2, w3, b3):
    """`ops.key_scores` on a Hopper GPU."""
    arguments = (k, summary, w1, b1, w2, b2, w3, b3)
    dispatch.check_mosaic_gpu("key_scores", why_not(*arguments))
    return scores_in_tiles(*arguments)


def why_not(k, *others) -> str | None:
    """Why the kernel cannot run this call, or None if it can."""
    dtypes = {array.dtype.name for array in (k, *others)}
    if not dtypes <= _PARTS.keys():
        return f"all arrays must be float32 or bfloat16, got {', '.join(sorted(dtypes))}"
    n, parts = k.shape[-1], _PARTS[k.dtype.name]
    padded = n + -n % _FEATURES
    if 2 * padded > _COLUMNS or _bytes(padded, parts, 1) > _SHARED_MEMORY:
        return f"`k` has too many features for a program's shared memory, got {n} in {k.dtype}"
    return None


def _bytes(n, parts, weights):
    """Shared memory of inputs, and of so many layers' weights at a time."""
    return 2 * parts * (2 * ROWS * n + weights * (2 * n) ** 2)


@jax.custom_vjp
def scores_in_tiles(k, summary, w1, b1, w2, b2, w3, b3):
    """`key_scores` on whatever device there is: a Hopper GPU, or the interpreter."""
    batch, length, _ = k.shape
    dtype, positions = k.dtype, batch * length
    k, summary, w1, b1, w2, b2, w3 = _pad_features(k, summary, w1, b1, w2, b2, w3)
    # At least as many as a program scores, in whole tiles of shared memory.
    rows = ((0, max(ROWS, -(-positions // _TILED) * _TILED) - positions), (0, 0))
    k, summary = (jnp.pad(x.astype(dtype).reshape(positions, -1), rows) for x in (k, summary))
    parts = _PARTS[dtype.name]
    # Together: XLA would round the vector that all parameters lie in, and copy every other matrix out of it.
    weights = jnp.stack([w1, w2]).astype(dtype)
    k, summary, weights = (bfloat16_parts(x, parts) for x in (k, summary, weights))
    b1, b2, w3, b3 = (x.astype(jnp.float32) for x in (b1, b2, w3[:, 0], b3))
    scores = _score(k, summary, weights, b1, b2, w3, b3)
    return scores[:positions].reshape(batch, length)


def _forward(*arguments):
    return scores_in_tiles(*arguments), arguments


def _backward(arguments, d_scores):
    return jax.vjp(xla.key_scores, *arguments)[1](d_scores)


scores_in_tiles.defvjp(_forward, _backward)


def _pad_features(k, summary, w1, b1, w2, b2, w3):
    """The same network of n up to a multiple of 16, which adds zeros alone."""
    n = k.shape[-1]
    more = -n % _FEATURES
    if more == 0:
        return k, summary, w1, b1, w2, b2, w3
    k, summary = (jnp.pad(x, ((0, 0), (0, 0), (0, more))) for x in (k, summary))
    hidden = (0, 2 * more)
    # Each half of w1's rows belongs to one of the inputs.
    w1 = jnp.pad(w1.reshape(2, n, 2 * n), ((0, 0), (0, more), hidden)).reshape(2 * (n + more), -1)
    b1, b2 = (jnp.pad(x, hidden) for x in (b1, b2))
    return k, summary, w1, b1, jnp.pad(w2, (hidden, hidden)), b2, jnp.pad(w3, (hidden, (0, 0)))


def _score(k, summary, weights, b1, b2, w3, b3):
    """k and summary (parts, rows, n), weights (parts, 2, 2n, 2n), b1, b2 and w3 (2n,), b3 (1,) -> (rows,)."""
    parts, rows, n = k.shape
    shape = (ROWS, 2 * n)
    both_fit = _bytes(n, parts, 2) <= _SHARED_MEMORY
    # Products of parts that float32 can tell from zero, small ones first.
    pairs = sorted((p for p in itertools.product(range(parts), repeat=2) if sum(p) < parts), key=sum)[::-1]

    def key_scorer(k_ref, summary_ref, weights_ref, b1_ref, b2_ref, w3_ref, b3_ref, out_ref, *scratch):
        k_sm, summary_sm, w1_sm, *w2_sm, loaded, w2_loaded = scratch
        w2_sm = w2_sm[0] if w2_sm else w1_sm
        # The last tile ends where the rows do: what it shares with the one before it, both write alike.
        here = pl.ds(jnp.minimum(lax.axis_index("tile") * ROWS, rows - ROWS), ROWS)
        for part in range(parts):
            plgpu.copy_gmem_to_smem(k_ref.at[part, here], k_sm.at[part], loaded)
            plgpu.copy_gmem_to_smem(summary_ref.at[part, here], summary_sm.at[part], loaded)
            plgpu.copy_gmem_to_smem(weights_ref.at[part, 0], w1_sm.at[part], loaded)

        def load_w2():
            for part in range(parts):
                plgpu.copy_gmem_to_smem(weights_ref.at[part, 1], w2_sm.at[part], w2_loaded)

        if both_fit:
            load_w2()
        bias1, bias2, last = (_across(ref, shape) for ref in (b1_ref, b2_ref, w3_ref))
        plgpu.barrier_wait(loaded)

        halves = ((k_sm, pl.ds(0, n)), (summary_sm, pl.ds(n, n)))
        factors = [(x_sm.at[a], w1_sm.at[b, rows_of]) for a, b in pairs for x_sm, rows_of in halves]
        hidden = jnp.maximum(_sum_of_products(factors, shape) + bias1, 0.0)
        if not both_fit:
            # Not before all have read w1.
            plgpu.commit_smem()
            load_w2()
        pieces = split(hidden, parts)
        plgpu.barrier_wait(w2_loaded)
        hidden = _sum_of_products([(pieces[a], w2_sm.at[b]) for a, b in pairs], shape)
        x = jnp.maximum(hidden + bias2, 0.0)
        if parts == 1:
            x, last = (factor.astype(jnp.bfloat16).astype(jnp.float32) for factor in (x, last))
        out_ref[here] = (x * last).sum(axis=1) + b3_ref[0]

    return plgpu.kernel(
        key_scorer,
        out_type=jax.ShapeDtypeStruct((rows,), jnp.float32),
        scratch_types=[
            *[_tile((parts, ROWS, n), n)] * 2,
            *[_tile((parts, 2 * n, 2 * n), n)] * (2 if both_fit else 1),
            plgpu.Barrier(num_arrivals=3 * parts),
            plgpu.Barrier(num_arrivals=parts),
        ],
        grid=(-(-rows // ROWS),),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(k, summary, weights, b1, b2, w3, b3)


def _sum_of_products(factors, shape):
    def multiply(acc):
        for a, b in factors:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _tile(shape, n):
    """Shared memory in the tiles that matrix instructions read; both factors of a product need the same."""
    columns = next(count for count in (64, 32, 16) if n % count == 0)
    # mypy takes methods without a body for abstract ones.
    tiling = plgpu.TilingTransform((_TILED, columns))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(2 * columns)  # type: ignore[abstract]
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(tiling, swizzle))


def _across(ref, shape):
    """One value for each column, the same in all rows."""
    return lax.broadcast_in_dim(plgpu.load(ref, layout=_COLUMN, optimized=False), shape, [1])
