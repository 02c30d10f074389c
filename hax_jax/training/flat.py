"""Small parameters as one vector while steps are taken, so that an update is one kernel, not two a tensor."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from hax_jax.training.state import ModelStructure, TrainState

# Tensors up to this size are joined: an update of them takes less time than it takes to start it.
_SMALL = 1 << 20
# Each begins at a multiple of so many bytes. XLA may hand a kernel a part of a vector where it lies, and
# Mosaic GPU kernels refuse inputs that begin elsewhere.
_ALIGNMENT = 256


class FlatStructure:
    """A module's structure whose small parameters are one vector for each dtype.

    In place of `ModelStructure` in `make_train_step`: gradients with respect to the vectors are the tensors'
    gradients, joined. A state goes over to this form and back at the ends of a dispatch, so that
    checkpoints, evaluation and everything else see tensors by name.

    Args:
      structure: the module without its arrays.
      params: the trainable arrays by name, or their shapes and dtypes.
    """

    def __init__(self, structure: ModelStructure, params: dict[str, Any]):
        self._structure = structure
        self._shapes = {name: x.shape for name, x in params.items()}
        # What each vector holds. No module's attribute has a name like those of the vectors.
        self._vectors: dict[str, list[str]] = {}
        for name, x in params.items():
            if x.size <= _SMALL:
                self._vectors.setdefault(f"<{x.dtype.name}>", []).append(name)
        joined = {name for names in self._vectors.values() for name in names}
        self._alone = [name for name in params if name not in joined]
        self._unpack = jax.custom_vjp(self.unpack)
        # Without a rule of its own the gradient of every slice would be a whole vector, to be added up.
        self._unpack.defvjp(lambda arrays: (self.unpack(arrays), None), lambda _, grads: (self.pack(grads),))

    def merge(self, params: dict[str, Any], buffers: dict[str, Any]) -> Any:
        """The module with these arrays, `params` as `pack` makes them."""
        return self._structure.merge(self._unpack(params), buffers)

    def pack(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Arrays by name in this form."""
        vectors = {}
        for vector, names in self._vectors.items():
            pieces = [arrays[name].reshape(-1) for name in names]
            vectors[vector] = jnp.concatenate([jnp.pad(x, (0, _filler(x))) for x in pieces])
        return vectors | {name: arrays[name] for name in self._alone}

    def unpack(self, packed: dict[str, Any]) -> dict[str, Any]:
        """The inverse of `pack`."""
        arrays = {name: packed[name] for name in self._alone}
        for vector, names in self._vectors.items():
            begin = 0
            for name in names:
                piece = packed[vector][begin : begin + math.prod(self._shapes[name])]
                arrays[name] = piece.reshape(self._shapes[name])
                begin += piece.size + _filler(piece)
        return {name: arrays[name] for name in self._shapes}

    def pack_state(self, state: TrainState) -> TrainState:
        """A state in this form: the parameters, and all that the optimiser keeps for them."""
        return self._of_state(state, set(self._shapes), self.pack)

    def unpack_state(self, state: TrainState) -> TrainState:
        """The inverse of `pack_state`."""
        return self._of_state(state, {*self._vectors, *self._alone}, self.unpack)

    def _of_state(self, state: TrainState, keys: set[str], convert: Any) -> TrainState:
        is_like_params = lambda x: isinstance(x, dict) and x.keys() == keys  # noqa: E731
        convert_if = lambda x: convert(x) if is_like_params(x) else x  # noqa: E731
        opt_state = jax.tree.map(convert_if, state.opt_state, is_leaf=is_like_params)
        return dataclasses.replace(state, params=convert(state.params), opt_state=opt_state)


def _filler(piece):
    """Zeros between a tensor and the next; their gradients are zero, and so they stay."""
    return -piece.size % (_ALIGNMENT // piece.dtype.itemsize)
