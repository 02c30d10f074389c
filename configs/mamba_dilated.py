"""Table 3, Mamba +D: every `dilation`-th key.

    python experiments/joint_recall.py --config=configs/mamba_dilated.py

Paper: 7.8 % test accuracy after 400,000 steps. 82,368 parameters.
Time: results/benchmarks/step.json has that of a step on one H200, padded and packed.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment("mamba_dilated", argument, **common.MAMBA, sparse_arch="dilated")
