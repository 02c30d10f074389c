"""Any function from tokens to logits as a model that the training loop takes."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class TokenFunction(nnx.Module):
    """A function of parameters and tokens as a module: logits = function(params, tokens).

    For a pure function `params` is a pytree of float arrays; for a module that takes tokens alone it is
    the module: `TokenFunction(lambda module, tokens: module(tokens), module)`. A function that names
    `padding_mask`, `key` or `train` among its arguments gets them as keywords.

    Args:
      function: from (params, tokens (b, t) int32) to logits (b, t, vocab), or to an object with `.logits`
        and, if something is to be added to the loss, `.gate_loss`.
      params: what is trained, a pytree of arrays or an `nnx.Module`.
    """

    def __init__(self, function: Callable[..., Any], params: Any):
        self.function = function
        arguments = inspect.signature(function).parameters
        self.accepts = tuple(name for name in ("padding_mask", "key", "train") if name in arguments)
        if not isinstance(params, nnx.Module):
            params = nnx.data(jax.tree.map(lambda x: nnx.Param(jnp.asarray(x)), params))
        self.params = params

    def __call__(self, tokens, *, padding_mask=None, key=None, train=False):
        offered = {"padding_mask": padding_mask, "key": key, "train": train}
        params = self.params
        if not isinstance(params, nnx.Module):
            is_param = lambda x: isinstance(x, nnx.Param)  # noqa: E731
            params = jax.tree.map(lambda x: x[...], params, is_leaf=is_param)
        return self.function(params, tokens, **{name: offered[name] for name in self.accepts})


def logits_and_gate_loss(output: Any) -> tuple[Float[Array, "b t v"], Float[Array, ""]]:
    """What the loop needs of a model's output: logits in float32 (or wider), and the loss it adds, or 0."""
    logits = getattr(output, "logits", output)
    gate_loss = jnp.asarray(getattr(output, "gate_loss", 0.0), jnp.float32)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), gate_loss
