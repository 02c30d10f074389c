"""Small parameters as one vector: nothing is lost, and an update is the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hax_jax.training import flat as flat_module
from hax_jax.training import make_optimizer
from hax_jax.training.flat import FlatStructure
from hax_jax.training.state import make_state, split_model
from hax_jax.training.step import make_train_step
from tests.training.test_step import items
from tests.training.tiny import TinyModel, tiny_experiment


@pytest.fixture(params=["all", "some"])
def parts(request, monkeypatch):
    structure, params, buffers = split_model(TinyModel())
    if request.param == "some":
        monkeypatch.setattr(flat_module, "_SMALL", sorted(x.size for x in params.values())[0])
    return structure, params, buffers, FlatStructure(structure, params)


def test_a_state_comes_back_as_it_was(parts):
    _, params, buffers, flat = parts
    state = make_state(params, buffers, make_optimizer(tiny_experiment().training), seed=0)
    packed = flat.pack_state(state)
    assert len(packed.params) < len(params) or len(params) == 1
    assert packed.opt_state.mu.keys() == packed.params.keys()
    back = flat.unpack_state(packed)
    without_key = lambda state: dataclasses.replace(state, key=0)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, without_key(back), without_key(state))


def test_two_updates_are_those_of_the_tensors_one_by_one(parts):
    structure, params, buffers, flat = parts
    training = tiny_experiment(warmup_steps=0).training
    optimizer = make_optimizer(training)
    state = make_state(params, buffers, optimizer, seed=0)
    raw = jax.tree.map(lambda x: np.asarray(x)[None, :8], items())

    def after(structure, state):
        step = jax.jit(make_train_step(structure, optimizer, training))
        state, metrics = step(*(step(state, raw)[0], raw))
        return state, metrics

    apart, metrics = after(structure, state)
    joined, joined_metrics = after(flat, flat.pack_state(state))
    joined = flat.unpack_state(joined)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # noqa: E731
    jax.tree.map(compare, (apart.params, apart.opt_state), (joined.params, joined.opt_state))
    jax.tree.map(compare, metrics, joined_metrics)


def test_types_have_vectors_of_their_own_and_tensors_begin_at_whole_lines():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4, jnp.bfloat16), "c": jnp.ones(())}
    flat = FlatStructure(split_model(TinyModel())[0], params)
    packed = flat.pack(params)
    assert {name: x.shape for name, x in packed.items()} == {"<float32>": (128,), "<bfloat16>": (128,)}
    np.testing.assert_array_equal(np.flatnonzero(packed["<float32>"]), [*range(6), 64])
    jax.tree.map(np.testing.assert_array_equal, flat.unpack(packed), params)
