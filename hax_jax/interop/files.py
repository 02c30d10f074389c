"""Weights in files of other programs: named arrays in, named arrays out, nothing executed on the way."""

import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class WeightsError(ValueError):
    """A file of weights that cannot be used: which, what is wrong, what to do; in one line."""

    def __init__(self, path: pathlib.Path | str, fault: str, remedy: str):
        super().__init__(f"{path}: {fault}; {remedy}")


def read_weights(path: pathlib.Path, entry: str = "") -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file by name, and what it says of itself.

    Args:
      path: named .safetensors, or .pt, .pth or .bin for PyTorch's own format.
      entry: for PyTorch's: which dict of tensors inside a larger checkpoint, where there are several.

    Raises:
      WeightsError: it is missing, damaged, of another format, or holds anything but weights.
    """
    from hax_jax.interop import safetensors_file, torch_file

    if is_safetensors(path):
        if entry:
            raise WeightsError(path, f"it has no entries such as {entry!r}", "leave the entry out")
        return safetensors_file.read(path)
    return torch_file.read(path, entry), {}


def write_weights(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays under their names as a whole; the same arrays give the same bytes.

    `metadata` goes into a .safetensors file; PyTorch's format has no place for it.

    Raises:
      WeightsError: the file cannot be written, or is named like no format.
    """
    from hax_jax.interop import safetensors_file, torch_file
    from hax_jax.training.files import write_atomically

    content = (
        safetensors_file.to_bytes(arrays, metadata or {})
        if is_safetensors(path)
        else torch_file.to_bytes(arrays)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise WeightsError(
            path, f"it cannot be written ({error.strerror})", "choose another place"
        ) from error


def is_weights_file(path: pathlib.Path) -> bool:
    """Whether the name is that of a file of weights."""
    return path.suffix in (".safetensors", ".pt", ".pth", ".bin")


def is_safetensors(path: pathlib.Path) -> bool:
    """Whether the name is that of a safetensors file; raises WeightsError if it is of no known format."""
    if not is_weights_file(path):
        raise WeightsError(path, "its ending names no format", "use .safetensors or .pt")
    return path.suffix == ".safetensors"


def read_bytes(path: pathlib.Path) -> bytes:
    """The content of a file, or a WeightsError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise WeightsError(path, f"it cannot be read ({error.strerror})", "check the path") from error
