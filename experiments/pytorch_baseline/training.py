"""Training steps from an exchange file: its initial weights, batches, random arrays and learning rates.

A golden file of group E is such a file.
"""

import json
import pathlib
import platform
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from experiments.pytorch_baseline.attention import Draws
from experiments.pytorch_baseline.kernels import Kernels
from experiments.pytorch_baseline.models import LanguageModel
from experiments.pytorch_baseline.settings import Settings

Arrays = Mapping[str, np.ndarray]


def build(
    meta: Mapping[str, Any],
    weights: Arrays | None,
    device: torch.device,
    dtype: torch.dtype,
    installed_kernels: bool = False,
) -> tuple[LanguageModel, Kernels]:
    """The model that a file describes, with the given weights under the original's names.

    Raises:
      RuntimeError: weights are missing, extra or of another shape; PyTorch's message names them.
    """
    kernels = Kernels(installed_kernels, device, dtype)
    model = LanguageModel(Settings.from_meta(meta), kernels).to(device, dtype)
    if weights is not None:
        model.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in weights.items()})
    return model, kernels


def group(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    """Arrays whose names start with `prefix`, by the rest of the name."""
    return {name[len(prefix) :]: x for name, x in arrays.items() if name.startswith(prefix)}


def losses(logits, targets, score_mask):
    """Cross-entropy averaged over scored positions, and accuracy as the mean of the rows' accuracies."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = F.cross_entropy(logits[score_mask].to(wide), targets[score_mask])
    with torch.no_grad():
        right = (logits.argmax(-1) == targets) & score_mask
        accuracy = (right.sum(-1) / score_mask.sum(-1).clamp(min=1)).mean()
    return loss, accuracy


def make_optimizer(model: LanguageModel, meta: Mapping[str, Any]) -> torch.optim.AdamW:
    """AdamW with decoupled decay of every parameter; the rate is set step by step."""
    wanted = meta["optimizer"]
    return torch.optim.AdamW(
        model.parameters(),
        lr=0.0,
        betas=tuple(wanted["betas"]),
        eps=wanted["eps"],
        weight_decay=wanted["weight_decay"],
    )


class Exchange:
    """What a file holds for training.

    Args:
      arrays: `sequences` and `mask` (steps, b, t + 1), `lr` (steps,), `init/NAME`, `rand/layerI/hash_proj`
        (steps, n, r), `rand/layerI/noise` (steps, b, t), `meta_json`.
    """

    def __init__(self, arrays: Arrays):
        self.arrays = arrays
        self.meta: dict[str, Any] = json.loads(str(arrays["meta_json"]))
        self.num_steps = len(arrays["sequences"])
        self.num_layers = self.meta["config"]["num_hidden_layers"]

    def batch(self, step: int, device: torch.device):
        """tokens, targets, score_mask, padding_mask of one step, (b, t) each."""
        sequences = torch.from_numpy(self.arrays["sequences"][step].astype(np.int64)).to(device)
        mask = torch.from_numpy(self.arrays["mask"][step].astype(bool)).to(device)
        tokens = sequences[:, :-1]
        return tokens, sequences[:, 1:], mask[:, :-1], tokens != self.meta["config"]["pad_token_id"]

    def draws(self, step: int, device: torch.device, dtype: torch.dtype) -> list[Draws]:
        """The random arrays of one step, a `Draws` a layer."""
        return [
            Draws(*(self._random(layer, name, step, device, dtype) for name in ("hash_proj", "noise")))
            for layer in range(self.num_layers)
        ]

    def _random(self, layer, name, step, device, dtype):
        array = self.arrays.get(f"rand/layer{layer}/{name}")
        return None if array is None else torch.from_numpy(np.array(array[step])).to(device, dtype)


def decisions(layers: Iterable[dict | None], valid: torch.Tensor) -> dict[str, np.ndarray]:
    """The discrete decisions of one forward pass as integers, -1 where they mean nothing.

    Per layer: `query_code` and `key_code` (b, t); `lifetime` (b, t), how many of the real queries see a key
    through key selection; `ranking` (b, k), the positions sampled for the gate loss, best target first.
    """
    found = {}
    for index, layer in enumerate(layers):
        if layer is None:
            continue
        for name, array in (("query_code", "query_bin"), ("key_code", "key_bin")):
            if array in layer:
                found[f"layer{index}/{name}"] = layer[array].masked_fill(~valid, -1)
        if "selected" in layer:
            count = (layer["selected"] & valid[:, :, None]).sum(1)
            found[f"layer{index}/lifetime"] = count.masked_fill(~valid, -1)
        if "sampled" in layer:
            order = layer["selected_target"].argsort(dim=1, descending=True, stable=True)
            found[f"layer{index}/ranking"] = layer["sampled"].gather(1, order)
    return {name: x.to(torch.int32).cpu().numpy() for name, x in found.items()}


def train(
    arrays: Arrays,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    installed_kernels: bool = False,
) -> dict[str, np.ndarray]:
    """Takes every step of an exchange file.

    Returns:
      `loss`, `gate_loss`, `acc` (steps,) as they were before each update; `final/NAME`, the weights after
      the last; `decisions/layerI/NAME` with a leading axis of steps; `info_json`, where and how it ran.
    """
    device = torch.device(device)
    # A GPU's convolutions use TF32 by default, its matrix products do not.
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    exchange = Exchange(arrays)
    model, kernels = build(exchange.meta, group(arrays, "init/"), device, dtype, installed_kernels)
    optimizer = make_optimizer(model, exchange.meta)
    curves: dict[str, list] = {"loss": [], "gate_loss": [], "acc": []}
    decided: dict[str, list[np.ndarray]] = {}
    for step in range(exchange.num_steps):
        tokens, targets, score_mask, padding_mask = exchange.batch(step, device)
        draws = exchange.draws(step, device, dtype)
        output = model(tokens, padding_mask, draws=draws, train=True, collect=True)
        loss, accuracy = losses(output.logits, targets, score_mask)
        optimizer.param_groups[0]["lr"] = float(arrays["lr"][step])
        optimizer.zero_grad(set_to_none=True)
        (loss + exchange.meta["gate_loss_weight"] * output.gate_loss).backward()
        optimizer.step()
        for name, value in (("loss", loss), ("gate_loss", output.gate_loss), ("acc", accuracy)):
            curves[name].append(float(value.detach()))
        for name, array in decisions(output.layers, padding_mask).items():
            decided.setdefault(name, []).append(array)
    results = {name: np.asarray(values) for name, values in curves.items()}
    results |= {f"decisions/{name}": np.stack(found) for name, found in decided.items()}
    wide = torch.promote_types(dtype, torch.float32)
    results |= {f"final/{name}": x.detach().to(wide).cpu().numpy() for name, x in model.state_dict().items()}
    results["info_json"] = np.array(json.dumps(describe(device, dtype, kernels)))
    return results


def describe(device: torch.device, dtype: torch.dtype, kernels: Kernels) -> dict[str, Any]:
    """Where and how a model ran."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type}: {kind}",
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": kernels.used,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, without pickle."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
