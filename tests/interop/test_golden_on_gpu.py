"""Golden models with every op as a kernel: a training step in float32 and in bfloat16. Needs a Hopper GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from hax_jax.interop.golden import check_file
from hax_jax.interop.golden.files import GoldenFile, model_config
from hax_jax.interop.golden.models import make_batch, make_draws, make_objective
from hax_jax.interop.state_dict import load_state_dict
from hax_jax.models import build_model
from hax_jax.ops import dispatch
from hax_jax.training.state import split_model
from tests.ops.cases import TOLERANCE, relative_error


@pytest.fixture(autouse=True)
def _one_gpu():
    """A mesh of one GPU: with several and no mesh the ops would leave their kernels aside."""
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        yield


HAX = ("A_mamba2_hax.npz", "A_mamba_hax.npz")
PATTERNS = ("A_mamba2_dilated.npz", "A_mamba2_sliding_window_and_sink.npz")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*HAX, *PATTERNS, "E_train_mamba2_hax.npz"])
def test_float32_kernels_are_inside_the_golden_tolerances(golden, name):
    assert dispatch.best(None) == "mosaic_gpu"
    assert [check for check in check_file(golden.path(name)) if not check.inside] == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", HAX)
def test_a_bfloat16_step_with_kernels(golden, name):
    """Loss near the original's float32; output and gradients those of the XLA forms.

    Twice the tolerance of an op: rounding is handed on, and near-ties may be decided otherwise.
    """
    file = GoldenFile(golden.path(name))
    loss, hidden, gradients = bfloat16_step(file, "mosaic_gpu")
    _, hidden_by_xla, gradients_by_xla = bfloat16_step(file, "xla")
    assert loss == pytest.approx(float(file["train/loss"]), rel=TOLERANCE["bfloat16"])
    assert relative_error(hidden, hidden_by_xla) <= 2 * TOLERANCE["bfloat16"]
    assert relative_error(gradients, gradients_by_xla) <= 2 * TOLERANCE["bfloat16"]


def bfloat16_step(file: GoldenFile, implementation: str) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss, hidden states at real positions and all gradients, with bfloat16 inputs of matrix products."""
    config = dataclasses.replace(model_config(file.meta, "default"), implementation=implementation)
    model = build_model(config, rngs=nnx.Rngs(0))
    load_state_dict(model, file.group("param/"))
    structure, params, buffers = split_model(model)
    batch = make_batch(file["inputs"], file["labels"], file["mask"], file["attn_mask"])
    draws = make_draws(file, "train/rand/", len(model.layers), jnp.float32)
    step = jax.jit(
        jax.value_and_grad(
            make_objective(structure, buffers, file.meta["gate_loss_weight"], train=True), has_aux=True
        )
    )
    (_, (loss, *_, output)), gradients = step(params, batch, draws)
    hidden = np.asarray(output.hidden, np.float32)[file["attn_mask"].astype(bool)]
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)])
    return float(loss), hidden, flat
