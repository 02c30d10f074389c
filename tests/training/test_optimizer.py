"""AdamW against the update rule written out in float64, and in bfloat16 with every operation rounded."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from hax_jax.config import TrainingConfig
from hax_jax.training import learning_rate_schedule, make_optimizer

STEPS = 60
RECIPE = TrainingConfig(num_steps=STEPS, learning_rate=2e-3, warmup_steps=10, weight_decay=0.01)


def gradients(seed=0):
    """Gradients of two parameters over the steps, of scales from 1e-6 to 10."""
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-6, 1, size=(7,))
    return [{"a": rng.normal(size=(5, 7)) * scales, "b": rng.normal(size=(3,))} for _ in range(STEPS)]


def start():
    rng = np.random.default_rng(9)
    return {"a": rng.normal(size=(5, 7)), "b": np.zeros(3)}


def adamw_float64(params, grads, rates, b1=0.9, b2=0.999, eps=1e-8, decay=0.01):
    """The textbook rule, as torch.optim.AdamW states it."""
    moments = {name: (np.zeros_like(p), np.zeros_like(p)) for name, p in params.items()}
    params = dict(params)
    for t, (gradient, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        for name, g in gradient.items():
            m, v = moments[name]
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g * g
            moments[name] = m, v
            decayed = params[name] * (1 - rate * decay)
            m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
            params[name] = decayed - rate * m_hat / (np.sqrt(v_hat) + eps)
    return params, moments


def run(optimizer, params, grads):
    @jax.jit
    def update(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient in grads:
        gradient = jax.tree.map(lambda g, p: jnp.asarray(g, p.dtype), gradient, params)
        params, state = update(params, state, gradient)
    return params, state


def test_equals_the_rule_in_float64():
    rates = [2e-3 * min(1.0, step / 10) for step in range(STEPS)]
    wanted, moments = adamw_float64(start(), gradients(), rates)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start())
    got, state = run(make_optimizer(RECIPE), params, gradients())
    for name in wanted:
        # 60 updates of up to 2e-3, each rounded at 6e-8 of values up to 3.
        np.testing.assert_allclose(got[name], wanted[name], rtol=0, atol=2e-6)
        m, v = moments[name]
        np.testing.assert_allclose(state.mu[name], m, rtol=1e-5, atol=1e-6 * np.abs(m).max())
        np.testing.assert_allclose(state.nu[name], v, rtol=1e-5)
    assert int(state.count) == STEPS


def test_first_update_moves_nothing_and_second_is_a_tenth_of_the_rate():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start())
    after_one, _ = run(make_optimizer(RECIPE), params, gradients()[:1])
    np.testing.assert_array_equal(after_one["a"], params["a"])
    constant = [gradients()[0]] * 2
    after_two, _ = run(make_optimizer(RECIPE), {"b": params["b"]}, [{"b": g["b"]} for g in constant])
    np.testing.assert_allclose(np.abs(after_two["b"]), 2e-4, rtol=1e-5)


def test_decay_shrinks_every_parameter_alike():
    recipe = TrainingConfig(num_steps=5, warmup_steps=0, learning_rate=0.1, weight_decay=0.5)
    params = {"norm.weight": jnp.ones(4), "kernel": jnp.ones((4, 4)), "scalar": jnp.ones(())}
    zeros = [jax.tree.map(jnp.zeros_like, params)] * 5
    got, _ = run(make_optimizer(recipe), params, zeros)
    for leaf in jax.tree.leaves(got):
        np.testing.assert_allclose(leaf, 0.95**5, rtol=1e-6)


def adamw_bfloat16(p, grads, rates, b1=0.9, b2=0.999, eps=1e-8, decay=0.01):
    """torch.optim.AdamW on bfloat16 tensors: each kernel computes in float32 and rounds what it stores."""
    stored = lambda x: np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)  # noqa: E731
    p, m, v = stored(p), np.zeros_like(p, np.float32), np.zeros_like(p, np.float32)
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        g = stored(g)
        p = stored(p * np.float32(1 - rate * decay))
        m = stored(m + np.float32(1 - b1) * (g - m))
        v = stored(v * np.float32(b2))
        v = stored(v + np.float32(1 - b2) * g * g)
        root = stored(stored(np.sqrt(v)) / np.float32(math.sqrt(1 - b2**t)))
        root = stored(root + np.float32(eps))
        p = stored(p - np.float32(rate / (1 - b1**t)) * (m / root))
    return p, m, v


def test_bfloat16_rounds_every_operation_as_the_original():
    rates = [2e-3 * min(1.0, step / 10) for step in range(STEPS)]
    params = {"a": jnp.asarray(start()["a"], jnp.bfloat16)}
    got, state = run(make_optimizer(RECIPE), params, [{"a": g["a"]} for g in gradients()])
    assert {x.dtype for x in jax.tree.leaves((got, state.mu, state.nu))} == {jnp.dtype(jnp.bfloat16)}
    p, m, v = adamw_bfloat16(start()["a"], [g["a"] for g in gradients()], rates)
    np.testing.assert_array_equal(np.asarray(state.nu["a"], np.float32), v)
    np.testing.assert_array_equal(np.asarray(state.mu["a"], np.float32), m)
    # The order of the last product and quotient may tip a rounding: at most one unit in the last place.
    np.testing.assert_allclose(np.asarray(got["a"], np.float32), p, rtol=2**-7, atol=0)
    assert np.mean(np.asarray(got["a"], np.float32) == p) > 0.9


def test_bfloat16_second_moment_cannot_fall():
    params = {"a": jnp.ones((4,), jnp.bfloat16)}
    grads = [{"a": np.ones(4)}] * 5 + [{"a": np.zeros(4)}] * 50
    _, after_five = run(make_optimizer(RECIPE), params, grads[:5])
    _, at_end = run(make_optimizer(RECIPE), params, grads)
    np.testing.assert_array_equal(np.asarray(at_end.nu["a"]), np.asarray(after_five.nu["a"]))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"warmup_steps": 4}, {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 50: 1.0, 100: 1.0}),
        ({"warmup_steps": 0}, {0: 1.0, 100: 1.0}),
        (
            {"warmup_steps": 20, "schedule": "linear", "decay_steps": 40},
            {10: 0.5, 20: 1.0, 60: 1.0, 80: 0.5, 100: 0.0},
        ),
        ({"warmup_steps": 20, "schedule": "linear"}, {10: 0.5, 20: 1.0, 60: 0.5, 100: 0.0, 200: 0.0}),
        (
            {"warmup_steps": 20, "schedule": "cosine", "final_learning_rate": 2e-4},
            {0: 0.0, 20: 1.0, 40: 0.1 + 0.9 * (0.5 + math.sqrt(0.125)), 60: 0.55, 100: 0.1},
        ),
    ],
)
def test_schedules(settings, wanted):
    schedule = learning_rate_schedule(TrainingConfig(num_steps=100, learning_rate=2e-3, **settings))
    for step, factor in wanted.items():
        np.testing.assert_allclose(schedule(jnp.int32(step)), 2e-3 * factor, rtol=1e-5, atol=1e-10)


def test_parameters_are_needed():
    optimizer = make_optimizer(RECIPE)
    params = {"a": jnp.ones(2)}
    with pytest.raises(ValueError, match="`params` must be given"):
        optimizer.update(params, optimizer.init(params))
