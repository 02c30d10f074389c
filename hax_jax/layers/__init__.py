"""Flax NNX modules: the mixers, the sparse attention branch, and the small layers they are made of."""

from hax_jax.layers.hax import BranchOutput, HashProjection, HaxBranch, RoutingDraws, with_gate_losses
from hax_jax.layers.linear import Embedding, Linear
from hax_jax.layers.mamba import Mamba
from hax_jax.layers.mamba2 import Mamba2
from hax_jax.layers.norms import GatedRMSNorm, RMSNorm
from hax_jax.layers.precision import Precision
from hax_jax.layers.samba import SwiGLU, WindowAttention
from hax_jax.layers.sequence import Sequence

__all__ = [
    "BranchOutput",
    "Embedding",
    "GatedRMSNorm",
    "HashProjection",
    "HaxBranch",
    "Linear",
    "Mamba",
    "Mamba2",
    "Precision",
    "RMSNorm",
    "RoutingDraws",
    "Sequence",
    "SwiGLU",
    "WindowAttention",
    "with_gate_losses",
]
