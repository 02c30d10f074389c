"""The branch in somebody else's model: what trains what, what sees what, and that the example runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import example_hax_layer as example
from hax_jax.data import make_split
from hax_jax.training.metrics import read_metrics

LENGTH = 24
SCORER = "scorer"


@functools.cache
def _model() -> example.RecurrentModel:
    return example.RecurrentModel(width=16, rngs=nnx.Rngs(0))


@functools.cache
def _batch():
    split = make_split(example.experiment().data, "train")
    return split.materialize(next(split.iterator(4, repeat=True)))


def _tokens(seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (2, LENGTH), 0, example.VOCAB_SIZE)


def _run(tokens, padding_mask=None, key=None, train=False) -> example.Output:
    # Kept for all tests, so it must not be made while something is traced.
    _model()
    return _traced(tokens, padding_mask, key, train)


@functools.partial(jax.jit, static_argnames="train")
def _traced(tokens, padding_mask, key, train) -> example.Output:
    return _model()(tokens, padding_mask=padding_mask, key=key, train=train)


@functools.cache
def _gradients() -> dict[str, dict[str, float]]:
    """The largest gradient of each parameter, by the loss it comes from."""
    graph, params, rest = nnx.split(_model(), nnx.Param, ...)
    batch = _batch()

    def losses(params):
        model = nnx.merge(graph, params, rest)
        output = model(batch.tokens, padding_mask=batch.padding_mask, key=jax.random.key(1), train=True)
        chosen = jax.nn.one_hot(batch.targets, example.VOCAB_SIZE) * jax.nn.log_softmax(output.logits)
        loss = -jnp.mean(chosen.sum(-1), where=batch.score_mask)
        return {"cross-entropy": loss, "gate loss": output.gate_loss}

    @jax.jit
    def gradients(params):
        values, backward = jax.vjp(losses, params)
        return {loss: backward({name: jnp.float32(name == loss) for name in values})[0] for loss in values}

    return {
        loss: {
            jax.tree_util.keystr(path): float(jnp.abs(leaf).max())
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for loss, tree in gradients(params).items()
    }


def test_cross_entropy_reaches_everything_but_the_scorer():
    largest = _gradients()["cross-entropy"]
    branch = [name for name in largest if "branch" in name and SCORER not in name]
    # The projection to keys and queries, and the output's scale, in each of two layers.
    assert len(branch) == 4
    assert all(value > 0 for name, value in largest.items() if SCORER not in name)
    assert all(value == 0 for name, value in largest.items() if SCORER in name)


def test_gate_loss_reaches_the_scorer_alone():
    largest = _gradients()["gate loss"]
    scorer = {name: value for name, value in largest.items() if SCORER in name}
    # Two layers of a scorer of three linear maps.
    assert len(scorer) == 12
    # The loss compares scores with each other, so a bias common to all of them has no gradient.
    zero = {name for name, value in scorer.items() if value < 1e-6}
    assert len(zero) == 2 and all("bias" in name for name in zero)
    assert all(value == 0 for name, value in largest.items() if SCORER not in name)


@pytest.mark.parametrize("train", [False, True])
def test_later_tokens_change_no_earlier_logits(train):
    tokens, key = _tokens(), jax.random.key(3) if train else None
    changed = tokens.at[:, 15:].set((tokens[:, 15:] + 1) % example.VOCAB_SIZE)
    a, b = (_run(tokens, None, key, train=train).logits for tokens in (tokens, changed))
    np.testing.assert_array_equal(a[:, :15], b[:, :15])
    assert not np.array_equal(a[:, 15:], b[:, 15:])


def test_padding_is_neither_seen_nor_counted():
    tokens = _tokens()
    real = jnp.arange(LENGTH) < 17
    mask = jnp.broadcast_to(real, tokens.shape)
    other = jnp.where(mask, tokens, _tokens(seed=1))
    a, b = (_run(tokens, mask, jax.random.key(0), train=True) for tokens in (tokens, other))
    np.testing.assert_array_equal(a.logits[:, :17], b.logits[:, :17])
    assert a.gate_loss == b.gate_loss > 0
    alone = _run(tokens[:, :17]).logits
    np.testing.assert_allclose(a.logits[:, :17], alone, rtol=0, atol=1e-5)


def test_gate_loss_needs_a_key_and_is_absent_outside_training():
    tokens = _tokens()
    assert _run(tokens).gate_loss == 0
    assert _run(tokens, None, jax.random.key(0), train=True).gate_loss > 0
    with pytest.raises(ValueError, match="`key` must be a PRNG key"):
        _run(tokens, train=True)


def test_example_trains_from_its_command_line(tmp_path, capsys):
    assert example.main([f"--workdir={tmp_path}", "--num_steps=100"]) == 0
    assert "test accuracy" in capsys.readouterr().out.splitlines()[-1]
    (line,) = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    # ln 32 = 3.5 at first; to know that values come next, of which there are 4, takes it to 1.4.
    assert line["loss"] < 2.5
    assert line["gate_loss"] > 0


def test_bad_input_is_one_line(tmp_path, capsys):
    assert example.main([f"--workdir={tmp_path}", "--num_steps=0"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
