"""Which part of the model a kernel belongs to: kernel -> HLO instruction -> named scope -> part.

The code of the project stands in named scopes (`jax.named_scope`); XLA keeps them in each instruction's
`op_name`, through differentiation too. A fusion counts wholly as the part of its own `op_name`, or where it
has none as the part that most of its instructions belong to.
"""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.trace import Event

OTHER = "other"
COPIES = "copies"
UNNAMED = "unnamed kernels"

# From scopes to parts. The innermost scope of these decides; one with several parts looks further out.
_PARTS: dict[str, str | tuple[tuple[str, str], ...]] = {
    "materialize": "data",
    "embedding": "embedding",
    "head": "head_and_loss",
    "loss": "head_and_loss",
    "norm": "norms",
    "linear": (
        ("key_scorer", "key_scorer"),
        ("hax", "hax_projection"),
        ("mlp", "mlp"),
        ("", "projections"),
    ),
    "causal_conv1d": "convolution",
    "ssd": "scan",
    "selective_scan": "scan",
    "hash": "hashing",
    "bucket_orders": "hashing",
    "query_summary": "key_scorer",
    "normed_running_sum": "key_scorer",
    "key_scorer": "key_scorer",
    "key_scores": "key_scorer",
    "key_lifetimes": "lifetimes",
    "gate_loss": "gate_loss",
    "sparse_attention": "attention",
    "mlp": "mlp",
    "mixer": "mixer_glue",
    "hax": "branch_glue",
    "block": "residual",
    "packing": "packing",
    "recall": "recall",
    "draw": "draws",
    "optimizer": "optimizer",
    "update": "optimizer",
}
# A kernel inside of these, a CUDA graph above all, may come under their name, which says nothing.
_HOLDERS = ("call", "while", "conditional", "command_buffer", "async")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLS = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def part_of(op_name: str) -> str:
    """The part that an instruction's scopes say, such as 'scan' for 'jit(step)/transpose(jvp(ssd))/dot'."""
    scopes = re.findall(r"[A-Za-z_][A-Za-z_0-9]*", op_name)
    for index in range(len(scopes) - 1, -1, -1):
        part = _PARTS.get(scopes[index])
        if isinstance(part, tuple):
            around = set(scopes[:index])
            return next(name for scope, name in part if not scope or scope in around)
        if part is not None:
            return part
    return OTHER


def of_program(hlo: str) -> dict[str, str]:
    """Part by instruction name, for every instruction of a compiled program's text."""
    parts: dict[str, str] = {}
    inside: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    unnamed: dict[str, str | None] = {}
    computation = ""
    for line in hlo.splitlines():
        if match := _INSTRUCTION.match(line):
            name = match[1]
            if name.startswith(_HOLDERS):
                continue
            if named := _OP_NAME.search(line):
                parts[name] = part_of(named[1])
                inside[computation][parts[name]] += 1
            else:
                calls = _CALLS.search(line)
                unnamed[name] = calls[1] if calls else None
        elif match := _COMPUTATION.match(line):
            computation = match[1]
    for name, called in unnamed.items():
        votes = inside[called] if called else collections.Counter()
        if len(votes) > 1:
            # A slice of the vector of parameters, which says nothing, may be fused with a kernel that does.
            del votes[OTHER]
        # Copies are the compiler's own: between layouts, and of what a loop carries.
        is_copy = name.startswith(("copy", "wrapped_copy", "loop_copy", "loop_transpose", "input_transpose"))
        parts[name] = votes.most_common(1)[0][0] if votes else COPIES if is_copy else OTHER
    return parts


def breakdown(events: Sequence[Event], parts: Mapping[str, str], calls: int) -> dict[str, Any]:
    """Seconds and kernels a call by part, largest first, and the kernels whose part is unknown by name."""
    # A kernel is named after its instruction, with everything but letters and digits turned into '_'.
    by_kernel = {_kernel_name(name): part for name, part in parts.items()}
    seconds: dict[str, float] = collections.defaultdict(float)
    kernels: collections.Counter[str] = collections.Counter()
    unknown: dict[str, float] = collections.defaultdict(float)
    for event in events:
        part = parts.get(event.op or "") or by_kernel.get(_kernel_name(event.name))
        if part is None:
            part = UNNAMED
            unknown[event.name[:80]] += event.seconds
        seconds[part] += event.seconds
        kernels[part] += 1
    return {
        "parts": {
            name: {"seconds": value / calls, "kernels": kernels[name] / calls}
            for name, value in _largest(seconds)
        },
        "unnamed": {name: value / calls for name, value in _largest(unknown)[:12]},
    }


def longest(events: Iterable[Event], calls: int, count: int = 12) -> dict[str, float]:
    """The kernels that take longest in all, in seconds a call."""
    seconds: dict[str, float] = collections.defaultdict(float)
    for event in events:
        seconds[event.op or event.name[:80]] += event.seconds
    return {name: value / calls for name, value in _largest(seconds)[:count]}


def _largest(values: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(values.items(), key=lambda item: -item[1])


def _kernel_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", name)
