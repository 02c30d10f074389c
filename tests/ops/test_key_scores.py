"""The key scorer's network: forms against the reference, its kernel interpreted, lowered and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax import ops
from hax_jax.ops.key_scores import mosaic_gpu, reference, xla
from tests.ops import mosaic_interpreter
from tests.ops.cases import assert_close, normal, poison_memory, rng, with_gradients

NAMES = ("k", "summary", "w1", "b1", "w2", "b2", "w3", "b3")
MEMBERS = 3


def make_inputs(batch, length, n, dtype=jnp.float32):
    g, width = rng(61, length, n), 2 * n
    inputs = {name: normal(g, batch, length, n, dtype=dtype) for name in ("k", "summary")}
    for layer, outputs in ((1, width), (2, width), (3, 1)):
        inputs[f"w{layer}"] = normal(g, width, outputs) * (2 / width) ** 0.5
        inputs[f"b{layer}"] = normal(g, outputs)
    return inputs


def ordered(inputs):
    # Transformations sort a dictionary by its names.
    return tuple(inputs[name] for name in NAMES)


def rounded(inputs):
    """With factors as the products have them."""
    dtype = inputs["k"].dtype
    return {name: x if name.startswith("b") else x.astype(dtype) for name, x in inputs.items()}


def run(function, inputs):
    return with_gradients(lambda x: function(**x), inputs)


@pytest.mark.parametrize("length", [1, 9])
def test_xla_equals_the_reference(length):
    inputs = make_inputs(2, length, 12)
    assert_close(run(xla.key_scores, inputs), run(reference.key_scores, inputs))
    # Not the gradients: where a hidden unit is nearly zero, rounding decides whether there is one.
    inputs = make_inputs(2, length, 12, "bfloat16")
    assert_close(xla.key_scores(**inputs), reference.key_scores(**rounded(inputs)), "bfloat16")


def test_inputs_are_rounded_to_the_dtype_of_the_keys():
    inputs = make_inputs(2, 9, 16) | {"k": normal(rng(62), 2, 9, 16, dtype=jnp.bfloat16)}
    for form in (None, "xla"):
        got, want = (ops.key_scores(**x, implementation=form) for x in (inputs, rounded(inputs)))
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, want)


# Less than a tile, one and a part of another that overlaps it, a number of rows that is padded.
@pytest.mark.parametrize(
    ("length", "n", "dtype"),
    [
        (9, 16, "bfloat16"),
        (63, 32, "bfloat16"),
        (72, 16, "float32"),
        (40, 12, "float32"),
    ],
)
def test_interpreted_kernel_equals_the_reference(length, n, dtype):
    inputs = make_inputs(2, length, n, dtype)
    mosaic_interpreter.install()
    with plgpu.force_gpu_interpret_mode(mosaic_interpreter.SETTINGS):
        got = jax.block_until_ready(jax.jit(mosaic_gpu.scores_in_tiles)(*ordered(inputs)))
    assert_close(got, reference.key_scores(**rounded(inputs)), dtype)


def test_interpreted_kernel_shares_memory_between_layers(monkeypatch):
    """As wide networks do."""
    inputs = make_inputs(1, 64, 16, "bfloat16")
    monkeypatch.setattr(mosaic_gpu, "_SHARED_MEMORY", mosaic_gpu._bytes(16, 1, 1))
    mosaic_interpreter.install()
    with plgpu.force_gpu_interpret_mode(mosaic_interpreter.SETTINGS):
        got = jax.block_until_ready(mosaic_gpu.scores_in_tiles(*ordered(inputs)))
    assert_close(got, reference.key_scores(**rounded(inputs)), "bfloat16")


def test_gradient_is_that_of_xla():
    inputs = ordered(make_inputs(2, 7, 16))
    d_scores = normal(rng(63), 2, 7)
    got = mosaic_gpu._backward(inputs, d_scores)
    want = jax.vjp(xla.key_scores, *inputs)[1](d_scores)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def kernels_of(function, *arguments):
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("custom_call @mosaic_gpu")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((25, 1280, 32), "bfloat16"),
        ((64, 1057, 16), "bfloat16"),
        ((3, 500, 32), "float32"),
        ((2, 63, 64), "bfloat16"),
        ((2, 63, 64), "float32"),
        ((2, 63, 128), "bfloat16"),
        ((1, 5, 8), "bfloat16"),
    ],
)
def test_kernel_lowers_for_a_gpu_without_one(shape, dtype):
    """Layouts, shared memory and copies, at the task's size and at others; also under differentiation."""
    inputs = jax.eval_shape(lambda: make_inputs(*shape, dtype))
    assert mosaic_gpu.why_not(*ordered(inputs)) is None
    assert kernels_of(mosaic_gpu.scores_in_tiles, *ordered(inputs)) == 1
    loss = jax.value_and_grad(lambda x: mosaic_gpu.scores_in_tiles(*ordered(x)).sum())
    assert kernels_of(loss, inputs) == 1


