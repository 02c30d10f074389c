"""Your own model on joint recall: a small causal transformer trained and scored by the project's loop.

    python experiments/example_transformer.py [--workdir=DIR] [--num_steps=N]

Any `flax.nnx` module works that takes tokens (b, t) int32 and returns logits (b, t, vocab): the loop calls
it as `model(tokens, padding_mask=..., key=..., train=...)`. A plain function of (params, tokens) works too,
wrapped in `hax_jax.training.TokenFunction`. Everything else is an ordinary run: data, validation,
checkpoints, resumption, and the accuracy by table size at the end.

With the defaults (tables of 2-3 contexts x 2-3 keys, 4 values) it takes a few minutes on 2 CPU cores.
"""

import argparse
import pathlib
import sys

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hax_jax.config import ConfigError, DataConfig, Experiment, ModelConfig, TrainingConfig
from hax_jax.training import TrainingError, train

VOCAB_SIZE = 32


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"], visible: Bool[Array, "b 1 t t"]) -> Float[Array, "b t d"]:
        b, t, d = x.shape
        q, k, v = jnp.split(self.qkv(self.attention_norm(x)), 3, axis=-1)
        q, k, v = (y.reshape(b, t, self.num_heads, d // self.num_heads) for y in (q, k, v))
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, mask=visible).reshape(b, t, d))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """Token and position embeddings, causal blocks, and the token embedding as output layer.

    Memory grows with the square of the length, as the attention mask does.
    """

    def __init__(
        self, length: int, *, width: int = 64, num_heads: int = 4, num_layers: int = 2, rngs: nnx.Rngs
    ):
        self.tokens = nnx.Embed(VOCAB_SIZE, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, num_heads, rngs=rngs) for _ in range(num_layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        padding_mask: Bool[Array, "b t"] | None = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> Float[Array, "b t v"]:
        b, t = tokens.shape
        x = self.tokens(tokens) + self.positions(jnp.arange(t))
        visible = jnp.tril(jnp.ones((t, t), bool))[None, None]
        for block in self.blocks:
            x = block(x, jnp.broadcast_to(visible, (b, 1, t, t)))
        return self.tokens.attend(self.norm(x))


def experiment(num_steps: int = 3000) -> Experiment:
    """A small joint recall; `model` only says how many token ids there are."""
    return Experiment(
        name="example_transformer",
        model=ModelConfig(vocab_size=VOCAB_SIZE),
        data=DataConfig(
            min_n_context=2, max_n_context=3, min_n_key=2, max_n_key=3, n_value=4, n_eval_per_pair=100
        ),
        training=TrainingConfig(
            batch_size=64,
            num_steps=num_steps,
            learning_rate=3e-3,
            warmup_steps=min(200, num_steps - 1),
            schedule="cosine",
            log_every_steps=100,
            eval_every_steps=500,
            checkpoint_every_steps=500,
            eval_batch_size=100,
        ),
    )


def main(arguments: list[str] | None = None) -> int:
    """Trains it and returns the exit status."""
    parser = argparse.ArgumentParser(description="Trains a small transformer on joint recall.")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/example_transformer"))
    parser.add_argument("--num_steps", type=int, default=3000)
    options = parser.parse_args(arguments)
    try:
        settings = experiment(options.num_steps)
        model = Transformer(settings.data.padded_length - 1, rngs=nnx.Rngs(settings.seed))
        result = train(settings, options.workdir, model=model)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if result.test_accuracy is None:
        return 143
    print(f"test accuracy: {100 * result.test_accuracy:.2f}%")
    return 0


if __name__ == "__main__":
    sys.exit(main())
