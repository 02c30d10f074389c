"""Which dtype is used where."""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of parameters, of matmul inputs and of activations.

    Recurrences, softmax, norms and losses are at least float32 whatever stands here.
    """

    param: jnp.dtype
    matmul: jnp.dtype
    activation: jnp.dtype

    @classmethod
    def named(cls, name: str) -> "Precision":
        """The precision that `ModelConfig.precision` names."""
        single, half, double = jnp.dtype("float32"), jnp.dtype("bfloat16"), jnp.dtype("float64")
        table = {
            "default": cls(param=single, matmul=half, activation=single),
            "float32": cls(param=single, matmul=single, activation=single),
            # The released trainer's: everything, the optimiser's moments included.
            "bfloat16": cls(param=half, matmul=half, activation=half),
            "float64": cls(param=double, matmul=double, activation=double),
        }
        return table[name]
