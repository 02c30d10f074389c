"""The kernel of the convolution's gradient: interpreted, lowered for a GPU, and on a GPU in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax import ops
from hax_jax.ops.causal_conv1d import mosaic_gpu, reference, xla
from hax_jax.ops.causal_conv1d.mosaic_gpu import Tiles
from tests.ops import mosaic_interpreter
from tests.ops.cases import assert_close, make_segments, normal, poison_memory, rng, with_gradients


def make_inputs(batch, length, channels, taps=4, dtype=jnp.float32):
    g = rng(41, length)
    return {
        "x": normal(g, batch, length, channels, dtype=dtype),
        "weight": normal(g, taps, channels),
        "bias": normal(g, channels),
    }


def run(function, inputs, *rest):
    return with_gradients(lambda inputs: function(*ordered(inputs), *rest), inputs)


def ordered(inputs):
    return tuple(inputs[name] for name in ("x", "weight", "bias"))


@pytest.mark.parametrize("segmented", [False, True])
def test_interpreted_kernel_equals_the_reference(segmented):
    """Several programs, the last not full, in two blocks of channels of which the second is not full."""
    inputs = make_inputs(1, 17, 136)
    segment_ids = make_segments(rng(4, 17), 1, 17) if segmented else None
    want = run(reference.causal_conv1d, inputs, segment_ids)
    mosaic_interpreter.install()
    with plgpu.force_gpu_interpret_mode(mosaic_interpreter.SETTINGS):
        tiles = Tiles(steps=6, unroll=2, pad=True)
        got = jax.block_until_ready(run(mosaic_gpu.conv_in_tiles, inputs, segment_ids, tiles))
    assert_close(got, want)


@pytest.mark.parametrize(("taps", "segmented", "dtype"), [(4, True, "float32"), (2, False, "bfloat16")])
def test_kernel_lowers_for_a_gpu_without_one(taps, segmented, dtype):
    inputs = jax.eval_shape(lambda: make_inputs(2, 1057, 192, taps, dtype))
    segment_ids = jax.ShapeDtypeStruct((2, 1057), jnp.int32) if segmented else None

    def loss(inputs, segment_ids):
        return mosaic_gpu.conv_in_tiles(*ordered(inputs), segment_ids, Tiles()).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss)).trace(inputs, segment_ids).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"channels": 12}, "channels must be a multiple of 8, got 12"),
        ({"channels": 8, "taps": 1}, "2 to 8 taps, got 1"),
        ({"channels": 8, "dtype": jnp.float16}, "must be float32 or bfloat16, got float16"),
    ],
)
def test_calls_the_kernel_cannot_run_say_why(inputs, message):
    with pytest.raises(ValueError, match=f"causal_conv1d cannot be 'mosaic_gpu' here: .*{message}"):
        ops.causal_conv1d(**make_inputs(1, 5, **inputs), implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("length", "channels"), [(1, 8), (3, 192), (36, 128), (1057, 192)])
def test_kernel_equals_the_chain_rule(length, channels, segmented, dtype):
    inputs = make_inputs(3, length, channels, dtype=dtype)
    segment_ids = make_segments(rng(4, length), 3, length) if segmented else None
    want = run(xla.causal_conv1d, inputs, segment_ids)
    poison_memory()
    got = run(mosaic_gpu.causal_conv1d, inputs, segment_ids)
    assert_close(got, want, dtype)
    again = run(mosaic_gpu.causal_conv1d, inputs, segment_ids)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
