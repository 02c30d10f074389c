"""What both frameworks start from: initial weights, batches, random arrays, learning rates.

The arrays have the names of a golden file of group E, so that such a file is one of these too, and what is
written here can be read wherever NumPy is.
"""

import dataclasses
import hashlib
import json
import pathlib
import zipfile
from typing import Any

import jax
import numpy as np

from hax_jax.config import ConfigError, Experiment, ModelConfig
from hax_jax.data import make_split
from hax_jax.interop.golden.files import GoldenError, GoldenFile, model_config
from hax_jax.interop.state_dict import state_dict
from hax_jax.training.initialise import build
from hax_jax.training.optimizer import learning_rate_schedule
from hax_jax.training.state import Purpose

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The common start of both frameworks.

    Attributes:
      name: what the comparison is called.
      origin: where the start comes from, in words.
      model: our model, in parity routing and float32.
      arrays: `init/NAME` under the original's names; `sequences` and `mask` (steps, b, t + 1) uint8; `lr`
        (steps,) float64; `rand/layerI/hash_proj` (steps, n, r) and `rand/layerI/noise` (steps, b, t) float32
        where a layer draws them; `meta_json`.
    """

    name: str
    origin: str
    model: ModelConfig
    arrays: Arrays

    @property
    def num_steps(self) -> int:
        return len(self.arrays["sequences"])

    @property
    def meta(self) -> dict[str, Any]:
        return json.loads(str(self.arrays["meta_json"]))


def comparable(model: ModelConfig) -> ModelConfig:
    """The model as both frameworks can compute it to rounding: parity routing, float32."""
    return dataclasses.replace(model, routing="parity", precision="float32")


def from_experiment(experiment: Experiment, num_steps: int) -> Exchange:
    """The start of a run of this experiment: its initial weights, batches, draws and rates.

    Batches and draws are those that the run itself would take. Memory grows as steps * b * t.
    """
    training = experiment.training
    if training.grad_accumulation_steps != 1:
        raise ConfigError(
            "training.grad_accumulation_steps",
            "1 in a comparison",
            training.grad_accumulation_steps,
            "lower it; the batch can be larger instead",
        )
    if experiment.data.min_vocab_size > 255:
        raise ConfigError(
            "data", "token ids below 256 in a comparison", experiment.data, "use smaller tables"
        )
    experiment = dataclasses.replace(
        experiment,
        model=comparable(experiment.model),
        # The original has no packed rows.
        data=dataclasses.replace(experiment.data, packing=0),
    )
    split = make_split(experiment.data, "train")
    batches = split.iterator(training.batch_size, repeat=True)
    model: Any = build(experiment)
    length = experiment.data.padded_length - 1
    materialize = jax.jit(split.materialize)
    draw = jax.jit(lambda key: model.draw(key, training.batch_size, length, True))
    run_key = jax.random.fold_in(jax.random.key(experiment.seed), Purpose.TRAIN)
    columns: dict[str, list[np.ndarray]] = {}
    for step in range(num_steps):
        batch = materialize(next(batches))
        tokens = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
        mask = np.pad(np.asarray(batch.score_mask), ((0, 0), (0, 1)))
        found = {"sequences": tokens.astype(np.uint8), "mask": mask.astype(np.uint8)}
        key = jax.random.fold_in(jax.random.fold_in(run_key, step), 0)
        for layer, draws in enumerate(draw(key)):
            for name, array in (("hash_proj", draws.projection), ("noise", draws.noise)):
                if array is not None:
                    found[f"rand/layer{layer}/{name}"] = np.asarray(array)
        for name, array in found.items():
            columns.setdefault(name, []).append(array)
    arrays = {name: np.stack(values) for name, values in columns.items()}
    arrays |= {f"init/{name}": x for name, x in state_dict(model).items()}
    schedule = learning_rate_schedule(training)
    arrays["lr"] = np.asarray([float(schedule(step)) for step in range(num_steps)])
    arrays["meta_json"] = np.array(json.dumps(_describe(experiment)))
    origin = f"seed {experiment.seed} of {experiment.name}"
    return Exchange(experiment.name, origin, experiment.model, arrays)


def from_golden(path: pathlib.Path, num_steps: int) -> Exchange:
    """The start of a golden training run; more steps than it has go through its batches and draws again.

    Raises:
      ConfigError: it is no whole golden file of group E.
    """
    try:
        golden = GoldenFile(path)
        meta, own = golden.meta, len(golden["sequences"])
        steps = np.arange(num_steps) % own
        arrays = {f"init/{name}": x for name, x in golden.group("init/").items()}
        for name in ("sequences", "mask", *(n for n in golden.arrays if n.startswith("rand/"))):
            arrays[name] = golden[name][steps]
        # After its warm-up the rate is constant.
        arrays["lr"] = golden["lr"][np.minimum(np.arange(num_steps), own - 1)]
        arrays["meta_json"] = golden["meta_json"]
        model = model_config(meta, "float32")
    except (GoldenError, KeyError) as error:
        raise ConfigError("--golden", "a golden file of group E", str(path), str(error)) from error
    again = f", its {own} batches again and again" if num_steps > own else ""
    return Exchange(path.stem, f"golden file {path.name}{again}", model, arrays)


def _describe(experiment: Experiment) -> dict[str, Any]:
    """`meta_json`: model and optimiser in the original's words."""
    training = experiment.training
    return {
        "base_arch": experiment.model.arch,
        "sparse_arch": "+".join(experiment.model.sources) or None,
        "config": original_config(experiment.model),
        "optimizer": {
            "name": "AdamW",
            "lr": training.learning_rate,
            "weight_decay": training.weight_decay,
            "betas": [training.adam_b1, training.adam_b2],
            "eps": training.adam_eps,
        },
        "warmup_step": training.warmup_steps,
        "gate_loss_weight": training.gate_loss_weight,
    }


