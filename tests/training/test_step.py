"""The update and the scoring of one batch, as pure functions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hax_jax.data import Batch, make_split
from hax_jax.training.optimizer import learning_rate_schedule, make_optimizer
from hax_jax.training.state import make_state, split_model
from hax_jax.training.step import (
    counted,
    make_eval_step,
    make_train_step,
    sequence_accuracy,
    token_losses,
)
from tests.training.tiny import DATA, VOCAB_SIZE, TinyModel, TinyOutput, tiny_experiment


@functools.cache
def items():
    """The first 96 items of the training stream."""
    split = make_split(DATA, "train")
    return jax.tree.map(np.asarray, jax.jit(split.materialize)(next(split.iterator(96, repeat=True))))


def setup(model=None, **training):
    """A compiled update, its first state, and an iterator of batches."""
    experiment = tiny_experiment(**training)
    settings = experiment.training
    structure, params, buffers = split_model(model or TinyModel())
    optimizer = make_optimizer(settings)
    # The batches are made beforehand: compiling the stream into every update would take most of the time.
    update = jax.jit(make_train_step(structure, optimizer, settings))
    shape = settings.grad_accumulation_steps, settings.batch_size
    rows = shape[0] * shape[1]
    batches = (
        jax.tree.map(lambda x, i=i: x[i : i + rows].reshape(*shape, *x.shape[1:]), items())
        for i in range(0, 96, rows)
    )
    return update, make_state(params, buffers, optimizer, seed=0), batches


def test_gradient_of_the_loss_is_that_of_its_formula():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 7)) * 5, jnp.float32)
    logits = logits.at[0, 0, 2].set(1e4).at[1, 1].set(-1e4)
    batch = jax.tree.map(lambda x: x[:3], items())
    batch = dataclasses.replace(
        batch,
        targets=jnp.asarray(np.arange(12).reshape(3, 4) % 7),
        score_mask=jnp.ones((3, 4), bool).at[2, 3].set(False),
        scored=None,
    )

    def formula(logits):
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
        return -(picked * batch.score_mask).sum()

    value, gradient = jax.value_and_grad(lambda logits: token_losses(logits, batch).sum())(logits)
    np.testing.assert_allclose(value, formula(logits), rtol=1e-6)
    np.testing.assert_allclose(gradient, jax.grad(formula)(logits), rtol=1e-5, atol=1e-6)


def test_a_count_known_ahead_changes_nothing():
    update, state, batches = setup(grad_accumulation_steps=2, batch_size=8)
    batch = next(batches)
    got, want = update(state, jax.vmap(counted)(batch)), update(state, batch)
    jax.tree.map(np.testing.assert_array_equal, got[1], want[1])
    jax.tree.map(np.testing.assert_array_equal, got[0].params, want[0].params)


def test_loss_and_accuracy_of_known_logits():
    batch = Batch(
        tokens=jnp.zeros((2, 4), jnp.int32),
        targets=jnp.array([[1, 2, 3, 0], [1, 1, 1, 1]]),
        score_mask=jnp.array([[True, True, False, True], [True, False, False, False]]),
        padding_mask=jnp.ones((2, 4), bool),
        n_context=jnp.ones(2, jnp.int32),
        n_key=jnp.ones(2, jnp.int32),
        item_weight=jnp.array([1.0, 0.0]),
    )
    logits = jnp.zeros((2, 4, 5)).at[:, 0, 1].set(50.0).at[:, 1, 4].set(50.0).at[:, 3, 0].set(1.0)
    losses = token_losses(logits, batch)
    e = np.e
    np.testing.assert_allclose(losses[0], [0.0, 50.0, 0.0, np.log(e + 4) - 1], atol=1e-5)
    np.testing.assert_array_equal(losses[1], 0.0)
    np.testing.assert_allclose(sequence_accuracy(logits, batch), [2 / 3, 0.0], rtol=1e-6)


def test_update_is_the_gradient_of_the_documented_loss():
    model = TinyModel(noise=0.0)
    update, state, raws = setup(model, warmup_steps=0, gate_loss_weight=0.3)
    raw = next(raws)
    new, metrics = update(state, raw)

    batch = jax.tree.map(lambda x: x[0], raw)
    structure, params, buffers = split_model(model)

    def loss(params):
        output = structure.merge(params, buffers)(
            batch.tokens, padding_mask=batch.padding_mask, key=jax.random.key(1), train=True
        )
        picked = jax.nn.log_softmax(output.logits)[
            jnp.arange(8)[:, None], jnp.arange(batch.tokens.shape[1]), batch.targets
        ]
        return -jnp.sum(picked * batch.score_mask) / batch.score_mask.sum() + 0.3 * output.gate_loss

    grads = jax.grad(loss)(params)
    optimizer = make_optimizer(tiny_experiment(warmup_steps=0, gate_loss_weight=0.3).training)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    wanted = optax.apply_updates(params, updates)
    for name in params:
        np.testing.assert_allclose(new.params[name], wanted[name], atol=2e-6)
    np.testing.assert_allclose(metrics["loss"] + 0.3 * metrics["gate_loss"], loss(params), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-5)
    assert metrics["tokens"] == batch.padding_mask.sum()
    assert int(new.step) == 1
    assert not np.array_equal(new.buffers["mean"], buffers["mean"])


def test_accumulation_equals_a_larger_batch():
    """Batches with different numbers of scored positions, whose losses are joined, not averaged."""
    model = TinyModel(noise=0.0)
    large, state, raws = setup(model, batch_size=12, warmup_steps=0)
    small, _, small_raws = setup(model, batch_size=4, grad_accumulation_steps=3, warmup_steps=0)
    other = state
    for _ in range(4):
        state, metrics = large(state, next(raws))
        other, other_metrics = small(other, next(small_raws))
        for name in ("loss", "gate_loss", "accuracy", "tokens", "grad_norm", "learning_rate"):
            np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=2e-5, err_msg=name)
    for name in state.params:
        np.testing.assert_allclose(other.params[name], state.params[name], atol=2e-5)


def test_batches_of_an_accumulation_draw_their_own_random_numbers():
    class Noise(TinyModel):
        def __call__(self, tokens, *, key, **rest):
            output = super().__call__(tokens, key=key, **rest)
            number = jax.random.uniform(key)
            self.mean[...] = jnp.roll(self.mean[...], 1).at[0].set(number)
            return output

    update, state, raws = setup(Noise(), batch_size=4, grad_accumulation_steps=3)
    for _ in range(2):
        state, _ = update(state, next(raws))
    assert len(set(np.asarray(state.buffers["mean"])[:6].tolist())) == 6


def test_metrics_are_means_since_the_last_log_step():
    update, state, raws = setup(log_every_steps=3, warmup_steps=0)
    single, other, other_raws = setup(log_every_steps=1, warmup_steps=0)
    losses, means = [], []
    for _ in range(6):
        state, metrics = update(state, next(raws))
        means.append(float(metrics["loss"]))
        other, metrics = single(other, next(other_raws))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(means[2], np.mean(losses[:3]), rtol=1e-6)
    np.testing.assert_allclose(means[5], np.mean(losses[3:]), rtol=1e-6)


class Counter(nnx.Variable):
    """Updates made in training so far."""


class Breaking(nnx.Module):
    """In some steps adds to the loss what is not finite, or only the gradient or a statistic is not.

    It knows the step by the tokens alone: what it counts itself is rolled back with a refused update.

    Args:
      where: 'loss', 'gradient' or 'buffer'.
      sums: token sums of the batches that break it; None for every batch after the second update.
    """

    def __init__(self, where, sums=None):
        self.weight = nnx.Param(jnp.ones((4, VOCAB_SIZE)))
        self.calls = Counter(jnp.zeros(()))
        self.where, self.sums = where, sums

    def __call__(self, tokens, *, padding_mask, key, train):
        broken = self.calls[...] >= 2
        if self.sums is not None:
            broken = jnp.any(tokens.sum() == jnp.asarray(self.sums))
        if train:
            self.calls[...] += jnp.where(broken & (self.where == "buffer"), jnp.inf, 1.0)
        extra = 0.0
        if self.where == "loss":
            extra = jnp.where(broken, jnp.nan, 0.0)
        elif self.where == "gradient":
            # A square root is finite at 0, its gradient is not.
            extra = jnp.sqrt(jnp.where(broken, 0.0, 1.0) * jnp.sum(jnp.square(self.weight[...])))
        return TinyOutput(self.weight[...][tokens % 4], extra)


@pytest.mark.parametrize("where", ["loss", "gradient", "buffer"])
def test_updates_that_are_not_finite_are_refused_up_to_a_number(where):
    update, state, raws = setup(Breaking(where), warmup_steps=0, max_refused_updates=2)
    states = [state]
    for _ in range(7):
        state, metrics = update(state, next(raws))
        states.append(state)
    assert [int(s.refused) for s in states] == [0, 0, 0, 1, 2, 3, 3, 3]
    assert [int(s.bad_step) for s in states] == [-1, -1, -1, 2, 3, 4, 4, 4]
    # Two refusals are steps without an update, the third ends the run where it stands.
    assert [int(s.step) for s in states] == [0, 1, 2, 3, 4, 4, 4, 4]
    assert (int(metrics["refused"]), int(metrics["bad_step"])) == (3, 4)
    assert all(np.isfinite(list(states[-1].bad_parts.values()))) == (where == "buffer")
    for name in ("params", "buffers", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(states[-1], name), getattr(states[2], name))
    assert np.isfinite(states[-1].params["weight"]).all()


@pytest.mark.parametrize("where", ["loss", "gradient", "buffer"])
def test_after_a_refused_batch_goes_on_as_if_it_had_not_been_there(where):
    """Injection into the second and fourth of six batches: the updates are those of the other four."""
    batches = list(setup()[2])[:6]
    sums = [int(batches[i].tokens.sum()) for i in (1, 3)]
    model = Breaking(where, sums)
    # In a warm-up every rate is another.
    update, state, _ = setup(model, warmup_steps=20, log_every_steps=6)
    other = state
    for batch in batches:
        state, metrics = update(state, batch)
    losses = []
    for batch in (batches[i] for i in (0, 2, 4, 5)):
        before = float(other.sums["loss"]) if losses else 0.0
        other, other_metrics = update(other, batch)
        losses.append(float(other.sums["loss"]) - before)
    assert (int(state.refused), int(state.bad_step), int(state.step)) == (2, 3, 6)
    for name in ("params", "buffers", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(other, name))
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-6)
    assert metrics["learning_rate"] == other_metrics["learning_rate"] > 0


def test_the_rate_of_a_refused_update_is_the_one_it_would_have_had():
    update, state, raws = setup(Breaking("loss"), warmup_steps=20, max_refused_updates=1)
    schedule = learning_rate_schedule(tiny_experiment(warmup_steps=20).training)
    for _ in range(6):
        before = int(state.step - state.refused)
        state, metrics = update(state, next(raws))
        np.testing.assert_allclose(metrics["learning_rate"], schedule(before), rtol=1e-6)
        if int(state.refused) > 1:
            break
    # Up to the refusal that ends the run, whose step is not made.
    assert int(state.refused) == 2 and int(state.bad_step) == int(state.step)


def test_metrics_of_an_interval_without_an_update_are_undefined():
    update, state, raws = setup(Breaking("loss"), warmup_steps=0, log_every_steps=2)
    for _ in range(4):
        state, metrics = update(state, next(raws))
    assert np.isnan(metrics["loss"]) and np.isnan(metrics["accuracy"])
    assert int(metrics["refused"]) == 2


def test_bfloat16_parameters_stay_bfloat16():
    update, state, raws = setup(TinyModel(dtype=jnp.bfloat16), warmup_steps=0)
    new, metrics = update(state, next(raws))
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
    assert new.params["inner"].dtype == new.opt_state.nu["inner"].dtype == jnp.bfloat16
    assert metrics["loss"].dtype == jnp.float32


def test_filler_rows_are_not_scored():
    split = make_split(DATA, "valid")
    structure, params, buffers = split_model(TinyModel())
    eval_step, materialize = jax.jit(make_eval_step(structure)), jax.jit(split.materialize)
    shapes = {"loss": (), "num_scored": (), "accuracy": (3, 3), "num_items": (3, 3)}
    zeros = {name: jnp.zeros(shape) for name, shape in shapes.items()}

    def totals(batch_size):
        sums = zeros
        for raw in split.iterator(batch_size, repeat=False):
            sums = eval_step(params, buffers, jax.random.key(0), materialize(raw), sums)
        return sums

    # 12 items: as one batch, and as two batches of 7 with two filler rows.
    one, two = totals(12), totals(7)
    assert float(one["num_items"].sum()) == float(two["num_items"].sum()) == 12
    np.testing.assert_array_equal(one["num_items"][1:, 1:], 3)
    assert float(one["num_scored"]) == float(two["num_scored"])
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-6)
    np.testing.assert_allclose(two["accuracy"], one["accuracy"], rtol=1e-6)
