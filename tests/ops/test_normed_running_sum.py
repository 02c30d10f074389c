"""Running sums over their norm: forms against the reference, the kernel interpreted, lowered, on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hax_jax import ops
from hax_jax.ops import lanes_mosaic_gpu
from hax_jax.ops.normed_running_sum import mosaic_gpu, reference, xla
from tests.ops import mosaic_interpreter
from tests.ops.cases import (
    assert_close,
    lengths,
    make_segments,
    normal,
    poison_memory,
    rng,
    segmented,
    with_gradients,
)


def make_inputs(batch, length, n, segmented, dtype=jnp.float32):
    ids = make_segments(rng(72), batch, length) if segmented else None
    return normal(rng(71, length), batch, length, n, dtype=dtype), ids


def run(function, inputs, dtype=jnp.float32):
    x, ids = inputs
    return with_gradients(lambda x: function(x, ids, jnp.dtype(dtype)), x)


@lengths
@segmented
def test_xla_equals_the_reference(length, segmented):
    inputs = make_inputs(2, length, 5, segmented)
    assert_close(run(xla.normed_running_sum, inputs), run(reference.normed_running_sum, inputs))


def test_zeros_give_zeros_and_results_are_rounded_once():
    x = jnp.zeros((1, 9, 4)).at[:, 5:].set(3.0)
    y = ops.normed_running_sum(x)
    np.testing.assert_array_equal(y[:, :6, 0], [[0, 0, 0, 0, 0, 1]])
    half = ops.normed_running_sum(x.astype(jnp.bfloat16), dtype=jnp.bfloat16)
    np.testing.assert_array_equal(half, y.astype(jnp.bfloat16))
    assert ops.normed_running_sum(x.astype(jnp.bfloat16)).dtype == jnp.float32


# Fewer positions than stretches of time, and several in each, the last ones empty; two reads of a stretch,
# kept or made anew for every walk.
@pytest.mark.parametrize(("length", "most_held"), [(5, 48), (150, 48), (270, 48), (270, 0)])
@segmented
def test_interpreted_kernel_equals_the_reference(length, most_held, segmented, monkeypatch):
    mosaic_interpreter.install()
    monkeypatch.setattr(mosaic_gpu, "MOST_HELD", most_held)
    monkeypatch.setattr(lanes_mosaic_gpu, "interpret", mosaic_interpreter.SETTINGS)
    inputs = make_inputs(2, length, 6, segmented)
    got = jax.block_until_ready(run(mosaic_gpu.normed_running_sum, inputs))
    assert_close(got, run(reference.normed_running_sum, inputs))


def test_a_segment_knows_nothing_of_the_rounding_before_it(monkeypatch):
    mosaic_interpreter.install()
    monkeypatch.setattr(lanes_mosaic_gpu, "interpret", mosaic_interpreter.SETTINGS)
    x, ids = normal(rng(73), 1, 140, 4), jnp.asarray(np.arange(140)[None] >= 61, jnp.int32)
    got = mosaic_gpu.normed_running_sum(x.at[:, :61].mul(1e12), ids, jnp.float32)
    # The same stretches: only what lies before the segment differs.
    want = mosaic_gpu.normed_running_sum(x.at[:, :61].set(0.0), ids, jnp.float32)
    np.testing.assert_array_equal(got[:, 61:], want[:, 61:])


@pytest.mark.parametrize(
    ("shape", "dtype", "members"),
    [((25, 1280, 32), "bfloat16", 0), ((64, 1057, 16), "float32", 0), ((3, 1, 5), "bfloat16", 3)],
)
def test_kernel_lowers_for_a_gpu_without_one(shape, dtype, members, monkeypatch):
    monkeypatch.setattr(ops.dispatch, "missing_for_mosaic_gpu", lambda: None)
    stack = (members,) if members else ()
    x = jax.ShapeDtypeStruct((*stack, *shape), jnp.dtype(dtype))
    ids = jax.ShapeDtypeStruct((*stack, *shape[:2]), jnp.int32)

    def function(x, ids):
        return mosaic_gpu.normed_running_sum(x, ids, jnp.bfloat16)

    traced = jax.jit(jax.vmap(function) if members else function).trace(x, ids)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu") == 1


def test_calls_the_kernel_cannot_run_say_why():
    with pytest.raises(ValueError, match=r"cannot be 'mosaic_gpu' here: .*or bfloat16, got float16, float32"):
        ops.normed_running_sum(jnp.zeros((1, 8, 8), jnp.float16), implementation="mosaic_gpu")


def test_long_rows_are_left_to_xla():
    x = normal(rng(74), 1, mosaic_gpu.MAX_LENGTH + 1, 4)
    got = ops.normed_running_sum(x, implementation="mosaic_gpu")
    np.testing.assert_array_equal(got, ops.normed_running_sum(x, implementation="xla"))


@pytest.mark.gpu
@segmented
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 4), (2, 63, 16), (3, 500, 30), (25, 1280, 32), (4, 1057, 16), (1, 4096, 8)]
)
def test_kernel_equals_the_reference(shape, dtype, segmented):
    inputs = make_inputs(*shape, segmented, dtype)
    want = run(reference.normed_running_sum, inputs, dtype)
    poison_memory()
    assert_close(run(mosaic_gpu.normed_running_sum, inputs, dtype), want, dtype)


@pytest.mark.gpu
def test_kernel_gives_the_same_bits_twice():
    x, ids = make_inputs(25, 1280, 32, True, jnp.bfloat16)
    function = jax.jit(lambda x, ids: mosaic_gpu.normed_running_sum(x, ids, jnp.dtype(jnp.float32)))
    first = np.asarray(function(x, ids))
    poison_memory()
    np.testing.assert_array_equal(first, np.asarray(function(x, ids)))


@pytest.mark.gpu
def test_a_population_gives_what_its_members_give():
    x, ids = make_inputs(6, 500, 32, True, jnp.bfloat16)
    x, ids = x.reshape(3, 2, 500, 32), ids.reshape(3, 2, 500)
    function = lambda x, ids: mosaic_gpu.normed_running_sum(x, ids, jnp.dtype(jnp.float32))  # noqa: E731
    want = [np.asarray(jax.jit(function)(*member)) for member in zip(x, ids, strict=True)]
    poison_memory()
    np.testing.assert_array_equal(np.asarray(jax.jit(jax.vmap(function))(x, ids)), np.stack(want))
