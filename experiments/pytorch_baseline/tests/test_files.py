"""The project's readers and writers of weights against PyTorch and safetensors themselves."""

import pathlib
import runpy

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hax_jax.interop import safetensors_file, torch_file
from hax_jax.interop.files import read_weights

# By its path: `tests` is this folder's name, too.
_MAKE = pathlib.Path(__file__).resolve().parents[3] / "tests" / "interop" / "files" / "make.py"
tensors = runpy.run_path(str(_MAKE))["tensors"]
FORMATS = (".pt", ".safetensors")


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    values = generator.standard_normal((3, 5)).astype(np.float32)
    return {
        "layers.0.weight": values,
        "double": values.astype(np.float64),
        "brain": values.astype(ml_dtypes.bfloat16),
        "scalar": np.array(3),
        "empty": np.zeros((0, 2), np.float16),
    }


@pytest.mark.parametrize("ending", FORMATS)
def test_the_packages_read_what_is_written(tmp_path, ending):
    path = tmp_path / f"w{ending}"
    to_bytes = torch_file.to_bytes if ending == ".pt" else lambda x: safetensors_file.to_bytes(x, {"a": "b"})
    path.write_bytes(to_bytes(arrays()))
    loaded = torch.load(path, weights_only=True) if ending == ".pt" else load_file(path)
    assert set(loaded) == set(arrays())
    for name, array in arrays().items():
        tensor = loaded[name]
        assert tensor.shape == array.shape, name
        if name == "brain":
            assert tensor.dtype == torch.bfloat16
            np.testing.assert_array_equal(tensor.float().numpy(), array.astype(np.float32))
        else:
            assert tensor.numpy().dtype == array.dtype
            assert tensor.numpy().tobytes() == array.tobytes(), name


def test_what_pytorch_writes_is_read_and_written_again(tmp_path: pathlib.Path):
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(tensors(), first)
    got, _ = read_weights(first)
    second.write_bytes(torch_file.to_bytes(got))
    again = torch.load(second, weights_only=True)
    assert list(again) == list(tensors())
    for name, tensor in tensors().items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


def test_a_module_takes_weights_from_a_file(tmp_path):
    path, module = tmp_path / "w.pt", torch.nn.Linear(4, 2)
    path.write_bytes(torch_file.to_bytes({name: x.detach().numpy() for name, x in module.named_parameters()}))
    other = torch.nn.Linear(4, 2)
    other.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(other.weight, module.weight)
