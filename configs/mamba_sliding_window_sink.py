"""Table 3, Mamba +A: the most recent keys and the first ones.

    python experiments/joint_recall.py --config=configs/mamba_sliding_window_sink.py

Paper: 16.4 % test accuracy after 400,000 steps. 82,368 parameters.
Time: results/benchmarks/step.json has that of a step on one H200, padded and packed.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The settings of this row; the arguments are explained in `configs/common.py`."""
    return common.experiment(
        "mamba_sliding_window_sink", argument, **common.MAMBA, sparse_arch="sliding_window+sink"
    )
