"""What Samba adds to Mamba: sliding-window attention and a gated MLP."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hax_jax.config import ModelConfig
from hax_jax.layers.linear import Linear
from hax_jax.layers.precision import Precision
from hax_jax.layers.sequence import Keep, Sequence
from hax_jax.ops import KeySet, SlidingWindow, segments, sparse_attention
from hax_jax.ops.numerics import wide


def rotary(x: Float[Array, "b t h p"], position: Int[Array, "b t"], theta: float) -> Float[Array, "b t h p"]:
    """Turns feature f and feature f + p/2 together by the angle position theta^(-2 f / p).

    Source: RoFormer (arXiv 2104.09864), in the half-split pairing.
    """
    width, dtype = x.shape[-1], wide(x.dtype)
    # The tables are float32 whatever x is, as in the original: far along a sequence that shows.
    frequency = 1 / theta ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = position[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class WindowAttention(nnx.Module):
    """Softmax attention to oneself and the `attention_window` - 1 positions before; zeros at pads.

    Args:
      config: `hidden_size`, `attention_heads`, `attention_window`, `rope_theta`, precision.
      rngs: `rngs.params()` gives the initial values' keys.

    Source: Samba (arXiv 2406.07522), section 2. Memory as `ops.sparse_attention`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.precision = Precision.named(config.precision)
        size = config.hidden_size
        settings: dict[str, Any] = {
            "scale": config.initializer_range,
            "precision": self.precision,
            "rngs": rngs,
        }
        self.q_proj = Linear(size, size, **settings)
        self.k_proj = Linear(size, size, **settings)
        self.v_proj = Linear(size, size, **settings)
        self.o_proj = Linear(size, size, **settings)

    @jax.named_scope("mixer")
    def __call__(
        self, x: Float[Array, "b t d"], sequence: Sequence, *, keep: Keep | None = None
    ) -> Float[Array, "m s d"]:
        """Attends within x; `keep` picks the positions that are wanted, of which none may be a pad."""
        batch, length, size = x.shape
        heads = self.config.attention_heads
        ids = sequence.segment_ids
        if sequence.padding_mask is not None:
            # Pads are no keys: they stand in segments of their own.
            ids = segments.apart(sequence.padding_mask, segments.as_array(ids, (batch, length)))
        position = segments.positions(segments.as_array(ids, (batch, length)))

        def split_heads(y):
            return y.reshape(batch, length, heads, size // heads)

        matmul = self.precision.matmul
        q, k = (
            rotary(split_heads(proj(x)), position, self.config.rope_theta).astype(matmul)
            for proj in (self.q_proj, self.k_proj)
        )
        attended = sparse_attention(
            q,
            k,
            split_heads(self.v_proj(x)).astype(matmul),
            KeySet((SlidingWindow(self.config.attention_window),)),
            segment_ids=ids,
            implementation=self.config.op_implementation,
        )
        attended = attended.reshape(batch, length, size)
        if keep is not None:
            return self.o_proj(keep(attended))
        return sequence.hide_pads(self.o_proj(attended))


class SwiGLU(nnx.Module):
    """(SiLU(x W_gate) x W_up) W_down, after Shazeer (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        settings: dict[str, Any] = {
            "scale": config.initializer_range,
            "precision": Precision.named(config.precision),
            "rngs": rngs,
        }
        self.gate_proj = Linear(config.hidden_size, config.mlp_size, **settings)
        self.up_proj = Linear(config.hidden_size, config.mlp_size, **settings)
        self.down_proj = Linear(config.mlp_size, config.hidden_size, **settings)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
