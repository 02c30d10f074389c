"""The convolution as Mosaic GPU kernels, for NVIDIA GPUs of the Hopper generation.

One kernel filters and one makes the gradient. XLA makes a fusion of the first for each block of channels that
is used by itself, one after the other, and four passes of the second: it needs the filtered input at several
positions for every one that it writes, and sums over all of them for the filter.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from hax_jax.ops import dispatch, segments
from hax_jax.ops.causal_conv1d import mosaic_gpu_kernels as kernels
from hax_jax.ops.causal_conv1d import xla
from hax_jax.ops.causal_conv1d.mosaic_gpu_kernels import LANES, Tiles


def causal_conv1d(x, weight, bias, segment_ids, mask, sizes):
    """`ops.causal_conv1d` on a Hopper GPU."""
    dispatch.check_mosaic_gpu("causal_conv1d", why_not(x, weight, sizes))
    return conv_in_tiles(x, weight, bias, segment_ids, mask, sizes, Tiles())


def why_not(x, weight, sizes) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    if x.dtype not in (jnp.float32, jnp.bfloat16) or weight.dtype not in (jnp.float32, jnp.bfloat16):
        return f"`x` and `weight` must be float32 or bfloat16, got {x.dtype} and {weight.dtype}"
    # Copies begin at multiples of 16 bytes.
    if any(size % 8 for size in sizes):
        return f"each block's number of channels must be a multiple of 8, got {', '.join(map(str, sizes))}"
    if not 2 <= weight.shape[0] <= 8:
        return f"the filter must have 2 to 8 taps, got {weight.shape[0]}"
    if not kernels.fits(x.dtype, weight.shape[0], _blocks(sizes), Tiles()):
        return f"too many of these blocks share {LANES} channels for shared memory: {sizes}"
    return None


def conv_in_tiles(x, weight, bias, segment_ids, mask, sizes, tiles: Tiles):
    """`causal_conv1d` on whatever device there is: a Hopper GPU, or the interpreter."""
    keep = _keep(x.shape[:2], weight.shape[0], segment_ids, mask)
    bias = jnp.zeros(weight.shape[1], weight.dtype) if bias is None else bias
    return _conv(x, weight, bias, keep, sizes, tiles)


def _keep(shape, taps, segment_ids, mask):
    """(b, t, >= w) float32: whether the position d steps before is seen; None where all are.

    Where d = 0 is not, the position itself is a pad, and its result is zero.
    """
    if segment_ids is None and mask is None:
        return None
    reach = jnp.arange(4 * -(-taps // 4))
    keep = jnp.ones((*shape, len(reach)), bool)
    if segment_ids is not None:
        keep &= segments.positions(segment_ids)[..., None] >= reach
    if mask is not None:
        keep &= jnp.stack([xla.shift(mask, d) for d in range(len(reach))], axis=-1)
    return keep.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _conv(x, weight, bias, keep, sizes, tiles):
    return kernels.outputs(x, _parameters(weight, bias), keep, _blocks(sizes), tiles)


def _forward(x, weight, bias, keep, sizes, tiles):
    return _conv(x, weight, bias, keep, sizes, tiles), (x, weight, bias, keep)


def _backward(sizes, tiles, residuals, dys):
    x, weight, bias, keep = residuals
    taps, channels = weight.shape
    dys = [dy.astype(x.dtype) for dy in dys]
    dx, sums = kernels.gradients(x, dys, _parameters(weight, bias), keep, _blocks(sizes), tiles)
    sums = sums.sum((0, 1))[:, :channels]
    d_keep = None if keep is None else jnp.zeros_like(keep)
    return dx, sums[:taps].astype(weight.dtype), sums[taps].astype(bias.dtype), d_keep


_conv.defvjp(_forward, _backward)


def _parameters(weight, bias):
    """The filter's taps and the bias, (w + 1, lanes); what lanes beyond the channels read is zero."""
    lanes = ((0, 0), (0, -weight.shape[1] % LANES))
    return jnp.pad(jnp.concatenate([weight, bias[None]]).astype(jnp.float32), lanes)


def _blocks(sizes):
    """The first channel and the number of channels of each block."""
    return tuple(zip(itertools.accumulate(sizes[:-1], initial=0), sizes, strict=True))
