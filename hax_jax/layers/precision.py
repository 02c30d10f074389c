"""Which dtype is used where."""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of parameters, of matmul inputs, of activations, and of those inside a mixer.

    Recurrences, softmax, norms and losses are at least float32 whatever stands here. `inner` is what passes
    from one operation of a mixer to the next: the inputs' projections, gates, convolutions, queries and keys.
    The residual stream and what is added to it are `activation`.
    """

    param: jnp.dtype
    matmul: jnp.dtype
    activation: jnp.dtype
    inner: jnp.dtype

    @classmethod
    def named(cls, name: str) -> "Precision":
        """The precision that `ModelConfig.precision` names."""
        single, half, double = jnp.dtype("float32"), jnp.dtype("bfloat16"), jnp.dtype("float64")
        table = {
            "default": cls(param=single, matmul=half, activation=single, inner=half),
            "float32": cls(param=single, matmul=single, activation=single, inner=single),
            # The released trainer's: everything, the optimiser's moments included.
            "bfloat16": cls(param=half, matmul=half, activation=half, inner=half),
            "float64": cls(param=double, matmul=double, activation=double, inner=double),
        }
        return table[name]
