"""The selective scan's kernels: interpreted at tiny sizes, lowered for a GPU, and on a GPU in full."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax import ops
from hax_jax.ops.selective_scan import mosaic_gpu, reference, xla
from hax_jax.ops.selective_scan.mosaic_gpu import Tiles
from tests.ops.cases import (
    TOLERANCE,
    assert_close,
    make_segments,
    normal,
    poison_memory,
    relative_error,
    rng,
    with_gradients,
)


def make_inputs(batch: int, length: int, channels: int, states: int, dtype=jnp.float32, softplus=False):
    """Inputs as a trained model makes them: time steps below 1 mostly, rates from about 1 to `states`."""
    g = rng(21, length)
    spread = normal(g, channels, states) * 0.1
    dt = normal(g, batch, length, channels) - 2
    return {
        "x": normal(g, batch, length, channels, dtype=dtype),
        "dt": dt.astype(dtype) if softplus else jax.nn.softplus(dt),
        "A": -jnp.arange(1.0, states + 1) * jnp.exp(spread),
        "B": normal(g, batch, length, states, dtype=dtype),
        "C": normal(g, batch, length, states, dtype=dtype),
    }


def run(function, inputs, segment_ids, *rest):
    """Outputs and all gradients of a form, called by position as the op calls it."""

    def call(inputs):
        arguments = [inputs.get(name) for name in ("x", "dt", "A", "B", "C", "D", "initial_state")]
        return function(*arguments, segment_ids, *rest)

    return with_gradients(call, inputs)


# Together: several tiles, chunks, blocks of channels and groups, the last tile of a chunk and of the row not
# full, both ways to get the decays of the backward pass, with and without what is optional.
INTERPRETED = {
    "plain": (Tiles(lanes=1, backward_lanes=2, backward_groups=1, programs=1), 128, 9, False),
    # Two tiles of the backward pass in one of the forward pass, and resets in more than one row of them.
    "chunks": (Tiles(programs=6, keep_decays=False), 128, 41, True),
}


def test_interpreted_kernels_widen_bfloat16():
    inputs = make_inputs(1, 7, 32, 8, jnp.bfloat16, softplus=True)
    want = run(reference.selective_scan, inputs, None, 64, True)
    tiles = Tiles(steps=8, programs=1, pad=True)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = jax.block_until_ready(run(mosaic_gpu.scan_in_tiles, inputs, None, True, tiles))
    assert_close(got[0], want[0])
    # Gradients are rounded to the inputs' bfloat16 at the end.
    assert_close(got[1], want[1], "bfloat16")


@pytest.mark.parametrize("case", INTERPRETED)
def test_interpreted_kernels_equal_the_reference(case):
    tiles, channels, length, everything = INTERPRETED[case]
    inputs, segment_ids = make_inputs(1, length, channels, 8, softplus=everything), None
    if everything:
        inputs["D"], inputs["initial_state"] = normal(rng(22), channels), normal(rng(24), 1, channels, 8)
        segment_ids = make_segments(rng(23), 1, length)
    want = run(reference.selective_scan, inputs, segment_ids, 64, everything)
    # The interpreter does not know that reads beyond the end give zeros, so whole tiles are made before.
    tiles = dataclasses.replace(tiles, pad=True)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = jax.block_until_ready(run(mosaic_gpu.scan_in_tiles, inputs, segment_ids, everything, tiles))
    assert_close(got, want)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    ("states", "dtype"), [(16, jnp.bfloat16), (8, jnp.float32), (8, jnp.bfloat16), (32, jnp.float32)]
)
def test_kernels_lower_for_a_gpu_without_one(states, dtype, x64):
    """Layouts, shared memory and copies are checked on any machine; lengths and channels as in the task."""
    length, channels = 1057, 128
    inputs = jax.eval_shape(lambda: make_inputs(2, length, channels, states, dtype, softplus=True))
    inputs["D"] = jax.ShapeDtypeStruct((channels,), jnp.float32)
    inputs["initial_state"] = jax.ShapeDtypeStruct((2, channels, states), jnp.float32)
    segment_ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    tiles = dataclasses.replace(mosaic_gpu.tiles_for(states), programs=16)

    def loss(inputs, segment_ids):
        y, state = mosaic_gpu.scan_in_tiles(**inputs, segment_ids=segment_ids, softplus=True, tiles=tiles)
        return y.sum() + state.sum()

    with jax.enable_x64(x64):
        lowered = jax.jit(jax.grad(loss)).trace(inputs, segment_ids).lower(lowering_platforms=("cuda",))
    # What every chunk does, then the pass itself: forward and backward.
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 4


def test_calls_the_kernels_cannot_run_say_why():
    inputs = make_inputs(1, 8, 32, 8)
    with pytest.raises(ValueError, match="number of channels that is a multiple of 32, got 6"):
        ops.selective_scan(
            **{name: x[..., :6] if name in ("x", "dt") else x for name, x in inputs.items() if name != "A"},
            A=inputs["A"][:6],
            implementation="mosaic_gpu",
        )
    narrow = {name: x if name in ("x", "dt") else x[..., :4] for name, x in inputs.items()}
    with pytest.raises(ValueError, match="8, 16 or 32 states, got 4"):
        ops.selective_scan(**narrow, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="`B` must be float32 or bfloat16, got float16"):
        ops.selective_scan(**{**inputs, "B": inputs["B"].astype(jnp.float16)}, implementation="mosaic_gpu")


def test_without_a_gpu_the_named_form_raises():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="'mosaic_gpu' here: needs an NVIDIA Hopper GPU, got platform 'cpu'"):
        ops.selective_scan(**make_inputs(1, 8, 32, 8), implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "everything"),
    [
        (2, 1, 32, True),
        (3, 9, 128, True),
        # All channels in one program: the copies are as wide as the arrays.
        (3, 65, 32, True),
        (40, 65, 64, True),
        (3, 65, 64, True),
        (2, 1057, 128, False),
        # Many chunks of narrow programs, few of wide ones.
        (2, 1057, 128, True),
        (24, 333, 128, True),
        (1, 4099, 256, True),
    ],
)
def test_kernels_equal_the_reference(batch, length, channels, everything, dtype):
    inputs, segment_ids = make_inputs(batch, length, channels, 16, dtype, softplus=everything), None
    if everything:
        inputs["D"], inputs["initial_state"] = normal(rng(22), channels), normal(rng(24), batch, channels, 16)
        segment_ids = make_segments(rng(23), batch, length)
    want = run(reference.selective_scan, inputs, segment_ids, 64, everything)
    poison_memory()
    got = run(mosaic_gpu.selective_scan, inputs, segment_ids, 64, everything)
    assert_close(got, want, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "dtype"), [(64, "float32"), (192, "bfloat16")])
@pytest.mark.parametrize("states", [8, 32])
def test_kernels_take_other_state_sizes(states, channels, dtype):
    inputs = make_inputs(2, 77, channels, states, dtype)
    segment_ids = make_segments(rng(23), 2, 77)
    want = run(reference.selective_scan, inputs, segment_ids, 64, False)
    poison_memory()
    assert_close(run(mosaic_gpu.selective_scan, inputs, segment_ids, 64, False), want, dtype)


@pytest.mark.gpu
def test_extreme_decays_stay_finite_in_the_kernels():
    inputs = make_inputs(2, 300, 64, 16)
    inputs["dt"] = inputs["dt"].at[:, ::5].set(1e6)
    results = run(mosaic_gpu.selective_scan, inputs, None, 64, False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


@pytest.mark.gpu
def test_kernels_give_the_same_bits_twice():
    inputs = make_inputs(8, 1057, 128, 16, jnp.bfloat16)
    segment_ids = make_segments(rng(23), 8, 1057)
    first = run(mosaic_gpu.selective_scan, inputs, segment_ids, 64, False)
    poison_memory()
    second = run(mosaic_gpu.selective_scan, inputs, segment_ids, 64, False)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.gpu
def test_members_of_a_population_equal_single_calls():
    """`vmap` over parameters and inputs, as population training does it."""
    members = [make_inputs(2, 65 + seed, 64, 16) for seed in range(3)]
    members = [{name: x[:, :65] if x.ndim == 3 else x for name, x in member.items()} for member in members]

    def scan(inputs):
        return ops.selective_scan(**inputs, implementation="mosaic_gpu")

    together = with_gradients(jax.vmap(scan), jax.tree.map(lambda *x: jnp.stack(x), *members))
    alone = [jax.jit(scan)(member) for member in members]
    for a, b in zip(
        jax.tree.leaves(together[0]), zip(*map(jax.tree.leaves, alone), strict=True), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.stack(b))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(together[1]))


@pytest.mark.gpu
def test_kernels_equal_the_chunked_form_at_the_tasks_size():
    inputs = make_inputs(64, 1057, 128, 16)
    got = run(mosaic_gpu.selective_scan, inputs, None, 64, False)
    want = run(xla.selective_scan, inputs, None, 64, False)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) <= TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("rows", "length", "width", "chunks"),
    [
        # The batch of the task, padded and packed; more rows, by narrow programs where wide ones would leave
        # half of the device empty; single rows.
        (64, 1057, 64, 2),
        (25, 1280, 64, 5),
        (67, 1280, 32, 1),
        (100, 1280, 64, 1),
        (1, 4096, 32, 64),
        (1, 65_536, 32, 66),
    ],
)
def test_time_is_cut_where_rows_do_not_fill_the_device(rows, length, width, chunks):
    x = jnp.zeros((rows, length, 128), jnp.bfloat16)
    plans = [Tiles().plan(x, 16, length, True, backward=is_backward) for is_backward in (False, True)]
    assert [(plan.width, plan.chunks) for plan in plans] == [(width, chunks)] * 2


def test_tiles_of_the_two_passes_must_fit_each_other():
    with pytest.raises(ValueError, match="`steps` must be a multiple of 16, got 8"):
        Tiles(steps=8, backward_steps=16)
