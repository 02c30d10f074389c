"""Table 3, Mamba2 +SW: the most recent keys.

    python experiments/joint_recall.py --config=configs/mamba2_sliding_window.py

Paper: 70.6 % test accuracy after 400,000 steps. 83,824 parameters.
Time: results/benchmarks/step.json has that of a step on one H200, padded and packed.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment("mamba2_sliding_window", argument, **common.MAMBA2, sparse_arch="sliding_window")
