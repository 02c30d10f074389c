"""Every config file builds, checks, and says in its header what it is."""

import pathlib

import pytest

from configs import common
from hax_jax.config import ConfigError, Experiment
from tests.configs.rows import ROWS
from tests.golden_data import REPOSITORY

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def test_each_file_is_a_row_and_each_row_a_file():
    files = {path.stem for path in (REPOSITORY / "configs").glob("*.py")} - {"__init__", "common"}
    assert files == {row.name for row in ROWS}
    assert len(ROWS) == 19


@each_row
@pytest.mark.parametrize("argument", ["", "cpu", "parity", "cpu,parity"])
def test_builds(row, argument):
    config = row.config(argument)
    experiment = Experiment.from_dict(config)
    assert experiment.name == "_".join([row.name, *filter(None, argument.split(","))])
    # Every field is there to be overridden, and what is read back is the same run.
    assert Experiment.from_dict(experiment.to_dict()) == experiment
    assert config.to_dict() == experiment.to_dict()


@each_row
def test_header(row):
    text = (REPOSITORY / "configs" / f"{row.name}.py").read_text()
    header = text.split('"""')[1]
    assert f"python experiments/joint_recall.py --config=configs/{row.name}.py" in header
    assert f"Paper: {row.paper_accuracy:.1f} % " in header
    assert f"{row.num_parameters:,} parameters" in header
    assert "Time: " in header


@each_row
def test_trains_as_the_paper_does(row):
    """Table 3's recipe; the widths and sources are held by the parameter counts and the names."""
    experiment = row.experiment()
    training, data = experiment.training, experiment.data
    assert (training.num_steps, training.batch_size, training.warmup_steps) == (400_000, 64, 5_000)
    assert (training.weight_decay, training.gate_loss_weight, training.eval_every_steps) == (0.01, 0.1, 500)
    assert (data.min_n_context, data.max_n_context, data.min_n_key, data.max_n_key) == (5, 16, 5, 16)
    assert (data.n_value, data.padded_length, data.num_pairs) == (16, 1058, 144)
    assert experiment.model.initializer_range == (0.02 if row.name == "samba" else 0.1)


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("base", ()),
        ("base_double", ()),
        ("dilated", ("dilated",)),
        ("sliding_window", ("sliding_window",)),
        ("sliding_window_dilated", ("sliding_window", "dilated")),
        ("sliding_window_sink", ("sliding_window", "sink")),
        ("lsh", ("sign_bin_lsh",)),
        ("key_selection", ("key_selection",)),
        ("hax", ("sign_bin_lsh", "key_selection")),
    ],
)
@pytest.mark.parametrize("base", ["mamba", "mamba2"])
def test_sources(base, name, sources):
    row = next(row for row in ROWS if row.name == f"{base}_{name}")
    model = row.experiment().model
    assert (model.arch, model.sources, model.sparse_keys) == (base, sources, 64)
    assert model.hidden_size == (128 if name == "base_double" else 64)


@each_row
def test_cpu_is_a_joint_recall(row):
    experiment = row.experiment("cpu")
    data = experiment.data
    assert data.min_n_context >= 3 and data.min_n_key >= 3 and data.n_value >= 16
    assert experiment.model.sparse_keys < 2 * data.min_n_context * (2 * data.min_n_key + 1) + 1


@each_row
def test_parity_is_the_original(row):
    model = row.experiment("parity").model
    assert (model.routing, model.precision) == ("parity", "bfloat16")
    assert row.experiment().model.routing == "causal"


@pytest.mark.parametrize("argument", ["gpu", "CPU", "cpu,", "cpu, parity", "cpu;parity"])
def test_unknown_argument(argument):
    with pytest.raises(ConfigError, match="one of cpu, parity"):
        common.experiment("mamba2_hax", argument)


def test_every_default_stands_in_the_dataclasses():
    assert common.experiment("a", "").to_dict() == Experiment(name="a").to_dict()


def test_a_config_file_of_ones_own(tmp_path: pathlib.Path):
    """What a user writes: one of ours, changed."""
    from experiments import command_line

    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import mamba2_hax\n\n\n"
        "def get_config(argument=''):\n"
        "    config = mamba2_hax.get_config(argument)\n"
        "    config.name = 'mine'\n"
        "    config.model.num_hash = 4\n"
        "    return config\n"
    )
    command = command_line.parse(["joint_recall.py", f"--config={path}:cpu", "--config.model.sparse_keys=12"])
    assert command.workdir == pathlib.Path("runs/mine")
    assert (command.experiment.model.num_hash, command.experiment.model.sparse_keys) == (4, 12)
    assert command.experiment.data.max_n_key < 16
