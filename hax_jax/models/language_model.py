"""Tokens to logits: embedding, blocks of [norm, mixer, residual], norm, and the embedding as output layer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hax_jax.config import ConfigError, ModelConfig
from hax_jax.layers import (
    BranchOutput,
    Embedding,
    Mamba,
    Mamba2,
    Precision,
    RMSNorm,
    RoutingDraws,
    Sequence,
    SwiGLU,
    WindowAttention,
)
from hax_jax.layers.routing import RULES
from hax_jax.layers.sequence import Keep
from hax_jax.ops import dispatch
from hax_jax.packing import Packing, ScoredPositions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOutput:
    """One block: what its mixer added to the residual stream where wanted, and its sparse branch's work."""

    mixer: jax.Array
    branch: BranchOutput | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What a model computed; `hidden` and `layers` are there to be looked at.

    Attributes:
      logits: (b, t, vocab), at least float32; (m, s, vocab) where only scored positions were asked for.
      gate_loss: scalar, the layers' gate losses summed; 0 outside training.
      hash_loss: scalar, the layers' hash losses summed; 0 where they were not asked for.
      hidden: (b, t, d), or (m, s, d) likewise, the output of the last norm.
      layers: one `LayerOutput` a block.
    """

    logits: jax.Array
    gate_loss: jax.Array
    hash_loss: jax.Array
    hidden: jax.Array
    layers: tuple[LayerOutput, ...]


class Block(nnx.Module):
    """x + mixer(norm(x)), and in Samba + mlp(norm(.)) after it."""

    def __init__(self, config: ModelConfig, index: int, *, rngs: nnx.Rngs):
        norm: dict[str, Any] = {"eps": config.norm_eps, "precision": Precision.named(config.precision)}
        self.norm = RMSNorm(config.hidden_size, **norm)
        self.mixer = _make_mixer(config, index, rngs)
        self.arch, self.routing = config.arch, config.routing
        self.has_mlp = config.arch == "samba"
        if self.has_mlp:
            self.mlp_norm = RMSNorm(config.hidden_size, **norm)
            self.mlp = SwiGLU(config, rngs=rngs)

    @jax.named_scope("block")
    def __call__(
        self,
        x: Float[Array, "b t d"],
        sequence: Sequence,
        draws: RoutingDraws | None,
        train: bool,
        keep: Keep | None = None,
    ) -> tuple[Float[Array, "m s d"], LayerOutput]:
        branch = None
        if isinstance(self.mixer, WindowAttention):
            mixed = self.mixer(self.norm(x), sequence, keep=keep)
        else:
            mixed, branch = self.mixer(self.norm(x), sequence, draws=draws, train=train, keep=keep)
        if keep is not None:
            x = keep(x)
        x = RULES[self.routing].residual(x, self.arch) + mixed
        if self.has_mlp:
            x = x + self.mlp(self.mlp_norm(x))
        return x, LayerOutput(mixed, branch)


def _make_mixer(config: ModelConfig, index: int, rngs: nnx.Rngs) -> nnx.Module:
    if config.arch == "mamba2":
        return Mamba2(config, rngs=rngs)
    # Samba alternates: Mamba, attention, Mamba, attention, ...
    if config.arch == "samba" and index % 2 == 1:
        return WindowAttention(config, rngs=rngs)
    return Mamba(config, rngs=rngs)


class LanguageModel(nnx.Module):
    """A stack of blocks between an embedding and the same embedding as output layer.

    Args:
      config: the architecture.
      rngs: `rngs.params()` gives the initial values' keys.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        precision = Precision.named(config.precision)
        self.embeddings = Embedding(
            config.vocab_size,
            config.hidden_size,
            scale=config.initializer_range,
            precision=precision,
            rngs=rngs,
        )
        self.layers = nnx.List([Block(config, index, rngs=rngs) for index in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, precision=precision)

    def draw(
        self, key: jax.Array | None, batch: int, length: int, train: bool, hash_loss: bool = False
    ) -> tuple[RoutingDraws, ...]:
        """Draws every layer's random arrays for one call; layer i uses `key` folded with i."""
        draws = []
        for index, layer in enumerate(self.layers):
            branch = getattr(layer.mixer, "hax", None)
            if branch is None:
                draws.append(RoutingDraws())
            else:
                layer_key = None if key is None else jax.random.fold_in(key, index)
                draws.append(branch.draw(layer_key, batch, length, train, hash_loss))
        return tuple(draws)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        padding_mask: Bool[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        packing: Packing | None = None,
        scored: ScoredPositions | None = None,
        key: jax.Array | None = None,
        draws: tuple[RoutingDraws, ...] | None = None,
        train: bool = False,
        hash_bits: Int[Array, ""] | None = None,
        hash_loss: bool = False,
    ) -> ModelOutput:
        """Predicts the token after each position.

        Args:
          tokens: (b, t) ids below `vocab_size`; larger ones are undefined, since a compiled program cannot
            raise (the data pipeline checks them before).
          padding_mask: (b, t) True at real tokens; None where all are. Outputs at pads mean nothing.
          segment_ids: (b, t) for several sequences a row, with causal routing.
          packing: for packed items, with any routing, in place of `padding_mask` and `segment_ids`. The gate
            loss samples keys of each item, as it does in padded rows.
          scored: compute logits at these positions only, and with them all that follows the last mixer.
          key: feeds what is random in the call: the gate loss's sampling in training, and with parity routing
            the hash projections. Not needed otherwise.
          draws: those random arrays themselves, instead of `key`.
          train: whether to compute the gate loss.
          hash_bits: how many of a sign code's bits count; None: all of them.
          hash_loss: whether to compute the hash loss, with causal routing, for which `key` is needed too.

        Returns:
          A `ModelOutput`.

        Raises:
          ValueError: random numbers are needed and neither `key` nor `draws` is given; segment ids or a
            single packed item with parity routing; shapes that do not fit.
        """
        rule = RULES[self.config.routing]
        sequence = rule.make_sequence(padding_mask, segment_ids, packing, self.config.arch)
        if draws is None:
            batch, length = tokens.shape
            if packing is not None:
                batch, length = packing.num_items, packing.padded_length
            draws = self.draw(key, batch, length, train, hash_loss)
        if hash_bits is not None:
            draws = tuple(dataclasses.replace(draw, hash_bits=hash_bits) for draw in draws)
        x = self.embeddings(tokens)
        # After the last mixer has looked along time, nothing sees another position.
        keep = None if scored is None else functools.partial(scored.take, packing=packing)
        layers = []
        for index, (layer, layer_draws) in enumerate(zip(self.layers, draws, strict=True)):
            is_last = index == len(self.layers) - 1
            x, output = layer(x, sequence, layer_draws, train, keep if is_last else None)
            layers.append(output)
        hidden = self.norm(x)
        branches = [output.branch for output in layers if output.branch is not None]
        gate_loss = sum((branch.gate_loss for branch in branches), start=jnp.zeros(()))
        hash_losses = (branch.hash_loss for branch in branches if branch.hash_loss is not None)
        return ModelOutput(
            self.embeddings.attend(hidden),
            gate_loss,
            sum(hash_losses, start=jnp.zeros(())),
            hidden,
            tuple(layers),
        )


def build_model(config: ModelConfig, *, rngs: nnx.Rngs) -> LanguageModel:
    """Builds the model that `config` describes, with the original's initial values.

    Raises:
      ConfigError: kernels were asked for by name on a device that cannot run them.
    """
    missing = dispatch.missing_for_mosaic_gpu() if config.implementation == "mosaic_gpu" else None
    if missing is not None:
        expected = "'auto', 'xla' or 'reference' on this device"
        raise ConfigError("model.implementation", expected, f"'mosaic_gpu', which {missing}", "use 'auto'")
    return LanguageModel(config, rngs=rngs)
