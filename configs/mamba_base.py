"""Table 3, Mamba, Base: no sparse attention.

    python experiments/joint_recall.py --config=configs/mamba_base.py

Paper: 16.3 % test accuracy after 400,000 steps. 73,920 parameters.
Time: results/benchmarks/step.json has that of a step on one H200, padded and packed.

The released script trains the doubled width (`mamba_base_double.py`) whenever there is no sparse attention;
this is the row that Table 3 calls Base.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment("mamba_base", argument, **common.MAMBA)
