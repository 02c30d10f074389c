"""What the attention benchmark times: the sparse module, whole layers, and what they are held against."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.attention_inputs import Inputs
from benchmarks.specs import AttentionShape
from hax_jax import ops
from hax_jax.config import ModelConfig
from hax_jax.layers import HaxBranch, Mamba2, RoutingDraws
from hax_jax.layers.sequence import Sequence
from hax_jax.ops import dispatch
from hax_jax.ops.key_selection import IMPLEMENTATIONS as SELECTION_FORMS
from hax_jax.ops.lsh import IMPLEMENTATIONS as HASHING_FORMS
from hax_jax.ops.sparse_attention import IMPLEMENTATIONS as ATTENTION_FORMS
from hax_jax.ops.sparse_attention import dense

CUDNN = "cudnn"
# Every key there is under a mask: all at once, and a tile of queries at a time.
DENSE, DENSE_TILES = "reference", "dense_tiles"
# The ops' own choice for the shape and the device.
AUTO = "auto"
DIRECTIONS = ("forward", "forward_backward")


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of one set of inputs, and what it takes from them.

    Attributes:
      function: to be compiled.
      arguments: from `Inputs` to the function's arguments.
      out_bytes: bytes of one number of its output.
    """

    function: Callable[..., Any]
    arguments: Callable[[Inputs], tuple]
    out_bytes: int


def implementations() -> tuple[str, ...]:
    """The named forms of sparse attention whose cost is linear and that run here, the fastest last."""
    cannot = {DENSE} if dispatch.missing_for_mosaic_gpu() is None else {DENSE, "mosaic_gpu"}
    return tuple(name for name in ATTENTION_FORMS if name not in cannot)


def visible_keys(
    q: jax.Array, k: jax.Array, scores: jax.Array, projection: jax.Array, size: int, implementation: str
) -> ops.KeySet:
    """Hashes, numbers the buckets, ranks: the key set of LSH and key selection, `size` keys of each.

    The integer ops take the named form where they have it, else their own choice.
    """
    codes = [ops.sign_hash(x.astype(jnp.float32), projection) for x in (q, k)]
    chosen = functools.partial(_form, implementation=implementation)
    num_codes = 1 << projection.shape[1]
    count, order = ops.bucket_orders(*codes, num_codes=num_codes, implementation=chosen(HASHING_FORMS))
    expiry, alive = ops.key_lifetimes_and_alive(scores, size, implementation=chosen(SELECTION_FORMS))
    buckets = ops.HashBuckets(size, codes[0], count, codes[1], order, num_codes)
    return ops.KeySet((buckets, ops.Lifetimes(size, expiry, alive)))


def sparse_module(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scores: jax.Array,
    projection: jax.Array,
    *,
    size: int,
    implementation: str,
) -> jax.Array:
    """The whole module: which keys, and attending to them; (b, t, n), (b, t, n), (b, t, e) -> (b, t, e)."""
    key_set = visible_keys(*jax.lax.stop_gradient((q, k, scores)), projection, size, implementation)
    head = lambda x: x[:, :, None]  # noqa: E731
    if implementation == DENSE_TILES:
        scale = q.shape[-1] ** -0.5
        return dense.sparse_attention(head(q), head(k), head(v), key_set, None, scale, False)[:, :, 0]
    form = None if implementation == AUTO else implementation
    return ops.sparse_attention(head(q), head(k), head(v), key_set, implementation=form)[:, :, 0]


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's causal attention over all keys."""
    head = lambda x: x[:, :, None]  # noqa: E731
    out = jax.nn.dot_product_attention(head(q), head(k), head(v), is_causal=True, implementation="cudnn")
    return out[:, :, 0]


def program(contender: str, shape: AttentionShape, direction: str) -> Program:
    """What to time for 'cudnn', 'branch', 'mamba2' or a form of the sparse module."""
    if contender in ("branch", "mamba2"):
        return _layer_program(contender, shape, direction)
    if contender == CUDNN:
        function: Callable[..., Any] = full_attention
        take: Callable[[Inputs], tuple] = lambda x: (x.q, x.k, x.v)  # noqa: E731
        out_dtype = jnp.dtype(jnp.bfloat16)
    else:
        function = functools.partial(sparse_module, size=shape.keys_per_source, implementation=contender)
        take = lambda x: (x.q, x.k, x.v, x.scores, x.projection)  # noqa: E731
        out_dtype = jnp.dtype(jnp.float32)
    if direction == "forward":
        return Program(function, take, out_dtype.itemsize)
    return Program(
        _with_gradients(function), lambda x: (x.d_out.astype(out_dtype), *take(x)), out_dtype.itemsize
    )


def _with_gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """From the output's gradient and the arguments to the output and the gradients of q, k and v."""

    def forward_backward(d_out, q, k, v, *rest):
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, *rest), q, k, v)
        return out, *pull(d_out)

    return forward_backward


def _layer_program(name: str, shape: AttentionShape, direction: str) -> Program:
    """A layer in training: output and gate loss, and the gradients of its parameters and of its input."""
    layer, width = _layer(name, shape)
    graphdef, *(params, rest) = nnx.split(layer, nnx.Param, ...)

    def forward(params, rest, x, noise):
        module = nnx.merge(graphdef, params, rest)
        draws = RoutingDraws(noise=noise)
        if name == "branch":
            result = module(x, draws=draws, train=True)
            return result.output, result.gate_loss
        out, result = module(x, Sequence(), draws=draws, train=True)
        return out, result.gate_loss

    def forward_backward(d_out, params, rest, x, noise):
        def loss(params, x):
            out, gate_loss = forward(params, rest, x, noise)
            return (out * d_out).sum() + gate_loss, out

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return out, gradients

    def take(x: Inputs) -> tuple:
        # Values are as wide as the layer; the noise that samples keys is uniform like the scores' order.
        given = (params, rest, _as_wide(x.v, width), jax.random.uniform(jax.random.key(1), x.scores.shape))
        return given if direction == "forward" else (_as_wide(x.d_out, width), *given)

    return Program(forward if direction == "forward" else forward_backward, take, 4)


def _layer(name: str, shape: AttentionShape) -> tuple[nnx.Module, int]:
    """The HAX branch of the shape's width, or a whole Mamba-2 mixer whose inner width that is; its width."""
    width = shape.value_width
    config = ModelConfig(
        arch="mamba2",
        hidden_size=width // 2,
        state_size=shape.key_width,
        num_heads=width // 16,
        head_dim=16,
        sparse_arch="sign_bin_lsh+key_selection",
        sparse_keys=shape.sparse_keys,
        num_hash=shape.num_hash,
        data_max_length=shape.length,
    )
    rngs = nnx.Rngs(0)
    if name == "branch":
        return HaxBranch(width, config, rngs=rngs), width
    return Mamba2(config, rngs=rngs), config.hidden_size


def _as_wide(x: jax.Array, width: int) -> jax.Array:
    return x[..., :width].astype(jnp.float32)


def _form(available: dict[str, Callable], implementation: str) -> str | None:
    return implementation if implementation in available else None
