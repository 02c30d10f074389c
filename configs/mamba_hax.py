"""Table 3, Mamba +HAX: locality-sensitive hashing and key selection together.

    python experiments/joint_recall.py --config=configs/mamba_hax.py

Paper: 38.0 % test accuracy after 400,000 steps. 86,658 parameters.
Time: results/benchmarks/step.json has that of a step on one H200, padded and packed.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment("mamba_hax", argument, **common.MAMBA, sparse_arch="sign_bin_lsh+key_selection")
