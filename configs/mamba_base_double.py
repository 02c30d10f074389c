"""Table 3, Mamba, Base, 2 x dim: no sparse attention, twice the hidden size.

    python experiments/joint_recall.py --config=configs/mamba_base_double.py

Paper: 34.5 % test accuracy after 400,000 steps. 246,144 parameters.
Time: three to four hours expected on one H200; not run at length.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment("mamba_base_double", argument, **common.MAMBA, hidden_size=128)
