"""The kernels serve a population: under `jax.vmap` they get one more grid axis, and lower for a GPU."""

import jax
import jax.numpy as jnp

from hax_jax import ops
from hax_jax.ops.causal_conv1d import mosaic_gpu as conv_kernels
from hax_jax.ops.gated_rms_norm import mosaic_gpu as norm_kernels
from hax_jax.ops.ssd import mosaic_gpu as ssd_kernels
from tests.ops import test_causal_conv1d_kernel as conv
from tests.ops import test_sparse_attention_mosaic_gpu as attention
from tests.ops import test_ssd_kernels as ssd

MEMBERS = 3


def assert_lowers(loss, inputs, kernels):
    """Gradients of several members at once; what is not theirs is shared."""
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((MEMBERS, *x.shape), x.dtype), inputs)
    traced = jax.jit(jax.vmap(jax.grad(loss))).trace(stacked)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # As many as for one member: no loop over members, no kernel of its own for each.
    assert text.count("custom_call @mosaic_gpu") == kernels


def test_ssd():
    inputs = jax.eval_shape(lambda: ssd.make_inputs(2, 1057, 8, 16, 1, 32, "bfloat16"))

    def loss(inputs):
        y, state = ssd_kernels.ssd_in_tiles(**inputs, segment_ids=None, tiles=ssd.tiles_of(inputs))
        return jnp.sum(y * y) + state.sum()

    alone = jax.jit(jax.grad(loss)).trace(inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert_lowers(loss, inputs, alone.count("custom_call @mosaic_gpu"))


def test_sparse_attention(monkeypatch):
    key_set = attention.make_key_set(attention.SOURCES["hax"], 200, None)
    inputs = jax.eval_shape(lambda: attention.make_inputs(200, 2, 32, 128, "bfloat16"))
    attention.use("dense", monkeypatch)
    monkeypatch.setattr(ops.dispatch, "missing_for_mosaic_gpu", lambda: None)
    loss = lambda inputs: ops.sparse_attention(*inputs, key_set, implementation="mosaic_gpu").sum()  # noqa: E731
    alone = jax.jit(jax.grad(loss)).trace(inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert_lowers(loss, inputs, alone.count("custom_call @mosaic_gpu"))


def test_convolution_and_gated_norm():
    inputs = jax.eval_shape(lambda: conv.make_inputs(2, 1057, 192, dtype="bfloat16"))
    tiles = conv_kernels.Tiles()

    def loss(inputs):
        x, *rest = conv_kernels.conv_in_tiles(*conv.ordered(inputs), None, None, (128, 32, 32), tiles)
        y = norm_kernels.norm_in_tiles(x, x, inputs["bias"][:128], 1e-5)
        return sum((array.astype(jnp.float32) ** 2).sum() for array in (y, *rest))

    alone = jax.jit(jax.grad(loss)).trace(inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert alone.count("custom_call @mosaic_gpu") == 3
    assert_lowers(loss, inputs, 3)
