"""Training that changes how keys are hashed: bits that come one by one, and a loss on codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hax_jax.data import make_split
from hax_jax.training.initialise import build
from hax_jax.training.optimizer import make_optimizer
from hax_jax.training.state import make_state, split_model
from hax_jax.training.step import make_train_step, token_losses
from tests.training.tiny import DATA, tiny_experiment, tiny_hax_model


def _experiment(model=None, **training):
    # Both at once, because settings of training are checked against those of the model.
    tiny = tiny_experiment(warmup_steps=0)
    return dataclasses.replace(
        tiny,
        model=tiny_hax_model(**{"precision": "float32", **(model or {})}),
        training=dataclasses.replace(tiny.training, **training),
    )


def _setup(experiment):
    """A compiled update and its first state."""
    structure, params, buffers = split_model(build(experiment))
    optimizer = make_optimizer(experiment.training)
    update = jax.jit(make_train_step(structure, lambda batch: batch, optimizer, experiment.training))
    return structure, update, make_state(params, buffers, optimizer, seed=0)


def _raw(accumulation: int = 1):
    split = make_split(DATA, "train")
    batch = jax.jit(split.materialize)(next(split.iterator(8, repeat=True)))
    return jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)


FORMS = {
    "tied_init": ({"query_key": "tied_init"}, {}),
    "shared, cosines": ({"query_key": "shared", "unit_norm": True}, {}),
    "centred, orthogonal": ({"centring": "running", "projection": "orthogonal", "key_size": 3}, {}),
    "learned": ({"projection": "learned"}, {"hash_loss_weight": 0.1}),
    "everything": (
        {"query_key": "shared", "unit_norm": True, "centring": "running", "precision": "default"},
        {"hash_loss_weight": 1.0, "hash_bits": 0, "hash_bits_every": 2, "grad_accumulation_steps": 2},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_takes_steps(form):
    model, training = FORMS[form]
    experiment = _experiment(model, **training)
    _, update, state = _setup(experiment)
    raw = _raw(experiment.training.grad_accumulation_steps)
    before = state
    for _ in range(3):
        state, metrics = update(state, raw)
    assert int(state.refused) == 0 and np.isfinite(metrics["grad_norm"])
    assert metrics["grad_norm"] < 100
    for name, value in state.params.items():
        assert np.isfinite(value).all(), name
        assert name.endswith("layers.2.bias") or (value != before.params[name]).any(), name
    for name, value in state.buffers.items():
        np.testing.assert_array_equal(value, before.buffers[name])


def test_update_is_the_gradient_of_the_loss_with_the_bits_of_its_step():
    """The step's number decides the bits; the hash loss looks at all of them."""
    experiment = _experiment({"num_hash": 4}, hash_loss_weight=0.5, hash_bits=1, hash_bits_every=2)
    structure, update, state = _setup(experiment)
    raw = _raw()
    batch = jax.tree.map(lambda x: x[0], raw)
    optimizer = make_optimizer(experiment.training)

    @jax.jit
    def wanted(state, bits):
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)

        def loss(params):
            output = structure.merge(params, state.buffers)(
                batch.tokens,
                padding_mask=batch.padding_mask,
                key=jax.random.fold_in(key, 0),
                train=True,
                hash_bits=bits,
                hash_loss=True,
            )
            entropy = token_losses(output.logits, batch).sum() / batch.score_mask.sum()
            return entropy + 0.1 * output.gate_loss + 0.5 * output.hash_loss, entropy

        (_, entropy), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, _ = optimizer.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), entropy

    for bits in (1, 1, 2, 2, 3, 3, 4, 4, 4):
        params, _ = wanted(state, jnp.int32(bits))
        state, _ = update(state, raw)
        for name, value in state.params.items():
            np.testing.assert_allclose(value, params[name], atol=2e-6, err_msg=f"{bits} bits, {name}")


def test_without_a_weight_there_is_no_hash_loss():
    texts = []
    for weight in (0.0, 1.0):
        _, update, state = _setup(_experiment(hash_loss_weight=weight))
        texts.append(str(jax.make_jaxpr(update)(state, _raw())))
    # The one op that nothing else needs.
    assert ["log1p" in text and "tanh" in text for text in texts] == [False, True]