def test_one_kernel_serves_a_population():
    inputs = jax.eval_shape(lambda: make_inputs(25, 1280, 32, "bfloat16"))
    stacked = [jax.ShapeDtypeStruct((MEMBERS, *x.shape), x.dtype) for x in ordered(inputs)]
    assert kernels_of(jax.vmap(mosaic_gpu.scores_in_tiles), *stacked) == 1


@pytest.mark.parametrize(
    ("n", "dtype", "message"),
    [
        (16, "float16", "all arrays must be float32 or bfloat16, got float16, float32"),
        (136, "bfloat16", "`k` has too many features for a program's shared memory, got 136 in bfloat16"),
        (96, "float32", "too many features .* got 96 in float32"),
    ],
)
def test_calls_the_kernel_cannot_run_say_why(n, dtype, message):
    with pytest.raises(ValueError, match=f"of key_scores cannot be 'mosaic_gpu' here: .*{message}"):
        ops.key_scores(**make_inputs(1, 8, n, dtype), implementation="mosaic_gpu")


def test_shapes_that_do_not_fit_are_refused():
    inputs = make_inputs(1, 8, 16)
    with pytest.raises(ValueError, match=r"`w1` of key_scores must have shape \(2n, 2n\) = \(32, 32\), got"):
        ops.key_scores(**inputs | {"w1": jnp.zeros((30, 32))})
    narrow = {"w1": (32, 30), "b1": (30,), "w2": (30, 30), "b2": (30,), "w3": (30, 1)}
    with pytest.raises(ValueError, match="`w1` of key_scores must have shape"):
        ops.key_scores(**inputs | {name: jnp.zeros(shape) for name, shape in narrow.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 16), (2, 63, 32), (3, 500, 16), (3, 500, 12), (25, 1280, 32), (64, 1057, 16), (2, 500, 64)],
)
def test_kernel_equals_the_reference(shape, dtype):
    check_on_a_gpu(make_inputs(*shape, dtype), dtype)


@pytest.mark.gpu
def test_kernel_equals_the_reference_where_layers_share_memory():
    check_on_a_gpu(make_inputs(2, 500, 128, "bfloat16"), "bfloat16")


def check_on_a_gpu(inputs, dtype):
    want, gradients = reference.key_scores(**rounded(inputs)), run(xla.key_scores, inputs)[1]
    poison_memory()
    got, got_gradients = run(mosaic_gpu.key_scores, inputs)
    assert_close(got, want, dtype)
    assert_close(got_gradients, gradients, dtype)


@pytest.mark.gpu
def test_kernel_gives_the_same_bits_twice():
    # Not a multiple of 64: the last two tiles write the same places.
    inputs = ordered(make_inputs(25, 1272, 32, "bfloat16"))
    function = jax.jit(mosaic_gpu.key_scores)
    first = np.asarray(function(*inputs))
    poison_memory()
    np.testing.assert_array_equal(first, np.asarray(function(*inputs)))


@pytest.mark.gpu
def test_a_population_gives_what_its_members_give():
    members = [make_inputs(3, length, 32, "bfloat16") for length in (500, 500, 500)]
    members[1]["w1"], members[2]["k"] = -members[1]["w1"], members[2]["k"] * 2
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    want = [jax.jit(mosaic_gpu.key_scores)(*ordered(member)) for member in members]
    poison_memory()
    got = jax.jit(jax.vmap(mosaic_gpu.key_scores))(*ordered(stacked))
    np.testing.assert_array_equal(np.asarray(got), np.stack(want))
