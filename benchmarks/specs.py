"""What is measured: shapes and configs by name, each with where it comes from."""

import dataclasses

KIBI = 1024


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """One call of the sparse attention module, one head.

    Attributes:
      name: as it stands in results.
      batch: rows.
      length: tokens a row.
      key_width: n, the width of queries and keys.
      value_width: e.
      source: where the shape comes from.
      sparse_keys: keys a query may see, half through hash buckets, half through key selection.
      num_hash: sign bits of a hash code.
    """

    name: str
    batch: int
    length: int
    key_width: int
    value_width: int
    source: str
    sparse_keys: int = 64
    num_hash: int = 8

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def keys_per_source(self) -> int:
        return self.sparse_keys // 2


@dataclasses.dataclass(frozen=True)
class SelectiveScanShape:
    """One call of Mamba-1's recurrence."""

    name: str
    batch: int
    length: int
    channels: int
    state: int
    source: str


@dataclasses.dataclass(frozen=True)
class SSDShape:
    """One call of Mamba-2's chunked form."""

    name: str
    batch: int
    length: int
    heads: int
    head_width: int
    groups: int
    state: int
    chunk_size: int
    source: str


_LONG = "this project's long-context goal: one head of 64, the width that suits cuDNN's attention best"
LONG = tuple(
    AttentionShape(name, 1, length * KIBI, 64, 64, _LONG)
    for name, length in (("1K", 1), ("4K", 4), ("16K", 16), ("64K", 64), ("256K", 256), ("1M", 1024))
)
JOINT_RECALL = AttentionShape(
    "joint_recall", 64, 1057, 32, 128, "a batch of mamba2+HAX on joint recall: 64 items padded to 1,057"
)
# cuDNN refuses that length and those widths; this is the nearest it takes.
JOINT_RECALL_CUDNN = AttentionShape(
    "joint_recall_cudnn", 64, 1088, 64, 64, "the joint recall batch in the nearest form that cuDNN takes"
)
# Errors are looked at where a whole t x t mask is cheap.
CHECKED = AttentionShape("4K", 1, 4 * KIBI, 64, 64, _LONG)

TINY_LONG = (
    AttentionShape("64", 1, 64, 16, 16, "tests", sparse_keys=8, num_hash=3),
    AttentionShape("128", 1, 128, 16, 16, "tests", sparse_keys=8, num_hash=3),
)
TINY_JOINT_RECALL = AttentionShape("joint_recall", 2, 43, 16, 32, "tests", sparse_keys=8, num_hash=3)

_TABLE = "Table 3 of HAX (arXiv 2507.00449) on joint recall, 64 items padded to 1,057"
SELECTIVE_SCANS = (
    SelectiveScanShape("joint_recall", 64, 1057, 128, 16, _TABLE),
    SelectiveScanShape("joint_recall_double", 64, 1057, 256, 16, _TABLE),
    SelectiveScanShape("mamba_370m", 8, 2048, 2048, 16, "Mamba 370M (arXiv 2312.00752): width 1,024 x 2"),
)
SSDS = (
    SSDShape("joint_recall", 64, 1057, 8, 16, 1, 32, 64, _TABLE),
    SSDShape("joint_recall_double", 64, 1057, 8, 32, 1, 32, 64, _TABLE),
    SSDShape(
        "mamba2_370m", 8, 2048, 32, 64, 1, 128, 256, "Mamba-2 370M (arXiv 2405.21060): heads of 64, state 128"
    ),
)
TINY_SELECTIVE_SCANS = (SelectiveScanShape("tiny", 2, 37, 8, 4, "tests"),)
TINY_SSDS = (SSDShape("tiny", 2, 37, 2, 4, 1, 8, 16, "tests"),)

# The rows of Table 3, in the order in which they are measured: those with a goal first.
STEP_CONFIGS = (
    "mamba2_hax",
    "mamba_hax",
    "mamba2_base",
    "mamba_base",
    "mamba2_key_selection",
    "mamba2_lsh",
    "mamba2_base_double",
    "samba",
    "mamba2_sliding_window",
    "mamba2_dilated",
    "mamba2_sliding_window_dilated",
    "mamba2_sliding_window_sink",
    "mamba_key_selection",
    "mamba_lsh",
    "mamba_base_double",
    "mamba_sliding_window",
    "mamba_dilated",
    "mamba_sliding_window_dilated",
    "mamba_sliding_window_sink",
)
