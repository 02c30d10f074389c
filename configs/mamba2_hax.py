"""Table 3, Mamba2 +HAX: locality-sensitive hashing and key selection together.

    python experiments/joint_recall.py --config=configs/mamba2_hax.py

Paper: 74.3 % test accuracy after 400,000 steps. 100,594 parameters.
Time: on one H200 115 steps a second, so about an hour; 60,000 steps, a test accuracy of 99.05 %, took
11 minutes (results/joint_recall/mamba2_hax.json).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment(
        "mamba2_hax", argument, **common.MAMBA2, sparse_arch="sign_bin_lsh+key_selection"
    )
