"""The safetensors format: a JSON header, then the arrays one after the other.

Written here and not taken from the package of that name because that one's NumPy side lacks bfloat16; the
tests of the PyTorch environment hold both to each other. Format: https://huggingface.co/docs/safetensors.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hax_jax.interop.files import BFLOAT16, WeightsError, read_bytes

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_COPY = "copy it again"


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays by name, and the header's metadata; raises WeightsError where anything does not fit."""
    content = read_bytes(path)
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8:
        raise WeightsError(path, "it is no whole safetensors file", _COPY)
    try:
        header = json.loads(content[8 : 8 + size], object_pairs_hook=_without_repeats)
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
            raise ValueError("its metadata is no object of strings")
        data = memoryview(content)[8 + size :]
        arrays = {name: _array(name, told, data) for name, told in header.items()}
        if sum(array.nbytes for array in arrays.values()) != len(data):
            raise ValueError("its arrays do not fill it")
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            path, f"it is no safetensors file: {' '.join(str(error).split())}", _COPY
        ) from error
    return arrays, metadata


def to_bytes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The content of a file with these arrays, sorted by name; raises ValueError for a dtype it lacks."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    parts, offset = [], 0
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        dtype = array.dtype.newbyteorder("<") if array.dtype.isbuiltin == 1 else array.dtype
        if dtype not in _NAMES:
            raise ValueError(
                f"`{name}` must have one of the dtypes {', '.join(_NAMES.values())}, got {dtype}"
            )
        parts.append(np.ascontiguousarray(array).astype(dtype, copy=False).tobytes())
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(parts[-1])],
        }
        offset += len(parts[-1])
    text = json.dumps(header, separators=(",", ":")).encode()
    # The arrays begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _array(name: str, told: Any, data: memoryview) -> np.ndarray:
    try:
        dtype, shape, (begin, end) = _DTYPES[told["dtype"]], told["shape"], told["data_offsets"]
        numbers = (*shape, begin, end)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} is not described by a known dtype, a shape and two offsets") from None
    if not all(type(x) is int and x >= 0 for x in numbers) or not begin <= end <= len(data):
        raise ValueError(f"{name} has a shape or offsets outside the file")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(
            f"{name} has {end - begin} bytes, its shape needs {math.prod(shape) * dtype.itemsize}"
        )
    return np.frombuffer(data[begin:end], dtype).reshape(shape).copy()


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found
