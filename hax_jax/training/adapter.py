"""Any function from tokens to logits as a model that the training loop takes."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hax_jax.data.batch import Batch
from hax_jax.fields import ConfigError


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


def apply(model: nnx.Module, batch: Batch, key: jax.Array, train: bool, **training: Any) -> Any:
    """Calls a model on a batch; one that takes `packing` and `scored` is told of them.

    So is one that takes what `training` holds, of which a value of None is as if it were not there.
    """
    offered = {"packing": batch.packing, "scored": batch.scored, **training}
    taken = _arguments(type(model))
    more = {name: value for name, value in offered.items() if value is not None and name in taken}
    return model(batch.tokens, padding_mask=batch.padding_mask, key=key, train=train, **more)


def check_takes_packed_rows(kind: type) -> None:
    """Raises ConfigError if a class of modules cannot be given packed rows."""
    if "packing" not in _arguments(kind):
        raise ConfigError(
            "data.packing",
            "0 for a model that knows nothing of packed rows",
            kind.__qualname__,
            "leave it at 0, or let the module's __call__ take `packing`, a hax_jax.packing.Packing",
        )


def _arguments(kind: type) -> Collection[str]:
    return inspect.signature(kind.__call__).parameters


def logits_and_gate_loss(output: Any) -> tuple[Float[Array, "b s v"], Float[Array, ""]]:
    """What the loop needs of a model's output: logits in float32 (or wider), and the loss it adds, or 0."""
    logits = getattr(output, "logits", output)
    gate_loss = jnp.asarray(getattr(output, "gate_loss", 0.0), jnp.float32)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), gate_loss