def original_config(model: ModelConfig) -> dict[str, Any]:
    """The fields of the original's configuration that describe this model."""
    same = (
        "vocab_size",
        "pad_token_id",
        "hidden_size",
        "state_size",
        "expand",
        "conv_kernel",
        "time_step_rank",
        "time_step_min",
        "time_step_max",
        "time_step_floor",
        "initializer_range",
    )
    fields: dict[str, Any] = {name: getattr(model, name) for name in same}
    fields["num_hidden_layers"] = model.num_layers
    if model.arch == "samba":
        fields |= {
            "norm_eps": model.norm_eps,
            "mlp_size": model.mlp_size,
            "attn": {
                "num_heads": model.attention_heads,
                "window_size": model.attention_window,
                "rope_theta": model.rope_theta,
            },
        }
        return fields
    fields["layer_norm_epsilon"] = model.norm_eps
    if model.arch == "mamba2":
        fields |= {name: getattr(model, name) for name in ("num_heads", "head_dim", "n_groups")}
    if model.sources:
        fields |= {name: getattr(model, name) for name in ("sparse_keys", "num_hash", "data_max_length")}
    return fields


def write(arrays: Arrays, path: pathlib.Path) -> str:
    """Writes an exchange file as a whole; returns its SHA-256, by which a result names it.

    Written again with the same content it has the same bytes.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **{name: arrays[name] for name in sorted(arrays)})
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            "--exchange", "a folder that can be written", str(path.parent), str(error)
        ) from error
    return sha256(path)


def read_result(path: pathlib.Path, digest: str) -> Arrays:
    """What PyTorch wrote for the exchange file of this SHA-256; raises ConfigError if it is of another."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError("result", "a whole .npz file", str(path), f"{error}; delete it") from error
    if str(arrays.get("exchange_sha256")) != digest:
        raise ConfigError(
            "result", "of this exchange file", str(path), "it belongs to another one; delete it and run again"
        )
    return arrays


def sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
