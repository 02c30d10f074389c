"""Table 3, Mamba2, Base: no sparse attention.

    python experiments/joint_recall.py --config=configs/mamba2_base.py

Paper: 36.6 % test accuracy after 400,000 steps. 67,184 parameters.
Here: three seeds with the recipe of `mamba2_hax`, 80,000 steps: results/joint_recall/mamba2_base_*.json.
Time: results/benchmarks/step.json has that of a step on one H200, padded and packed.

The released script trains the doubled width (`mamba2_base_double.py`) whenever there is no sparse attention;
this is the row that Table 3 calls Base.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment("mamba2_base", argument, **common.MAMBA2)
