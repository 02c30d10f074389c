"""The sparse attention branch as a layer of your own model: here a small recurrent network.

    python experiments/example_hax_layer.py [--workdir=DIR] [--num_steps=N]

`hax_jax.layers.HaxBranch` maps (b, t, width) to (b, t, width) and needs nothing of Mamba. What a model that
holds one has to do:

1. Make it: `HaxBranch(width, ModelConfig(sparse_arch=..., sparse_keys=..., state_size=...), rngs=rngs)`. Of
   the config only the branch's own fields are read.
2. Say which tokens are padding, by a `Sequence` whose `segment_ids` make them a segment of their own: then
   no query sees them, and the gate loss leaves them out.
3. Draw the branch's random numbers from the call's `key`, another key for each layer.
4. Add `.output` where you want it, and return the `.gate_loss` of all branches summed beside the logits: it
   is the only loss that trains the key scorer. The project's loop adds it with `training.gate_loss_weight`.

With causal routing, the default, an output depends on nothing that comes later.

The network is a GRU whose state is the branch's input: the GRU knows which context and key a value belongs
to, and the branch finds the value again. With the defaults (tables of 2-3 contexts x 2-3 keys, 4 values) it
takes two to three minutes on 2 CPU cores and answers everything right. `example_transformer.py` shows the
same loop with a model that has no branch.
"""

import argparse
import dataclasses
import pathlib
import sys

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hax_jax.config import ConfigError, DataConfig, Experiment, ModelConfig, TrainingConfig
from hax_jax.layers import HaxBranch, Sequence
from hax_jax.ops import segments
from hax_jax.training import TrainingError, train

VOCAB_SIZE = 32
BRANCH = ModelConfig(sparse_arch="sign_bin_lsh+key_selection", sparse_keys=32, num_hash=2, state_size=16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What the loop takes from a model that has a loss of its own."""

    logits: Float[Array, "b t v"]
    gate_loss: Float[Array, ""]


class GRU(nnx.Module):
    """A gated recurrent layer (arXiv 1406.1078) with the reset gate after the product, as cuDNN has it."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.from_input = nnx.Linear(width, 3 * width, rngs=rngs)
        self.from_state = nnx.Linear(width, 3 * width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        def step(h, inputs):
            x_update, x_reset, x_new = jnp.split(inputs, 3, axis=-1)
            h_update, h_reset, h_new = jnp.split(self.from_state(h), 3, axis=-1)
            update = jax.nn.sigmoid(x_update + h_update)
            new = jnp.tanh(x_new + jax.nn.sigmoid(x_reset + h_reset) * h_new)
            h = update * h + (1 - update) * new
            return h, h

        first = jnp.zeros((x.shape[0], x.shape[2]), x.dtype)
        _, states = jax.lax.scan(step, first, self.from_input(x).swapaxes(0, 1))
        return states.swapaxes(0, 1)


class Layer(nnx.Module):
    """x + out(h + branch(h)) with h = gru(norm(x))."""

    def __init__(self, width: int, config: ModelConfig, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.gru = GRU(width, rngs=rngs)
        self.branch = HaxBranch(width, config, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t d"], sequence: Sequence, key: jax.Array | None, train: bool
    ) -> tuple[Float[Array, "b t d"], Float[Array, ""]]:
        hidden = self.gru(self.norm(x))
        draws = self.branch.draw(key, x.shape[0], x.shape[1], train)
        found = self.branch(hidden, sequence, draws=draws, train=train)
        return x + self.out(hidden + found.output), found.gate_loss


class RecurrentModel(nnx.Module):
    """Token embedding, layers of GRU and branch, and an output layer.

    Memory grows with the length, not with its square.

    Args:
      width: of the residual stream, the GRU's state and the branch.
      num_layers: how many.
      branch: the branch's settings.
      rngs: for the initial values.
    """

    def __init__(self, *, width: int = 64, num_layers: int = 2, branch: ModelConfig = BRANCH, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCAB_SIZE, width, rngs=rngs)
        self.layers = nnx.List([Layer(width, branch, rngs=rngs) for _ in range(num_layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, VOCAB_SIZE, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        padding_mask: Bool[Array, "b t"] | None = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> Output:
        ids = jnp.zeros(tokens.shape, jnp.int32)
        segment_ids = None if padding_mask is None else segments.apart(padding_mask, ids)
        sequence = Sequence(padding_mask, segment_ids)
        x = self.embedding(tokens)
        gate_loss = jnp.zeros(())
        for index, layer in enumerate(self.layers):
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x, loss = layer(x, sequence, layer_key, train)
            gate_loss = gate_loss + loss
        return Output(self.out(self.norm(x)), gate_loss)


def experiment(num_steps: int = 1500) -> Experiment:
    """A small joint recall; `model` only says how many token ids there are."""
    return Experiment(
        name="example_hax_layer",
        model=ModelConfig(vocab_size=VOCAB_SIZE),
        data=DataConfig(
            min_n_context=2, max_n_context=3, min_n_key=2, max_n_key=3, n_value=4, n_eval_per_pair=100
        ),
        training=TrainingConfig(
            batch_size=64,
            num_steps=num_steps,
            learning_rate=5e-3,
            warmup_steps=min(100, num_steps - 1),
            schedule="cosine",
            log_every_steps=100,
            eval_every_steps=500,
            checkpoint_every_steps=500,
            eval_batch_size=100,
        ),
    )


def main(arguments: list[str] | None = None) -> int:
    """Trains it and returns the exit status."""
    parser = argparse.ArgumentParser(description="Trains a GRU with HAX branches on joint recall.")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/example_hax_layer"))
    parser.add_argument("--num_steps", type=int, default=1500)
    options = parser.parse_args(arguments)
    try:
        settings = experiment(options.num_steps)
        result = train(settings, options.workdir, model=RecurrentModel(rngs=nnx.Rngs(settings.seed)))
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
