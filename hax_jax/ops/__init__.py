"""Pure functions on arrays: the state-space recurrences, the choice of keys, the attention over them.

`README.md` beside this file holds the legend of shape letters and each op's contract.
"""

from hax_jax.ops.causal_conv1d import causal_conv1d
from hax_jax.ops.gated_rms_norm import gated_rms_norm
from hax_jax.ops.key_scores import key_scores
from hax_jax.ops.key_selection import key_lifetimes, key_lifetimes_and_alive, ranking_loss
from hax_jax.ops.lsh import argmax_hash, bucket_orders, sign_hash
from hax_jax.ops.normed_running_sum import normed_running_sum
from hax_jax.ops.selective_scan import selective_scan
from hax_jax.ops.sparse_attention import (
    Dilated,
    Full,
    HashBuckets,
    KeySet,
    Lifetimes,
    Sink,
    SlidingWindow,
    sparse_attention,
)
from hax_jax.ops.ssd import ssd

__all__ = [
    "Dilated",
    "Full",
    "HashBuckets",
    "KeySet",
    "Lifetimes",
    "Sink",
    "SlidingWindow",
    "argmax_hash",
    "bucket_orders",
    "causal_conv1d",
    "gated_rms_norm",
    "key_lifetimes",
    "key_lifetimes_and_alive",
    "key_scores",
    "normed_running_sum",
    "ranking_loss",
    "selective_scan",
    "sign_hash",
    "sparse_attention",
    "ssd",
]
