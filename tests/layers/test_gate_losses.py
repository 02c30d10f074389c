"""The gate losses of several branches at once, against those that each computes by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hax_jax.config import ModelConfig
from hax_jax.layers import HaxBranch, RoutingDraws, Sequence, with_gate_losses
from hax_jax.layers.routing import RULES

BATCH, LENGTH, WIDTH = 2, 24, 16
SOURCES = {"causal": "sliding_window+key_selection", "parity": "key_selection"}


def _config(**changes) -> ModelConfig:
    return ModelConfig(state_size=8, sparse_keys=8, precision="float32", **changes)


def _rows(routing: str) -> tuple[Sequence, jax.Array]:
    mask = jnp.arange(LENGTH) < jnp.array([[LENGTH], [17]])
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH))
    return RULES[routing].make_sequence(mask, None, None, "mamba2"), x


@pytest.mark.parametrize("routing", ["causal", "parity"])
def test_together_they_are_what_each_is_alone(routing):
    config = _config(sparse_arch=SOURCES[routing], routing=routing)
    branches = [HaxBranch(WIDTH, config, rngs=nnx.Rngs(seed)) for seed in range(3)]
    draws = [b.draw(jax.random.key(9 + i), BATCH, LENGTH, True) for i, b in enumerate(branches)]
    sequence, x = _rows(routing)
    structure, params, rest = nnx.split(branches, nnx.Param, ...)

    def losses(params, together):
        branches = nnx.merge(structure, params, rest)
        results = [
            branch(x, sequence, draws=drawn, train=not together)
            for branch, drawn in zip(branches, draws, strict=True)
        ]
        if together:
            results = with_gate_losses(branches, results, draws, sequence)
        found = [(r.gate_loss, r.sampled_scores, r.sampled_targets) for r in results]
        return sum(r.gate_loss * (i + 1) for i, r in enumerate(results)), found

    both = [jax.value_and_grad(losses, has_aux=True)(params, together) for together in (False, True)]
    got, want = (jax.tree.leaves(one) for one in both)
    assert want[0] > 0
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_branches_without_key_selection_have_none():
    config = _config(sparse_arch="sliding_window")
    branch = HaxBranch(WIDTH, config, rngs=nnx.Rngs(0))
    sequence, x = _rows("causal")
    result = branch(x, sequence)
    (same,) = with_gate_losses([branch], [result], [RoutingDraws()], sequence)
    assert same is result and same.scored is None


def test_noise_is_asked_for():
    branch = HaxBranch(WIDTH, _config(sparse_arch="key_selection"), rngs=nnx.Rngs(0))
    sequence, x = _rows("causal")
    result = dataclasses.replace(branch(x, sequence))
    with pytest.raises(ValueError, match=r"`draws.noise` must be an array .*got None"):
        with_gate_losses([branch], [result], [RoutingDraws()], sequence)
