"""The map between the original's PyTorch state-dict entries and this project's parameters, both ways.

Names change, matrices are transposed from (out, in) to (in, out) and convolution filters from (channels, 1,
taps) to (taps, channels). Nothing is lost or made up: the map is one to one, and a round trip gives the same
bits.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hax_jax.models import LanguageModel
from hax_jax.training.state import split_model

Arrays = Mapping[str, np.ndarray]

# Ours on the left, as a pattern over dotted names; the original's on the right.
_RENAMES = (
    (r"^embeddings\.embedding$", "embeddings.weight"),
    (r"^norm\.weight$", "norm_f.weight"),
    (r"\.conv\.", ".conv1d."),
    (r"\.hax\.key_query_proj\.kernel$", ".xx_proj.kernel"),
    (r"\.hax\.output_scale$", ".E"),
    (r"\.hax\.scorer\.layers\.0\.", ".dx_proj_1."),
    (r"\.hax\.scorer\.layers\.1\.", ".dx_proj_2."),
    (r"\.hax\.scorer\.layers\.2\.", ".dx_proj_3."),
    (r"\.kernel$", ".weight"),
)
_SAMBA_RENAMES = ((r"^(layers\.\d+)\.norm\.weight$", r"\1.mixer_norm.weight"),)


class StateDictError(ValueError):
    """A state dict that does not fit the model: which entries are missing, extra or of another shape."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: its name here and there, its shape and dtype here, and the two changes of layout."""

    name: str
    original_name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_original: Callable[[np.ndarray], np.ndarray]

    @property
    def original_shape(self) -> tuple[int, ...]:
        return self.to_original(np.empty(self.shape, np.int8)).shape


def _transpose(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.T)


def _same(x: np.ndarray) -> np.ndarray:
    return x


def entries(model: LanguageModel) -> tuple[Entry, ...]:
    """All trainable parameters of a `LanguageModel` with their counterparts in the original."""
    _, params, _ = split_model(model)
    samba = model.config.arch == "samba"
    return tuple(_entry(name, value.shape, np.dtype(value.dtype), samba) for name, value in params.items())


def _entry(name: str, shape: tuple[int, ...], dtype: np.dtype, samba: bool) -> Entry:
    original = name
    for pattern, replacement in (*_RENAMES, *(_SAMBA_RENAMES if samba else ())):
        original = re.sub(pattern, replacement, original)
    if name.endswith(".kernel"):
        return Entry(name, original, shape, dtype, _transpose, _transpose)
    if name.endswith(".conv.weight"):
        return Entry(
            name,
            original,
            shape,
            dtype,
            lambda x: np.ascontiguousarray(x[:, 0].T),
            lambda x: np.ascontiguousarray(x.T[:, None]),
        )
    return Entry(name, original, shape, dtype, _same, _same)


def load_state_dict(model: LanguageModel, state_dict: Arrays) -> None:
    """Puts the original's weights into `model`, in place, in the model's parameter dtype.

    Raises:
      StateDictError: entries are missing, extra or of another shape, all of them named; nothing is changed.
    """
    check_fits(model, state_dict)
    variables = _variables(model)
    for entry in entries(model):
        variable = variables[entry.name]
        variable[...] = jnp.asarray(entry.to_ours(np.asarray(state_dict[entry.original_name])), entry.dtype)


def check_fits(model: LanguageModel, state_dict: Arrays) -> None:
    """Raises StateDictError, naming all of them, if entries are missing, extra or of another shape."""
    known = entries(model)
    names = {entry.original_name for entry in known}
    problems = [f"missing {name}" for name in sorted(names - set(state_dict))]
    problems += [f"unexpected {name}" for name in sorted(set(state_dict) - names)]
    for entry in known:
        got = state_dict.get(entry.original_name)
        if got is not None and tuple(got.shape) != entry.original_shape:
            problems.append(
                f"{entry.original_name} has shape {tuple(got.shape)}, expected {entry.original_shape}"
            )
    if problems:
        raise StateDictError(
            f"the state dict does not fit the model: {'; '.join(problems)}; "
            "check the model's sizes and sources"
        )


def state_dict(model: LanguageModel) -> dict[str, np.ndarray]:
    """The model's weights under the original's names and in its layout."""
    _, params, _ = split_model(model)
    return rename(model, params)


def rename(model: LanguageModel, values: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Arrays that go with the model's parameters (gradients, say), by our names, under the original's."""
    return {
        entry.original_name: entry.to_original(np.asarray(values[entry.name])) for entry in entries(model)
    }


def _variables(model: LanguageModel) -> dict[str, nnx.Variable]:
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        found[".".join(map(str, path))] = variable
    return found
