"""What the tests of the ops share: lengths, segment layouts, and how errors are measured."""

import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Odd ones, one below and above a tile or chunk, and shorter than a filter.
LENGTHS = (1, 3, 16, 65)
# Relative root-mean-square error: float32 differs by the order of sums alone; of bfloat16 inputs the products
# that are rounded again (weights before they multiply values) cost 2^-9 each.
TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2}

lengths = pytest.mark.parametrize("length", LENGTHS)
segmented = pytest.mark.parametrize("segmented", [False, True], ids=["row", "segments"])


def forms_of(name: str) -> dict[str, Callable]:
    """The implementations of an op that run on any device, by name."""
    # The op's function hides its folder of the same name from `from hax_jax.ops import ...`.
    forms = importlib.import_module(f"hax_jax.ops.{name}").IMPLEMENTATIONS
    return {form: function for form, function in forms.items() if form != "mosaic_gpu"}


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(generator: np.random.Generator, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(generator.standard_normal(shape), dtype)


def make_segments(generator: np.random.Generator, batch: int, length: int) -> jax.Array:
    """Ids of runs of random lengths, not in ascending order, so that nobody can rely on it."""
    boundary = generator.random((batch, length)) < 0.1
    ids = np.cumsum(boundary, axis=1)
    return jnp.asarray((ids * 7) % 1009 - 5, jnp.int32)


def poison_memory() -> None:
    """Leaves NaN in the memory that the next arrays will be placed in."""
    jax.block_until_ready([jnp.full(2**26, jnp.nan) for _ in range(8)])


def relative_error(got: jax.Array, want: jax.Array) -> float:
    """Root-mean-square of the difference over that of what is wanted; NaN if anything is NaN."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    scale = np.sqrt(np.mean(want**2))
    return float(np.sqrt(np.mean((got - want) ** 2)) / (scale if scale > 0 else 1.0))


def assert_close(got, want, dtype: str = "float32") -> None:
    """Compares trees leaf by leaf."""
    got_leaves, want_leaves = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got_leaves) == len(want_leaves)
    for index, (a, b) in enumerate(zip(got_leaves, want_leaves, strict=True)):
        assert a.shape == b.shape
        error = relative_error(a, b)
        assert error <= TOLERANCE[dtype], f"leaf {index}: {error:.2e}"


def with_gradients(function, arguments):
    """Outputs of function(arguments), and the gradients of a fixed random weighting of them."""

    def weighted(arguments):
        outputs = function(arguments)
        total = 0.0
        for index, leaf in enumerate(jax.tree.leaves(outputs)):
            weight = normal(rng(99, index), *leaf.shape)
            total = total + (leaf.astype(jnp.float32) * weight).sum()
        return total, outputs

    (_, outputs), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))(arguments)
    return outputs, gradients
