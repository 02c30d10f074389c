"""The convolution's kernels: interpreted, lowered for a GPU, and on a GPU in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax import ops
from hax_jax.ops import lanes_mosaic_gpu
from hax_jax.ops.causal_conv1d import mosaic_gpu, mosaic_gpu_kernels, reference, xla
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


def make_mask(batch, length):
    return jnp.asarray(rng(6, length).random((batch, length)) < 0.8)


@pytest.mark.parametrize(
    ("segmented", "masked", "sizes", "taps"),
    [
        (False, False, (136,), 4),
        (True, False, (136,), 4),
        (True, True, (128, 8), 2),
        (False, True, (120, 8, 8), 8),
        # The second and third block share a group of lanes, the fourth has lanes in two.
        (True, True, (128, 32, 24, 120), 4),
    ],
)
def test_interpreted_kernels_equal_the_reference(segmented, masked, sizes, taps, monkeypatch):
    """Several programs, the last not full, in groups of channels of which the last is not full."""
    inputs = make_inputs(2, 17, sum(sizes), taps)
    segment_ids = make_segments(rng(4, 17), 2, 17) if segmented else None
    mask = make_mask(2, 17) if masked else None
    want = run(reference.causal_conv1d, inputs, segment_ids, mask, sizes)
    mosaic_interpreter.install()
    monkeypatch.setattr(lanes_mosaic_gpu, "interpret", mosaic_interpreter.SETTINGS)
    with plgpu.force_gpu_interpret_mode(mosaic_interpreter.SETTINGS):
        tiles = Tiles(steps=6, unroll=2, pad=True)
        got = jax.block_until_ready(run(mosaic_gpu.conv_in_tiles, inputs, segment_ids, mask, sizes, tiles))
    assert_close(got, want)


@pytest.mark.parametrize("segmented", [False, True])
def test_xla_equals_the_reference_with_pads_and_blocks(segmented):
    inputs, mask = make_inputs(2, 17, 9), make_mask(2, 17)
    segment_ids = make_segments(rng(4, 17), 2, 17) if segmented else None
    rest = segment_ids, mask, (5, 1, 3)
    want = run(reference.causal_conv1d, inputs, *rest)
    assert [y.shape[2] for y in want[0]] == [5, 1, 3]
    assert not any(y[~mask].any() for y in want[0])
    assert_close(run(xla.causal_conv1d, inputs, *rest), want)


@pytest.mark.parametrize(
    ("blocks", "tiles"),
    [
        (((0, 192),), [[(0, range(2))]]),
        # Mamba-2: B and C begin in a group of their own, and need a tile each there.
        (((0, 128), (128, 32), (160, 32)), [[(0, range(1)), (1, range(1, 2))], [(2, range(2))]]),
        (((0, 64), (64, 32), (96, 32)), [[(0, range(1))], [(1, range(1))], [(2, range(1))]]),
        (((0, 256), (256, 8), (264, 200)), [[(0, range(2)), (1, range(2, 4))], [(2, range(4))]]),
    ],
)
def test_blocks_share_a_tile_where_no_group_of_lanes_has_both(blocks, tiles):
    assert mosaic_gpu_kernels._shared_tiles(blocks) == tiles


@pytest.mark.parametrize(
    ("taps", "segmented", "masked", "sizes", "dtype"),
    [(4, True, True, (128, 32, 32), "bfloat16"), (2, False, False, (192,), "float32")],
)
def test_kernels_lower_for_a_gpu_without_one(taps, segmented, masked, sizes, dtype):
    inputs = jax.eval_shape(lambda: make_inputs(2, 1057, 192, taps, dtype))
    segment_ids = jax.ShapeDtypeStruct((2, 1057), jnp.int32) if segmented else None
    mask = jax.ShapeDtypeStruct((2, 1057), bool) if masked else None

    def loss(inputs, segment_ids, mask):
        ys = mosaic_gpu.conv_in_tiles(*ordered(inputs), segment_ids, mask, sizes, Tiles())
        return sum((y.astype(jnp.float32) ** 2).sum() for y in ys)

    lowered = jax.jit(jax.grad(loss)).trace(inputs, segment_ids, mask).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"channels": 12}, "each block's number of channels must be a multiple of 8, got 12"),
        ({"channels": 16, "sizes": (4, 12)}, "must be a multiple of 8, got 4, 12"),
        ({"channels": 80, "sizes": (8,) * 10}, "too many of these blocks share 128 channels"),
        ({"channels": 8, "taps": 1}, "2 to 8 taps, got 1"),
        ({"channels": 8, "dtype": jnp.float16}, "must be float32 or bfloat16, got float16"),
    ],
)
def test_calls_the_kernel_cannot_run_say_why(inputs, message):
    sizes = inputs.get("sizes")
    inputs = make_inputs(1, 5, **{name: value for name, value in inputs.items() if name != "sizes"})
    with pytest.raises(ValueError, match=f"causal_conv1d cannot be 'mosaic_gpu' here: .*{message}"):
        ops.causal_conv1d(**inputs, sizes=sizes, implementation="mosaic_gpu")


@pytest.mark.parametrize("sizes", [(4, 5), (8, 0), ()])
def test_blocks_have_to_be_all_channels(sizes):
    with pytest.raises(ValueError, match="`sizes` of causal_conv1d must be positive and add up to 8"):
        ops.causal_conv1d(**make_inputs(1, 5, 8), sizes=sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("segmented", "masked"), [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize(
    ("length", "sizes", "taps"),
    [
        (1, (8,), 4),
        (3, (192,), 2),
        (36, (128,), 4),
        (1057, (128, 32, 32), 4),
        (70, (256, 8, 200), 8),
    ],
)
def test_kernels_equal_xla(length, sizes, taps, segmented, masked, dtype):
    inputs = make_inputs(3, length, sum(sizes), taps, dtype)
    segment_ids = make_segments(rng(4, length), 3, length) if segmented else None
    mask = make_mask(3, length) if masked else None
    want = run(xla.causal_conv1d, inputs, segment_ids, mask, sizes)
    poison_memory()
    got = run(mosaic_gpu.causal_conv1d, inputs, segment_ids, mask, sizes)
    assert_close(got, want, dtype)
    again = run(mosaic_gpu.causal_conv1d, inputs, segment_ids, mask, sizes)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
