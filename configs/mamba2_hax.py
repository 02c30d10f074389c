"""Table 3, Mamba2 +HAX: locality-sensitive hashing and key selection together.

    python experiments/joint_recall.py --config=configs/mamba2_hax.py

Paper: 74.3 % test accuracy after 400,000 steps. 100,594 parameters.
Here: seeds 0, 1 and 2, 80,000 steps whose rate decays over the last 20,000: mean 99.11 %, worst 97.32 %;
results/joint_recall/mamba2_hax_lr0.002_seed*.json hold the command.
Time: the three side by side on packed rows of an H200 6 min 25 s; one alone, padded, 60,000 steps in 11 min.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment(
        "mamba2_hax", argument, **common.MAMBA2, sparse_arch="sign_bin_lsh+key_selection"
    )
