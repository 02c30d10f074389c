"""Weights in safetensors and PyTorch files: both directions, and what is refused."""

import io
import json
import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from hax_jax.interop import safetensors_file, torch_file
from hax_jax.interop.files import WeightsError, read_weights, write_weights

# Written by PyTorch 2.13 and safetensors 0.8; make.py beside them says how.
MADE = pathlib.Path(__file__).parent / "files"
FORMATS = (".safetensors", ".pt")


def expected() -> dict[str, np.ndarray]:
    """What make.py put into the files."""
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    return {
        "single": base / np.float32(7),
        "transposed": base.T,
        "view": base[1:, 2:],
        "double": np.array([1, 1 / 3]),
        "half": np.array([0.5, -2], np.float16),
        "brain": (base / np.float32(7)).astype(ml_dtypes.bfloat16),
        "count": np.array(5),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert set(got) == set(want)
    for name, array in want.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.parametrize("ending", FORMATS)
def test_files_of_the_packages_are_read(ending):
    got, metadata = read_weights(MADE / f"tensors{ending}")
    assert_same(got, expected())
    assert metadata == ({"made": "by the package"} if ending == ".safetensors" else {})


@pytest.mark.parametrize("ending", FORMATS)
def test_a_round_trip_gives_the_same_bits(tmp_path, ending):
    path = tmp_path / f"weights{ending}"
    arrays = expected() | {"größe.0": np.array([np.nan, -0.0, np.inf], np.float32)}
    write_weights(path, arrays, {"a": "b"})
    got, metadata = read_weights(path)
    assert_same(got, arrays)
    assert metadata == ({"a": "b"} if ending == ".safetensors" else {})
    again = tmp_path / f"again{ending}"
    write_weights(again, got, metadata)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("ending", FORMATS)
def test_a_damaged_file_is_one_clear_error(tmp_path, ending):
    whole, path = (MADE / f"tensors{ending}").read_bytes(), tmp_path / f"w{ending}"
    for size in (0, 1, 7, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=r"^\S+: .+; .+") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_weights(tmp_path / f"none{ending}")


def test_other_endings_are_refused(tmp_path):
    for function in (read_weights, lambda path: write_weights(path, {})):
        with pytest.raises(WeightsError, match=r"use \.safetensors or \.pt"):
            function(tmp_path / "weights.npz")


class Code:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def archive(content: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr("weights/data.pkl", content)
        for name, data in members.items():
            file.writestr(f"weights/{name.replace('__', '/')}", data)
    return stream.getvalue()


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_code_is_refused_and_not_run(tmp_path, protocol):
    folder, path = tmp_path / "made_by_code", tmp_path / "w.pt"
    path.write_bytes(archive(pickle.dumps({"w": Code(folder)}, protocol=protocol)))
    with pytest.raises(WeightsError, match=r"it holds more than weights: it wants to call posix\.mkdir"):
        read_weights(path)
    assert not folder.exists()


def test_whole_modules_and_old_files_are_refused():
    with pytest.raises(WeightsError, match=r"it wants to call torch\.nn\.modules\.linear\.Linear"):
        read_weights(MADE / "whole_module.pt")
    with pytest.raises(WeightsError, match=r"no archive as torch\.save writes"):
        read_weights(MADE / "before_1_6.pt")


@pytest.mark.parametrize(
    "content",
    [
        # Storages, parameters and dicts that are not what they should be.
        b"\x80\x02(dX\x01\x00\x00\x00wctorch\nFloatStorage\ns.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00)))tR.",
        b"\x80\x02(X\x07\x00\x00\x00storageK\x01K\x02K\x03K\x04tQ.",
        b"\x80\x02ccollections\nOrderedDict\n)R}(X\x05\x00\x00\x00itemsK\x01X\x04\x00\x00\x00keysK\x01ub.",
        pickle.dumps([1, 2]),
        pickle.dumps({}),
        pickle.dumps({"w": "text"}),
        pickle.dumps({1: 2}),
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path, content):
    path = tmp_path / "w.pt"
    path.write_bytes(archive(content))
    with pytest.raises(WeightsError):
        read_weights(path)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"), [(0, (5,), (1,)), (2, (3,), (1,)), (0, (2, 2), (3, 1)), (0, (9,), (0,))]
)
def test_tensors_beyond_their_storage_are_refused(offset, shape, strides):
    storage = torch_file._Storage(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="reaches beyond its storage"):
        torch_file._tensor(storage, offset, shape, strides)
    with pytest.raises(ValueError, match="no sizes"):
        torch_file._tensor(storage, -1, (1,), (1,))


def test_compressed_and_big_endian_archives_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(archive(pickle.dumps({}), zipfile.ZIP_DEFLATED))
    with pytest.raises(WeightsError, match="compressed"):
        read_weights(path)
    path.write_bytes(archive(pickle.dumps({}), byteorder=b"big"))
    with pytest.raises(WeightsError, match="big-endian"):
        read_weights(path)


def test_one_dict_of_tensors_is_found_in_a_checkpoint_and_several_have_to_be_named():
    want = {"weight": np.full((3, 2), 0.25, np.float32), "bias": np.full(3, -1, np.float32)}
    assert_same(read_weights(MADE / "one_entry.pt")[0], want)
    for entry in ("model", "parameters"):
        assert_same(read_weights(MADE / "checkpoint.pt", entry)[0], want)
    with pytest.raises(WeightsError, match="several dicts of tensors; name one as the entry: 'model', 'para"):
        read_weights(MADE / "checkpoint.pt")
    with pytest.raises(WeightsError, match="no dict of tensors 'ema'"):
        read_weights(MADE / "checkpoint.pt", "ema")
    with pytest.raises(WeightsError, match="no entries"):
        read_weights(MADE / "tensors.safetensors", "model")


def header(**told) -> bytes:
    text = json.dumps(told).encode()
    return len(text).to_bytes(8, "little") + text


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header(w=GOOD | {"dtype": "F4"}) + b"\0" * 8, "known dtype"),
        (header(w=GOOD | {"shape": [3]}) + b"\0" * 8, "has 8 bytes, its shape needs 12"),
        (header(w=GOOD | {"shape": [-1]}) + b"\0" * 8, "outside the file"),
        (header(w=GOOD) + b"\0" * 4, "outside the file"),
        (header(w=GOOD) + b"\0" * 12, "do not fill it"),
        (header(w=3) + b"\0" * 8, "known dtype"),
        (header(__metadata__={"a": 1}), "metadata"),
        (b"\x02" + b"\0" * 7 + b"[]", "no object"),
        (b"\x0f" + b"\0" * 7 + b'{"a": 1,"a": 2}', "stands twice"),
        (b"\xff" * 8 + b"{}", "no whole safetensors file"),
    ],
)
def test_safetensors_headers_are_checked(tmp_path, content, said):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        read_weights(path)


def test_dtypes_that_a_format_lacks_are_refused():
    for module, more in ((safetensors_file, ({},)), (torch_file, ())):
        with pytest.raises(ValueError, match="`w` must have"):
            module.to_bytes({"w": np.array(["text"])}, *more)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot be written"):
        write_weights(tmp_path / "file" / "w.pt", {})
