"""Each row's model has as many parameters as the original's."""

import math

import jax
import pytest
from flax import nnx

from hax_jax.models import build_model
from tests.configs.rows import ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parameter_count(row):
    model = nnx.eval_shape(lambda: build_model(row.experiment().model, rngs=nnx.Rngs(0)))
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in parameters) == row.num_parameters
