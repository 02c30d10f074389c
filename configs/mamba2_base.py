"""Table 3, Mamba2, Base: no sparse attention.

    python experiments/joint_recall.py --config=configs/mamba2_base.py

Paper: 36.6 % test accuracy after 400,000 steps. 67,184 parameters.
Time: about half an hour expected on one H200, from 4 ms a step in a short run.

The released script trains the doubled width (`mamba2_base_double.py`) whenever there is no sparse attention;
this is the row that Table 3 calls Base.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment("mamba2_base", argument, **common.MAMBA2)
