"""Table 3, Mamba +KS: the keys that a learnt scorer ranks highest.

    python experiments/joint_recall.py --config=configs/mamba_key_selection.py

Paper: 36.6 % test accuracy after 400,000 steps. 86,658 parameters.
Time: results/benchmarks/step.json has that of a step on one H200, padded and packed.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment("mamba_key_selection", argument, **common.MAMBA, sparse_arch="key_selection")
