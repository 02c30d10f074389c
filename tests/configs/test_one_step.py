"""Every row of Table 3 takes a training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hax_jax.data import make_split
from hax_jax.training.initialise import prepare
from hax_jax.training.optimizer import make_optimizer
from hax_jax.training.sharding import make_mesh
from hax_jax.training.step import make_train_step
from tests.configs.rows import ROWS

TINY_DATA = {"min_n_context": 2, "max_n_context": 2, "min_n_key": 2, "max_n_key": 3, "n_eval_per_pair": 1}
TINY_TRAINING = {"batch_size": 2, "num_steps": 1, "warmup_steps": 0}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_takes_a_step(row):
    # Several keys a source and fewer keys than positions, as at full size.
    experiment = row.experiment(
        data=TINY_DATA, training=TINY_TRAINING, model={"sparse_keys": 8, "data_max_length": 16}
    )
    optimizer = make_optimizer(experiment.training)
    beginning = prepare(experiment, None, optimizer, make_mesh(batch_size=2))
    split = make_split(experiment.data, "train")
    raw = jax.tree.map(lambda x: x[None], next(split.iterator(2, repeat=True)))
    step = make_train_step(beginning.structure, optimizer, experiment.training)
    update = jax.jit(lambda state, raw: step(state, jax.vmap(split.materialize)(raw)))

    before = beginning.make()
    after, metrics = update(before, raw)

    # Chance is ln 100 = 4.6 nats; the first logits are small beside it.
    assert 3.5 < metrics["loss"] < 6.0
    assert (metrics["gate_loss"] > 0) == ("key_selection" in experiment.model.sources)
    assert int(after.step) == 1 and int(after.refused) == 0
    for name, value in after.params.items():
        assert np.isfinite(value).all(), name
        if value.ndim > 1:
            assert jnp.any(value != before.params[name]), f"{name} did not move"
