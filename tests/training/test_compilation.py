"""What XLA is told about the programs of a run."""

import re

import jax
import numpy as np
import pytest

from hax_jax.data import make_split
from hax_jax.training.compilation import compiler_options
from hax_jax.training.dispatch import make_update, take_raws
from hax_jax.training.initialise import prepare
from hax_jax.training.optimizer import make_optimizer
from hax_jax.training.sharding import make_mesh
from tests.training.tiny import TinyModel, tiny_experiment

SCHEDULING = "xla_gpu_command_buffer_scheduling_mode"


def test_a_gpu_s_kernels_may_run_side_by_side_and_a_loop_is_one_graph_where_asked_for():
    assert compiler_options("cpu", one_graph=True) is None
    assert compiler_options("cuda") == {SCHEDULING: "CONCURRENT"}
    options = compiler_options("cuda", one_graph=True)
    assert options.pop(SCHEDULING) == "CONCURRENT" and options.pop("xla_gpu_command_buffer_unroll_loops")
    assert "WHILE" in options.pop("xla_gpu_enable_command_buffer").split(",") and not options


@pytest.mark.parametrize("flag", [f"{SCHEDULING}=SERIALIZE", "xla_gpu_enable_command_buffer="])
def test_what_xla_flags_say_of_graphs_is_left_as_it_is(flag, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x --{flag}")
    assert compiler_options("cuda", one_graph=True) is None


def test_xla_knows_the_options():
    """A name or value that it does not know is refused on a CPU too."""
    compiled = lambda options: jax.jit(lambda x: x + 1).lower(1.0).compile(options)  # noqa: E731
    compiled(compiler_options("cuda", one_graph=True))
    with pytest.raises(jax.errors.JaxRuntimeError, match="not a valid"):
        compiled({SCHEDULING: "SIDE_BY_SIDE"})


def test_an_update_returns_nothing_that_it_was_not_given():
    """Memory of results is new in each call, and XLA lends it to the loop, whose graph would be made anew."""
    experiment = tiny_experiment()
    training, mesh = experiment.training, make_mesh()
    split = make_split(experiment.data, "train", mesh.size)
    beginning = prepare(experiment, TinyModel(), make_optimizer(training), mesh)
    raws = take_raws(split.iterator(training.batch_size, repeat=True), 3, 1)
    update = make_update(beginning, split.materialize, training, mesh, population=False, one_graph=True)
    lowered = update.lower(beginning.shapes, raws, np.int32(3), np.float32(1e-3), None)
    results = jax.tree.leaves(lowered.out_info)
    assert len(re.findall(r"tf\.aliasing_output", lowered.as_text())) == len(results) > 10
