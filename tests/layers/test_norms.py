"""The norm's own gradient, which keeps nothing but the input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hax_jax.layers.norms import rms_norm
from tests.ops.cases import normal, rng


def plain(x, weight, eps):
    x = x.astype(jnp.float32)
    return weight * x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_formula(dtype):
    x, weight, direction = normal(rng(0), 3, 5, 8), normal(rng(1), 8), normal(rng(2), 3, 5, 8)
    x = x.astype(dtype)

    def outcome(function):
        y, pull = jax.vjp(lambda x, weight: function(x, weight, 0.5), x, weight)
        return (y, *pull(direction))

    for got, want in zip(outcome(rms_norm), outcome(plain), strict=True):
        assert got.dtype == want.dtype
        tolerance = 1e-2 if got.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(
            got.astype(jnp.float32), want.astype(jnp.float32), rtol=tolerance, atol=tolerance
        )


def test_the_input_and_a_number_for_each_row_are_kept():
    x, weight = jnp.ones((3, 8)), jnp.ones(8)
    _, pull = jax.vjp(lambda x, weight: rms_norm(x, weight, 1e-5), x, weight)
    assert sorted(array.shape for array in jax.tree.leaves(pull)) == [(3, 1), (3, 8), (8,)]
