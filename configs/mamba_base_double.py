"""Table 3, Mamba, Base, 2 x dim: no sparse attention, twice the hidden size.

    python experiments/joint_recall.py --config=configs/mamba_base_double.py

Paper: 34.5 % test accuracy after 400,000 steps. 246,144 parameters.
Time: results/benchmarks/step.json has that of a step on one H200, padded and packed.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment("mamba_base_double", argument, **common.MAMBA, hidden_size=128)
