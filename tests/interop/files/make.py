"""Makes the files beside it, with PyTorch and safetensors themselves: python tests/interop/files/make.py"""

import collections
import pathlib

import torch
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).resolve().parent


def tensors() -> dict[str, torch.Tensor]:
    """A tensor of every kind that a state dict may hold."""
    base = torch.arange(12.0).reshape(3, 4)
    return {
        "single": base / 7,
        "transposed": base.T,
        "view": base[1:, 2:],
        "double": torch.tensor([1.0, 1 / 3], dtype=torch.float64),
        "half": torch.tensor([0.5, -2.0], dtype=torch.float16),
        "brain": (base / 7).to(torch.bfloat16),
        "count": torch.tensor(5),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }


if __name__ == "__main__":
    torch.save(tensors(), FOLDER / "tensors.pt")
    plain = {name: tensor.contiguous().clone() for name, tensor in tensors().items()}
    save_file(plain, FOLDER / "tensors.safetensors", metadata={"made": "by the package"})
    # A module's state dict has an attribute of its own, and parameters are wrapped.
    module = torch.nn.Linear(2, 3)
    torch.nn.init.constant_(module.weight, 0.25)
    torch.nn.init.constant_(module.bias, -1.0)
    optimizer = torch.optim.AdamW(module.parameters())
    checkpoint = {
        "step": 7,
        "model": module.state_dict(),
        "parameters": collections.OrderedDict(module.named_parameters()),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(checkpoint, FOLDER / "checkpoint.pt")
    torch.save({"model": module.state_dict(), "rate": 0.1}, FOLDER / "one_entry.pt")
    torch.save(module, FOLDER / "whole_module.pt")
    torch.save(tensors(), FOLDER / "before_1_6.pt", _use_new_zipfile_serialization=False)
