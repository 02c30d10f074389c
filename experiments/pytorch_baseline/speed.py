"""A training step that is ready to be timed, as the original trains: bfloat16, weights and AdamW included."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from experiments.pytorch_baseline.training import build, make_optimizer


class TimedStep:
    """One training step after the other on one batch, new random numbers in each.

    Args:
      meta: the description in an exchange file.
      tokens, targets, score_mask, padding_mask: (b, t) each.
      device: 'cuda' or 'cpu'.

    Attributes:
      used: which form of each operation is used, in words.
    """

    def __init__(
        self,
        meta: Mapping[str, Any],
        tokens: np.ndarray,
        targets: np.ndarray,
        score_mask: np.ndarray,
        padding_mask: np.ndarray,
        device: str,
    ):
        self._device = torch.device(device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._model, kernels = build(meta, None, self._device, torch.bfloat16, installed_kernels=True)
        self.used = kernels.used
        self._optimizer = make_optimizer(self._model, meta)
        self._optimizer.param_groups[0]["lr"] = meta["optimizer"]["lr"]
        self._weight = meta["gate_loss_weight"]
        self._tokens, self._targets = (
            torch.tensor(x, dtype=torch.int64, device=self._device) for x in (tokens, targets)
        )
        # Chosen once and not by a mask in each step, which would make the host wait for the device.
        self._scored = torch.tensor(np.flatnonzero(score_mask), device=self._device)
        self._real = torch.tensor(padding_mask, dtype=torch.bool, device=self._device)

    def step(self) -> None:
        """Queues one training step."""
        output = self._model(self._tokens, self._real, train=True)
        logits = output.logits.flatten(0, 1)[self._scored].float()
        loss = torch.nn.functional.cross_entropy(logits, self._targets.flatten()[self._scored])
        self._optimizer.zero_grad(set_to_none=True)
        (loss + self._weight * output.gate_loss).backward()
        self._optimizer.step()

    def wait(self) -> None:
        """Returns when every queued step is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """The most memory that tensors took since this was made; 0 where PyTorch does not count it."""
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else 0


def default_device() -> str:
    """'cuda' where there is a GPU that PyTorch can use."""
    return "cuda" if torch.cuda.is_available() else "cpu"
