"""The gated norm: every form against the reference, its kernel interpreted, lowered and on a GPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from hax_jax import ops
from hax_jax.ops import lanes_mosaic_gpu
from hax_jax.ops.gated_rms_norm import mosaic_gpu, reference, xla
from tests.ops import mosaic_interpreter
from tests.ops.cases import assert_close, normal, poison_memory, rng, with_gradients


def make_inputs(*shape, dtype=jnp.float32):
    g = rng(51, *shape)
    return {
        "x": normal(g, *shape, dtype=dtype),
        "gate": 2 * normal(g, *shape, dtype=dtype),
        "weight": normal(g, shape[-1]),
    }


def run(function, inputs):
    return with_gradients(lambda x: function(x["x"], x["gate"], x["weight"], 1e-3), inputs)


def test_xla_equals_the_reference():
    inputs = make_inputs(2, 9, 24)
    assert_close(run(xla.gated_rms_norm, inputs), run(reference.gated_rms_norm, inputs))


@pytest.fixture
def interpreted(monkeypatch):
    mosaic_interpreter.install()
    monkeypatch.setattr(lanes_mosaic_gpu, "interpret", mosaic_interpreter.SETTINGS)


@pytest.mark.parametrize(("rows", "width"), [(64, 64), (37, 64), (37, 96), (64, 320), (64, 1024)])
def test_interpreted_kernel_equals_the_reference(rows, width, interpreted):
    inputs = make_inputs(2, rows, width)
    with plgpu.force_gpu_interpret_mode(mosaic_interpreter.SETTINGS):
        got = jax.block_until_ready(run(mosaic_gpu.norm_in_tiles, inputs))
    assert_close(got, run(reference.gated_rms_norm, inputs))


def test_interpreted_kernel_takes_an_input_wider_than_the_gate(interpreted):
    inputs = make_inputs(2, 64, 64)
    inputs["gate"] = inputs["gate"].astype(jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode(mosaic_interpreter.SETTINGS):
        out, gradients = jax.block_until_ready(run(mosaic_gpu.norm_in_tiles, inputs))
    assert gradients["x"].dtype == jnp.float32
    assert_close((out, gradients), run(reference.gated_rms_norm, inputs), "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernel_lowers_for_a_gpu_without_one(dtype):
    inputs = jax.eval_shape(lambda: make_inputs(64, 1057, 128, dtype=dtype))

    def loss(inputs):
        return mosaic_gpu.norm_in_tiles(inputs["x"], inputs["gate"], inputs["weight"], 1e-5).sum()

    lowered = jax.jit(jax.grad(loss)).trace(inputs).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


def test_calls_the_kernel_cannot_run_say_why():
    with pytest.raises(ValueError, match=r"cannot be 'mosaic_gpu' here: .*got 24"):
        ops.gated_rms_norm(**make_inputs(64, 24), eps=1e-5, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"at most 1024, got 2048"):
        ops.gated_rms_norm(**make_inputs(64, 2048), eps=1e-5, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="must be float32 or bfloat16, got float16"):
        ops.gated_rms_norm(**make_inputs(64, 32, dtype=jnp.float16), eps=1e-5, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 32), (3, 7, 96), (2, 64, 320), (64, 1024), (64, 1057, 128)])
def test_kernel_equals_the_chain_rule(shape, dtype):
    inputs = make_inputs(*shape, dtype=dtype)
    want = run(xla.gated_rms_norm, inputs)
    poison_memory()
    assert_close(run(mosaic_gpu.gated_rms_norm, inputs), want, dtype)
