"""Kernels divided over the devices of a mesh: what one device gives, without gathering inputs."""

import json

import jax
import jax.numpy as jnp
import pytest

from hax_jax import ops
from hax_jax.ops import devices, dispatch
from hax_jax.training.sharding import make_mesh
from tests.ops import on_four_devices
from tests.ops.cases import TOLERANCE, normal, rng
from tests.training.tiny import run_script

# Launches of outputs and gradients together.
LAUNCHES = {
    "causal_conv1d": 2,
    "ssd": 6,
    "selective_scan": 2,
    "gated_rms_norm": 1,
    "key_scores": 1,
    "normed_running_sum": 1,
    "sparse_attention": 5,
}


@pytest.fixture(scope="module")
def found():
    return json.loads(run_script("tests/ops/on_four_devices.py", devices=4))


@pytest.mark.timeout(600)
def test_every_op_gives_the_same_over_devices_and_gathers_nothing(found):
    assert found.keys() > LAUNCHES.keys()
    for name, of_op in found.items():
        assert of_op["error"] < TOLERANCE["float32"], name
        assert of_op["gathers"] == 0, name


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LAUNCHES)
def test_each_device_runs_the_kernels_that_it_would_run_with_its_rows_alone(found, name):
    """Lowered for Hopper GPUs."""
    assert len(found[name]["on_four"]) >= LAUNCHES[name]
    assert found[name]["on_four"] == found[name]["on_one"]


class _Mesh:
    """Stands for a mesh in force without its devices."""

    def __init__(self, monkeypatch, size: int):
        mesh = jax.sharding.AbstractMesh((size,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)


def test_rows_that_do_not_divide(monkeypatch):
    """Refused where kernels were asked for by name; where the op chooses, it chooses what runs."""
    monkeypatch.setattr(dispatch, "missing_for_mosaic_gpu", lambda: None)
    x, weight = normal(rng(1), 6, 64, 32), jnp.ones(32)
    want = ops.gated_rms_norm(x, x, weight, 1e-5, implementation="xla")
    _Mesh(monkeypatch, 4)
    with pytest.raises(ValueError, match="must divide evenly over 4 devices, got 6 rows; change the batch"):
        ops.gated_rms_norm(x, x, weight, 1e-5, implementation="mosaic_gpu")
    assert jnp.array_equal(ops.gated_rms_norm(x, x, weight, 1e-5), want)


def test_what_an_op_chooses_depends_on_the_share_of_one_device(monkeypatch):
    _Mesh(monkeypatch, 4)
    assert devices.share(jnp.zeros((8, 5), jnp.int32)).shape == (2, 5)
    monkeypatch.setattr(dispatch, "missing_for_mosaic_gpu", lambda: None)
    # 64 rows in all, of which a device has 16: too few for the kernel.
    x, weight = normal(rng(2), 8, 8, 32), jnp.ones(32)
    want = ops.gated_rms_norm(x, x, weight, 1e-5, implementation="xla")
    assert jnp.array_equal(ops.gated_rms_norm(x, x, weight, 1e-5), want)


def test_several_devices_without_a_mesh_take_what_the_compiler_divides(monkeypatch):
    monkeypatch.setattr(dispatch, "missing_for_mosaic_gpu", lambda: None)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert dispatch.best(None) == "xla"
    _Mesh(monkeypatch, 8)
    assert dispatch.best(None) == "mosaic_gpu"
    assert dispatch.best("some reason") == "xla"


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels_under_a_mesh_of_this_machine(name):
    """On one GPU the same program under `shard_map`; on several each with its rows."""
    count = jax.device_count()
    # More rows than a filter has taps, which would be taken for rows and divided.
    rows = on_four_devices.BATCH * count
    error, gathers = on_four_devices.compare(on_four_devices.cases(rows)[name], rows)
    # Sums over the batch are taken in parts where there are several.
    assert error == 0 if count == 1 else error < TOLERANCE["float32"]
    assert gathers == 0


@pytest.mark.gpu
def test_none_means_the_kernels_on_several_gpus():
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    with jax.set_mesh(make_mesh()):
        assert dispatch.best(None) == "mosaic_gpu"
    assert dispatch.best(None) == "xla"
