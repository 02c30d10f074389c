"""Table 3, Mamba2 +KS: the keys that a learnt scorer ranks highest.

    python experiments/joint_recall.py --config=configs/mamba2_key_selection.py

Paper: 60.1 % test accuracy after 400,000 steps. 100,594 parameters.
Time: results/benchmarks/step.json has that of a step on one H200, padded and packed.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment("mamba2_key_selection", argument, **common.MAMBA2, sparse_arch="key_selection")
