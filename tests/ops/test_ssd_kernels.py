"""The SSD kernels: interpreted at tiny sizes, lowered for a GPU, and on a GPU in full."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax import ops
from hax_jax.ops.ssd import mosaic_gpu, reference, xla
from tests.ops import mosaic_interpreter
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


def make_inputs(batch, length, heads, head_dim, groups, state, dtype=jnp.float32):
    """Inputs as a trained model makes them: with long time steps every chunked form loses digits of float32.

    The sum of dt A over a chunk is then so large that its rounding is that of the weights: at 0.4 on average,
    rates of up to 5 and 500 positions the gradient of A is off by 3.5e-6 in XLA's form too.
    """
    g = rng(31, length)
    return {
        "x": normal(g, batch, length, heads, head_dim, dtype=dtype),
        "dt": jax.nn.softplus(normal(g, batch, length, heads) - 2),
        "A": -jnp.exp(normal(g, heads)),
        "B": normal(g, batch, length, groups, state, dtype=dtype),
        "C": normal(g, batch, length, groups, state, dtype=dtype),
        "D": normal(g, heads),
        "initial_state": normal(g, batch, heads, head_dim, state),
    }


def run(function, inputs, segment_ids, *rest):
    """Outputs and all gradients of a form, called by position as the op calls it."""

    def call(inputs):
        arguments = [inputs[name] for name in ("x", "dt", "A", "B", "C", "D", "initial_state")]
        return function(*arguments, segment_ids, *rest, dt_bias=inputs.get("dt_bias"))

    return with_gradients(call, inputs)


def assert_equal_forms(got, want, dtype, factor=1):
    (outputs, gradients), (wanted, wanted_gradients) = got, want
    assert_close(outputs, wanted, dtype)
    for name, gradient in gradients.items():
        error = relative_error(gradient, wanted_gradients[name])
        # Those of A and of the bias are sums over all positions of differences that nearly cancel: the form
        # of XLA is off by 8e-6 in the latter.
        allowed = factor * {"A": 2, "dt_bias": 3}.get(name, 1) * TOLERANCE[dtype]
        assert error <= allowed, f"{name}: {error:.2e}"


def tiles_of(inputs):
    assert mosaic_gpu.why_not(*(inputs[name] for name in ("x", "A", "B", "C"))) is None
    return mosaic_gpu.choose_tiles(inputs["x"], inputs["B"])


# Two chunks, the last not full, a state that enters; float32 with segments, so that both roundings are run.
@pytest.mark.parametrize(("dtype", "segmented"), [("bfloat16", False), ("float32", True)])
def test_interpreted_kernels_equal_the_reference(dtype, segmented):
    inputs = make_inputs(1, 70, 4, 16, 1, 16, dtype)
    segment_ids = make_segments(rng(4, 70), 1, 70) if segmented else None
    if segmented:
        # Time steps as a projection gives them.
        inputs |= {"dt": normal(rng(6), 1, 70, 4), "dt_bias": normal(rng(7), 4) - 2}
    want = run(reference.ssd, inputs, segment_ids, 64)
    mosaic_interpreter.install()
    with plgpu.force_gpu_interpret_mode(mosaic_interpreter.SETTINGS):
        tiles = dataclasses.replace(tiles_of(inputs), length=128)
        got = jax.block_until_ready(run(mosaic_gpu.ssd_in_tiles, inputs, segment_ids, tiles))
    assert_equal_forms(got, want, dtype)


def test_a_large_skip_leaves_the_gradient_of_the_decays_as_it_is():
    """At the time steps of a new model almost all of y is D x, which that gradient does not depend on."""
    inputs = make_inputs(1, 64, 4, 16, 1, 16)
    inputs |= {"dt": normal(rng(6), 1, 64, 4) / 10, "dt_bias": jnp.full(4, -6.0), "D": jnp.full(4, 300.0)}
    with jax.enable_x64(True):
        exact = run(reference.ssd, jax.tree.map(lambda x: x.astype(jnp.float64), inputs), None, 64)[1]
        exact = jax.tree.map(np.asarray, exact)
    mosaic_interpreter.install()
    with plgpu.force_gpu_interpret_mode(mosaic_interpreter.SETTINGS):
        got = jax.block_until_ready(run(mosaic_gpu.ssd_in_tiles, inputs, None, tiles_of(inputs)))[1]
    for name in ("A", "dt_bias", "dt"):
        assert relative_error(got[name], exact[name]) <= TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 1057, 8, 16, 1, 32), "bfloat16"),
        ((2, 1057, 8, 16, 1, 32), "float32"),
        ((2, 2048, 8, 64, 2, 128), "bfloat16"),
    ],
)
def test_kernels_lower_for_a_gpu_without_one(shape, dtype):
    """Layouts, shared memory and copies are checked on any machine; sizes of the task, and large ones."""
    inputs = jax.eval_shape(lambda: make_inputs(*shape, dtype))
    segment_ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32)

    def loss(inputs, segment_ids):
        y, state = mosaic_gpu.ssd_in_tiles(**inputs, segment_ids=segment_ids, tiles=tiles_of(inputs))
        return (y * y).sum() + state.sum()

    lowered = jax.jit(jax.grad(loss)).trace(inputs, segment_ids).lower(lowering_platforms=("cuda",))
    # States, their sum and what every chunk does with them: forward and backward.
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 6


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 8, 4, 5, 2, 16), "float32", "multiples of 16, the latter at most 128, got 5 and 16"),
        ((1, 8, 8, 16, 1, 256), "float32", "at most 128, got 16 and 256"),
        ((1, 8, 2, 16, 1, 16), "float32", "blocks of 64 or 128 features .*, got 2 heads of 16"),
        ((1, 8, 2, 64, 1, 128), "float32", "fit into shared memory .*, state 128, float32"),
        ((1, 8, 8, 16, 1, 16), "float16", "`B` and `C` must be all bfloat16 or all float32"),
    ],
)
def test_calls_the_kernels_cannot_run_say_why(shape, dtype, message):
    with pytest.raises(ValueError, match=f"cannot be 'mosaic_gpu' here: .*{message}"):
        ops.ssd(**make_inputs(*shape, dtype), implementation="mosaic_gpu")


def test_without_a_gpu_the_named_form_raises():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="'mosaic_gpu' here: needs an NVIDIA Hopper GPU, got platform 'cpu'"):
        ops.ssd(**make_inputs(1, 8, 4, 16, 1, 16), implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "segmented"),
    [
        ((2, 1, 8, 16, 1, 32), True),
        ((3, 65, 8, 16, 2, 32), True),
        ((2, 1057, 8, 16, 1, 32), False),
        ((2, 1057, 8, 16, 1, 32), True),
        ((2, 300, 8, 32, 1, 32), True),
        # Whole rows of one tile's width: the last chunk must not reach into the next row.
        ((3, 70, 1, 64, 1, 32), True),
        ((3, 70, 4, 16, 1, 16), True),
        ((1, 500, 4, 64, 2, 64), True),
    ],
)
def test_kernels_equal_the_reference(shape, segmented, dtype):
    inputs = make_inputs(*shape, dtype)
    segment_ids = make_segments(rng(4), *shape[:2]) if segmented else None
    want = run(reference.ssd, inputs, segment_ids, 64)
    poison_memory()
    got = run(mosaic_gpu.ssd, inputs, segment_ids, 64)
    assert_equal_forms(got, want, dtype)


@pytest.mark.gpu
def test_kernels_equal_the_reference_at_large_sizes():
    inputs = make_inputs(1, 500, 4, 64, 2, 128, "bfloat16")
    segment_ids = make_segments(rng(4), 1, 500)
    want = run(reference.ssd, inputs, segment_ids, 64)
    poison_memory()
    assert_equal_forms(run(mosaic_gpu.ssd, inputs, segment_ids, 64), want, "bfloat16")


@pytest.mark.gpu
def test_kernels_give_the_same_bits_twice():
    inputs = make_inputs(8, 1057, 8, 16, 1, 32, jnp.bfloat16)
    segment_ids = make_segments(rng(4), 8, 1057)
    first = run(mosaic_gpu.ssd, inputs, segment_ids, 64)
    poison_memory()
    second = run(mosaic_gpu.ssd, inputs, segment_ids, 64)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_equal_the_chunked_form_at_the_tasks_size(dtype):
    inputs = make_inputs(64, 1057, 8, 16, 1, 32, dtype)
    got = run(mosaic_gpu.ssd, inputs, None, 64)
    want = run(xla.ssd, inputs, None, 64)
    # Both round, each in its own way.
    assert_equal_forms(got, want, dtype, factor=2)
