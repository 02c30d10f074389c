"""Table 3, Mamba2 +LSH: keys with the query's hash code.

    python experiments/joint_recall.py --config=configs/mamba2_lsh.py

Paper: 13.5 % test accuracy after 400,000 steps. 83,824 parameters.
Time: results/benchmarks/step.json has that of a step on one H200, padded and packed.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment("mamba2_lsh", argument, **common.MAMBA2, sparse_arch="sign_bin_lsh")
