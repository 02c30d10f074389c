"""What a mixer knows of the rows it works on."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hax_jax.packing import Packing

# Picks positions: (b, t, ...) to (m, s, ...).
Keep = Callable[[Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequence:
    """Which positions are real, and which belong together.

    Attributes:
      padding_mask: (b, t) bool, True at real tokens; None where all are.
      segment_ids: (b, t) int32; nothing crosses a boundary. None where each row is one segment.
      packing: where the items of packed rows lie; None where each has a row of its own.
    """

    padding_mask: Bool[Array, "b t"] | None = None
    segment_ids: Int[Array, "b t"] | None = None
    packing: Packing | None = None

    def hide_pads(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """x with zeros at pads."""
        return x if self.padding_mask is None else jnp.where(self.padding_mask[..., None], x, 0)
