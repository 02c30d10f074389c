"""Table 3, Samba: Mamba and sliding-window attention in turn, an MLP after each.

    python experiments/joint_recall.py --config=configs/samba.py

Paper: 6.3 % test accuracy after 400,000 steps. 131,360 parameters.
Time: results/benchmarks/step.json has that of a step on one H200, padded and packed.

Chance is 6.25 %: the paper's run does not learn the task.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment(
        "samba", argument, arch="samba", hidden_size=32, num_layers=4, state_size=16, initializer_range=0.02
    )
