"""A run small enough for any test: tables of 1-2 contexts and keys, and a model that uses every feature."""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from hax_jax.config import DataConfig, Experiment, ModelConfig, TrainingConfig
from hax_jax.training.checkpoints import Checkpoints
from hax_jax.training.metrics import TIMING_FIELDS, read_metrics

ROOT = pathlib.Path(__file__).parents[2]
VOCAB_SIZE = 20
DATA = DataConfig(min_n_context=1, max_n_context=2, min_n_key=1, max_n_key=2, n_value=2, n_eval_per_pair=3)


class RunningMean(nnx.Variable):
    """State that training changes and gradients do not."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TinyOutput:
    logits: jax.Array
    gate_loss: jax.Array


class TinyModel(nnx.Module):
    """Sees this token, the last and the mean of all before; has noise, a loss of its own and a statistic."""

    def __init__(self, seed: int = 0, width: int = 8, dtype: Any = jnp.float32, noise: float = 0.1):
        keys = jax.random.split(jax.random.key(seed), 3)
        self.embedding = nnx.Param(jax.random.normal(keys[0], (VOCAB_SIZE, width), dtype))
        self.inner = nnx.Param(0.3 * jax.random.normal(keys[1], (3 * width, width), dtype))
        self.outer = nnx.Param(0.3 * jax.random.normal(keys[2], (width, VOCAB_SIZE), dtype))
        self.mean = RunningMean(jnp.zeros((width,), jnp.float32))
        self.noise = noise

    def __call__(self, tokens, *, padding_mask=None, key=None, train=False):
        x = self.embedding[...][tokens] * padding_mask[..., None].astype(self.embedding.dtype)
        last = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        past = jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        hidden = jnp.tanh(jnp.concatenate([x, last, past], axis=-1) @ self.inner[...])
        if train:
            hidden = hidden + self.noise * jax.random.normal(key, hidden.shape, hidden.dtype)
            mean = hidden.astype(jnp.float32).mean((0, 1))
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * mean
        gate_loss = jnp.mean(jnp.square(self.inner[...])) if train else 0.0
        return TinyOutput(hidden @ self.outer[...], jnp.asarray(gate_loss, jnp.float32))


def tiny_hax_model(**changes: Any) -> ModelConfig:
    """A model with every discrete decision: hash codes and key selection; keywords change its settings."""
    settings = {
        "arch": "mamba2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 8,
        "num_layers": 1,
        "state_size": 4,
        "num_heads": 2,
        "head_dim": 8,
        "chunk_size": 8,
        "sparse_arch": "sign_bin_lsh+key_selection",
        "sparse_keys": 4,
        "num_hash": 2,
    }
    return ModelConfig(**{**settings, **changes})


def tiny_experiment(seed: int = 0, data: DataConfig = DATA, **training: Any) -> Experiment:
    """An experiment of a few steps; keywords are settings of `TrainingConfig`."""
    settings = {
        "batch_size": 8,
        "num_steps": 12,
        "learning_rate": 0.02,
        "warmup_steps": 2,
        "log_every_steps": 2,
        "eval_every_steps": 4,
        "checkpoint_every_steps": 3,
        "eval_batch_size": 8,
        "tensorboard": False,
    }
    return Experiment(
        name="tiny",
        seed=seed,
        model=ModelConfig(vocab_size=VOCAB_SIZE),
        data=data,
        training=TrainingConfig(**{**settings, **training}),
    )


@contextlib.contextmanager
def full_disk_at(step: int) -> Iterator[None]:
    """Within it the checkpoint of that step, but not the best one, finds no room."""
    write = Checkpoints._write

    def write_if_there_is_room(checkpoints, at, *arguments):
        if checkpoints.folder.name == "checkpoints" and at == step:
            raise OSError(28, "No space left on device")
        write(checkpoints, at, *arguments)

    with mock.patch.object(Checkpoints, "_write", write_if_there_is_room):
        yield


def lines_without_timing(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What two runs of the same bits have in common in metrics.jsonl."""
    return [
        {name: value for name, value in line.items() if name not in TIMING_FIELDS}
        for line in read_metrics(workdir)
    ]


def start_python(
    code: str, *arguments: str, devices: int = 1, cache: pathlib.Path | None = None, quickly: bool = False
):
    """Starts a Python process on `devices` simulated CPU devices, with the project importable.

    With `quickly` it compiles as tests.compilation.quickly does.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quickly)),
    }
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_script(path: str, *arguments: str, devices: int = 1, timeout: float = 580) -> str:
    """The last line that a script of the project prints on so many simulated devices."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    process = start_python(code, path, *arguments, devices=devices)
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors[-3000:]
    return output.splitlines()[-1]
