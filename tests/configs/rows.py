"""The rows of Table 3: config file, parameter count, and the paper's test accuracy in percent."""

import importlib
from typing import NamedTuple

from ml_collections import ConfigDict

from hax_jax.config import Experiment


class Row(NamedTuple):
    """One config file and what the paper says of it."""

    name: str
    num_parameters: int
    paper_accuracy: float

    def config(self, argument: str = "") -> ConfigDict:
        """What the file's `get_config` returns."""
        return importlib.import_module(f"configs.{self.name}").get_config(argument)

    def experiment(self, argument: str = "", **groups: dict) -> Experiment:
        """The checked experiment, after changes such as `training={"num_steps": 1}`."""
        config = self.config(argument)
        for group, changes in groups.items():
            config[group].update(changes)
        return Experiment.from_dict(config)


# The counts of the two undoubled base rows are those of the sparse rows less the branch; the rest are
# the original's.
ROWS = (
    Row("mamba_base", 73_920, 16.3),
    Row("mamba_base_double", 246_144, 34.5),
    Row("mamba_dilated", 82_368, 7.8),
    Row("mamba_sliding_window", 82_368, 18.7),
    Row("mamba_sliding_window_dilated", 82_368, 16.6),
    Row("mamba_sliding_window_sink", 82_368, 16.4),
    Row("mamba_lsh", 82_368, 11.6),
    Row("mamba_key_selection", 86_658, 36.6),
    Row("mamba_hax", 86_658, 38.0),
    Row("mamba2_base", 67_184, 36.6),
    Row("mamba2_base_double", 231_984, 59.2),
    Row("mamba2_dilated", 83_824, 19.6),
    Row("mamba2_sliding_window", 83_824, 70.6),
    Row("mamba2_sliding_window_dilated", 83_824, 48.6),
    Row("mamba2_sliding_window_sink", 83_824, 49.3),
    Row("mamba2_lsh", 83_824, 13.5),
    Row("mamba2_key_selection", 100_594, 60.1),
    Row("mamba2_hax", 100_594, 74.3),
    Row("samba", 131_360, 6.3),
)
