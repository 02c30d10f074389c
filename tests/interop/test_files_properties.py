"""Properties of weight files: any arrays come back bit for bit, any damage is one error."""

import pathlib
import tempfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hax_jax.interop.files import WeightsError, read_weights, write_weights

QUICK = settings(max_examples=60, deadline=None)
DTYPES = (np.float32, np.float16, np.float64, np.int32, np.int64, np.uint8, ml_dtypes.bfloat16)
NAMES = st.text("abcdefgh_.0123456789", min_size=1, max_size=12)
each_format = pytest.mark.parametrize("ending", [".safetensors", ".pt"])


@st.composite
def array(draw):
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).view(dtype).reshape(shape)


ARRAYS = st.dictionaries(NAMES, array(), min_size=1, max_size=4)


@each_format
@QUICK
@given(arrays=ARRAYS)
def test_any_arrays_come_back_bit_for_bit_and_the_same_bytes_are_written_again(ending, arrays):
    with tempfile.TemporaryDirectory() as folder:
        path, again = (pathlib.Path(folder) / f"{name}{ending}" for name in "ab")
        write_weights(path, arrays)
        found, _ = read_weights(path)
        assert found.keys() == arrays.keys()
        for name, wanted in arrays.items():
            assert (found[name].dtype, found[name].shape) == (wanted.dtype, wanted.shape)
            assert found[name].tobytes() == wanted.tobytes()
        write_weights(again, found)
        assert again.read_bytes() == path.read_bytes()


@each_format
@QUICK
@given(arrays=ARRAYS, at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_damage_is_one_error_or_arrays(ending, arrays, at, bit, cut):
    """The formats have sums for some of their parts only: damage may change values, and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"a{ending}"
        write_weights(path, arrays)
        content = bytearray(path.read_bytes())
        position = int(at * len(content))
        content[position] ^= 1 << bit
        path.write_bytes(content[:position] if cut else content)
        said, found = "", {}
        try:
            found, _ = read_weights(path)
        except WeightsError as error:
            said = str(error)
        assert "\n" not in said
        assert all(isinstance(x, np.ndarray) for x in found.values())
