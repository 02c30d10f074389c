"""AdamW as PyTorch computes it, and the learning rate over the steps."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hax_jax.config import TrainingConfig


class AdamWState(NamedTuple):
    """Updates made so far, () int32, and the running means of the gradient and of its square."""

    count: Any
    mu: Any
    nu: Any

    @classmethod
    def begin(cls, params: Any) -> "AdamWState":
        """The state before the first update."""
        zeros = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return cls(jnp.zeros((), jnp.int32), *zeros)


def learning_rate_schedule(training: TrainingConfig, peak: Any = None) -> optax.Schedule:
    """Learning rate by number of updates already made: linear warm-up from 0, then constant or a decay.

    rate(s) = min(1, s / warmup_steps) * decayed(s), where decayed(s) goes from `learning_rate` at
    s = num_steps - decay_steps, or warmup_steps if decay_steps is 0, to `final_learning_rate` at
    s = num_steps along a line or half a cosine, or stays. The first update of a warm-up therefore has rate 0,
    as in the original.

    Args:
      training: the settings `learning_rate`, `warmup_steps`, `schedule`, `final_learning_rate`,
        `decay_steps`, `num_steps`.
      peak: () float32 in place of the setting `learning_rate`, for a program that serves several rates.

    Returns:
      A function from the count, () integer, to the rate, () float32.
    """
    peak = training.learning_rate if peak is None else peak
    floor, warmup = training.final_learning_rate, training.warmup_steps
    decay_steps = training.decay_steps or max(training.num_steps - warmup, 1)
    begin = training.num_steps - decay_steps if training.decay_steps else warmup

    def schedule(count):
        step = jnp.asarray(count, jnp.float32)
        factor = jnp.minimum(1.0, step / warmup) if warmup else jnp.float32(1.0)
        done = jnp.clip((step - begin) / decay_steps, 0.0, 1.0)
        if training.schedule == "linear":
            rate = peak + (floor - peak) * done
        elif training.schedule == "cosine":
            rate = floor + (peak - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        else:
            rate = jnp.asarray(peak, jnp.float32)
        return factor * rate

    return schedule


def make_optimizer(training: TrainingConfig, peak: Any = None) -> optax.GradientTransformation:
    """AdamW with decoupled decay of every parameter, in the order of operations of `torch.optim.AdamW`.

    With rate r, decay w, t = 1, 2, ..: p <- p (1 - r w); m <- m + (1 - b1)(g - m); v <- b2 v + (1 - b2) g^2;
    p <- p - r / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps).

    The moments have their parameter's dtype. Below float32 every intermediate is rounded to that dtype,
    as PyTorch's separate kernels do: with bfloat16 the decay of p and of v is then lost to rounding,
    which is a fault of the original and wanted only for parity.

    Args:
      training: the settings of AdamW and of its schedule.
      peak: as in `learning_rate_schedule`.

    Returns:
      An optax transformation; its updates are float32 for narrower parameters, so that
      `optax.apply_updates` yields exactly the rounded parameter.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, algorithm 2. Memory: two copies of
    the parameters.
    """
    schedule = learning_rate_schedule(training, peak)
    b1, b2, eps = training.adam_b1, training.adam_b2, training.adam_eps
    log_b1, log_b2 = (math.log(b) if b > 0 else -math.inf for b in (b1, b2))

    @jax.named_scope("optimizer")
    def update(grads, state, params=None):
        if params is None:
            raise ValueError("`params` must be given to AdamW's update, got None; its decay needs them")
        rate = schedule(state.count)
        times = (state.count + 1).astype(jnp.float32)
        # 1 - b^t by expm1: the plain difference loses four digits at b2 = 0.999 and small t.
        correction1, correction2 = -jnp.expm1(times * log_b1), -jnp.expm1(times * log_b2)

        def leaf(p, g, m, v):
            work = jnp.promote_types(p.dtype, jnp.float32)
            is_narrow = p.dtype != work
            rounded = functools.partial(_round_to, p.dtype) if is_narrow else lambda x: x
            p, g, m, v = (x.astype(work) for x in (p, g, m, v))
            m_new = rounded(m + (1.0 - b1) * (g - m))
            v_new = rounded(rounded(b2 * v) + (1.0 - b2) * g * g)
            root = rounded(rounded(jnp.sqrt(v_new)) / jnp.sqrt(correction2))
            # Not p * (1 - rate * decay): that factor's own rounding would add up over the steps.
            decay = rate * training.weight_decay * p
            move = rate / correction1 * (m_new / rounded(root + eps))
            if is_narrow:
                return rounded(rounded(p - decay) - move) - p, m_new, v_new
            return -(decay + move), m_new, v_new

        results = jax.tree.map(leaf, params, grads, state.mu, state.nu)
        updates, mu, nu = jax.tree.transpose(jax.tree.structure(params), None, results)
        narrow = lambda moments: jax.tree.map(lambda x, p: x.astype(p.dtype), moments, params)  # noqa: E731
        return updates, AdamWState(state.count + 1, narrow(mu), narrow(nu))

    return optax.GradientTransformation(AdamWState.begin, update)


def _round_to(dtype: Any, x: jax.Array) -> jax.Array:
    """Rounds to a narrower dtype but stays in the wider one."""
    # A cast there and back would be removed by XLA as excess precision; reduce_precision is kept.
    return jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
