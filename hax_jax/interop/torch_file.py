"""PyTorch's .pt files, weights only, without PyTorch.

Such a file is an archive of a pickle and the raw numbers of each tensor. A pickle can name any function and
have it called, so the reader knows five names that weights need and refuses every other before it is even
imported. The writer emits the same few instructions. The tests of the PyTorch environment hold both to
`torch.load(weights_only=True)` and `torch.save`.
"""

import collections
import io
import math
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from hax_jax.interop.files import BFLOAT16, WeightsError, read_bytes

_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
# A state dict's pickle holds names and shapes only; more than this is something else.
_LARGEST_PICKLE = 64 * 2**20


class _Storage(NamedTuple):
    """The numbers of one or several tensors, one after the other."""

    numbers: np.ndarray


class _StorageKind(NamedTuple):
    """What stands for a class such as torch.FloatStorage."""

    dtype: np.dtype


class _HoldsCode(Exception):
    """A pickle that names what weights do not need."""


def read(path: pathlib.Path, entry: str = "") -> dict[str, np.ndarray]:
    """The tensors of a state dict by name; of a larger checkpoint, those of the dict called `entry`.

    `entry` may be left out where there is only one.

    Raises:
      WeightsError: the file is missing or damaged, holds code, or holds no dict of tensors.
    """
    content = read_bytes(path)
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise WeightsError(
            path,
            "it is no archive as torch.save writes since PyTorch 1.6",
            "load it there with weights_only=True and save its state_dict() again",
        )
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            loaded = _load(archive)
    except _HoldsCode as error:
        raise WeightsError(
            path,
            f"it holds more than weights: it wants to call {error}",
            "save the state_dict() of the model alone",
        ) from None
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise WeightsError(
            path, f"it is damaged ({' '.join(str(error).split()) or type(error).__name__})", "copy it again"
        ) from error
    return _state_dict(loaded, path, entry)


def _load(archive: zipfile.ZipFile) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    (pickled,) = (name for name in members if name.endswith("/data.pkl") and name.count("/") == 1)
    root = pickled.removesuffix("data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise ValueError("its members are compressed, which torch.save never does")
    order = f"{root}byteorder"
    if order in members and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian")
    if members[pickled].file_size > _LARGEST_PICKLE:
        raise ValueError("its pickle is too large for one of weights")
    storages: dict[str, _Storage] = {}

    def storage(kind: Any, key: Any, count: Any) -> _Storage:
        if not isinstance(kind, _StorageKind) or not isinstance(key, str) or type(count) is not int:
            raise ValueError("a tensor refers to no storage")
        if key not in storages:
            storages[key] = _Storage(np.frombuffer(archive.read(f"{root}data/{key}"), kind.dtype))
        found = storages[key]
        if found.numbers.dtype != kind.dtype or len(found.numbers) < count:
            raise ValueError(f"storage {key} is shorter than it should be")
        return found

    return _WeightsUnpickler(io.BytesIO(archive.read(pickled)), storage).load()


class _WeightsUnpickler(pickle.Unpickler):
    """An unpickler for which nothing exists but dicts, numbers, strings and tensors."""

    def __init__(self, file: io.BytesIO, storage: Any):
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch", "Size"): _size,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _STORAGES:
            return _StorageKind(_STORAGES[name])
        raise _HoldsCode(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise ValueError("it refers to something outside itself")
        _, kind, key, _, count = pid
        return self._storage(kind, key, count)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
    """A tensor as a copy, after a check that all of it lies within its storage."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor refers to no storage")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(x) is int and x >= 0 for x in numbers):
        raise ValueError("a tensor has a shape or strides that are no sizes")
    count, size = math.prod(shape), len(storage.numbers)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if count > size or (count and last >= size):
        raise ValueError("a tensor reaches beyond its storage")
    step = storage.numbers.itemsize
    view = np.lib.stride_tricks.as_strided(
        storage.numbers[offset:] if count else storage.numbers[:0], shape, [step * s for s in strides]
    )
    return np.array(view, order="C")


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _size(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


def _state_dict(loaded: Any, path: pathlib.Path, entry: str) -> dict[str, np.ndarray]:
    """The dict of tensors in what was loaded."""
    if _is_state_dict(loaded) and not entry:
        return dict(_items(loaded))
    found = {
        name: dict(_items(value))
        for name, value in _items(loaded)
        if isinstance(name, str) and _is_state_dict(value)
    }
    if entry in found:
        return found[entry]
    if len(found) == 1 and not entry:
        return next(iter(found.values()))
    fault = f"it has no dict of tensors {entry!r}" if entry else "it has no dict of tensors"
    names = ", ".join(repr(name) for name in found)
    if found:
        fault = fault if entry else "it has several dicts of tensors"
        raise WeightsError(path, fault, f"name one as the entry: {names}")
    raise WeightsError(path, fault, "save the state_dict() of the model alone")


def _is_state_dict(value: Any) -> bool:
    items = _items(value)
    return bool(items) and all(isinstance(name, str) and isinstance(x, np.ndarray) for name, x in items)


def _items(value: Any) -> list[tuple[Any, Any]]:
    # A pickle can hang attributes on an ordered dict, one called `items` too.
    return list(dict.items(value)) if isinstance(value, dict) else []


def to_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The content of a file that `torch.load` reads as an ordered dict of tensors, in the given order.

    Raises:
      ValueError: an array has a dtype that PyTorch lacks.
    """
    content = {name: _contiguous(name, np.asarray(array)) for name, array in arrays.items()}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, data: bytes) -> None:
            # A fixed date, so that the same weights give the same bytes.
            archive.writestr(zipfile.ZipInfo(f"weights/{name}", (1980, 1, 1, 0, 0, 0)), data)

        add("data.pkl", b"".join(_pickle(content)))
        add("byteorder", b"little")
        for key, array in enumerate(content.values()):
            add(f"data/{key}", array.tobytes())
        add("version", b"3\n")
    return stream.getvalue()


def _contiguous(name: str, array: np.ndarray) -> np.ndarray:
    dtype = array.dtype.newbyteorder("<") if array.dtype.isbuiltin == 1 else array.dtype
    if dtype not in _NAMES:
        raise ValueError(f"`{name}` must have a dtype that PyTorch's files have, got {array.dtype}")
    # Of a scalar ascontiguousarray would make a vector.
    return np.array(array, dtype, order="C")


def _pickle(arrays: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    """The instructions of protocol 2 that build an ordered dict of tensors."""

    def name_of(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    def text(value: str) -> bytes:
        encoded = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded

    def number(value: int) -> bytes:
        data = value.to_bytes(9, "little", signed=True)
        return pickle.LONG1 + bytes([len(data)]) + data

    def numbers(values: tuple[int, ...]) -> bytes:
        return pickle.MARK + b"".join(map(number, values)) + pickle.TUPLE

    empty_dict = name_of("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    yield pickle.PROTO + b"\x02" + empty_dict + pickle.MARK
    for key, (name, array) in enumerate(arrays.items()):
        kind = name_of("torch", _NAMES[array.dtype])
        place = text("storage") + kind + text(str(key)) + text("cpu") + number(array.size)
        storage = pickle.MARK + place + pickle.TUPLE + pickle.BINPERSID
        strides = tuple(step // array.itemsize for step in array.strides)
        sizes = number(0) + numbers(array.shape) + numbers(strides)
        arguments = pickle.MARK + storage + sizes + pickle.NEWFALSE + empty_dict + pickle.TUPLE
        yield text(name) + name_of("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE
    yield pickle.SETITEMS + pickle.STOP
