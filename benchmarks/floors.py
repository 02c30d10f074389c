"""The least that a piece of work can take: bytes that must move and operations that must be done.

A fused part reads its inputs I once and writes its outputs O once. Its backward pass reads the inputs again
(everything between is computed anew), reads the gradients of the outputs and writes those of the inputs. So
a part moves I + O bytes forward and 3 I + 2 O in both directions; its matmuls are done three times over.
Over the copy and matmul rates measured in the same run this gives two times; the larger one is the floor.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.specs import AttentionShape, SelectiveScanShape, SSDShape
from hax_jax.config import Experiment, ModelConfig

BFLOAT16, FLOAT32 = 2, 4
# Codes of query and key, count, order, expiry: what the choice of keys hands to the attention.
_INTEGERS = 5 * 4


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes moved and floating-point operations done; `a + b` and `n * a` as one expects."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __rmul__(self, factor: float) -> "Work":
        return Work(factor * self.bytes, factor * self.flops)

    def seconds(self, ceilings: Mapping[str, Any]) -> float:
        """The floor on a device with these ceilings."""
        return max(self.bytes / ceilings["copy_bytes_per_s"], self.flops / ceilings["matmul_flops_per_s"])

    def report(self, ceilings: Mapping[str, Any]) -> dict[str, float]:
        """The numbers as they stand in results."""
        return {"bytes": self.bytes, "flops": self.flops, "seconds": self.seconds(ceilings)}


def both_ways(inputs: float, outputs: float, flops: float = 0.0) -> Work:
    """Forward and backward work of a fused part, from its inputs, outputs and forward operations."""
    return Work(3 * inputs + 2 * outputs, 3 * flops)


def attention(
    shape: AttentionShape, pairs: float, *, backward: bool, out_bytes: int, is_sparse: bool
) -> Work:
    """The work of one call of an attention module.

    Args:
      shape: widths and tokens; inputs are bfloat16.
      pairs: visible (query, key) pairs in all.
      backward: with the gradients of q, k and v.
      out_bytes: bytes of one number of the output and of its gradient.
      is_sparse: with scores and hash projection, without materialised integers: they are no one's input.
    """
    n, e, tokens = shape.key_width, shape.value_width, shape.tokens
    inputs = tokens * (2 * n + e) * BFLOAT16 + (tokens * FLOAT32 if is_sparse else 0)
    outputs = tokens * e * out_bytes
    hashing = 2 * tokens * 2 * n * shape.num_hash if is_sparse else 0
    flops = 2 * (n + e) * pairs + hashing
    if not backward:
        return Work(inputs + outputs, flops)
    # As one program: q, k, v and the output's gradient come in; the output and three gradients go out.
    gradients = tokens * (2 * n + e) * BFLOAT16
    return Work(inputs + 2 * outputs + gradients, flops + 2 * (3 * n + 2 * e) * pairs)


def selective_scan(shape: SelectiveScanShape, *, backward: bool) -> Work:
    """Mamba-1's recurrence as one program: x, dt, B, C and y bfloat16. Its arithmetic is no matmul."""
    e, n = shape.channels, shape.state
    inputs, outputs = BFLOAT16 * (2 * e + 2 * n), BFLOAT16 * e
    return (shape.batch * shape.length) * Work((2 if backward else 1) * (inputs + outputs))


def ssd(shape: SSDShape, *, backward: bool) -> Work:
    """Mamba-2's chunked form as one program: x, dt, B, C and y bfloat16, matmuls over half a chunk."""
    e, group = shape.heads * shape.head_width, shape.groups * shape.state
    inputs, outputs = BFLOAT16 * (e + shape.heads + 2 * group), BFLOAT16 * e
    flops = shape.chunk_size * (group + e) + 4 * e * shape.state
    factor = 2 if backward else 1
    return (shape.batch * shape.length) * Work(factor * (inputs + outputs), (3 if backward else 1) * flops)


def step(experiment: Experiment, positions: float, num_parameters: int) -> dict[str, Work]:
    """The work of one training step by part, for so many positions (pads included, where there are any).

    The residual stream is float32, what enters a matmul or a recurrence is bfloat16, norms, gates and
    softmax are fused into their neighbours, and logits are never written.
    """
    model = experiment.model
    d = model.hidden_size
    parts: dict[str, Work] = {
        "data": Work(2 * 10 * positions),
        "embedding": Work((4 + 2 * FLOAT32 * d) * positions),
        "head_and_loss": positions * both_ways(FLOAT32 * d, 4, 2 * d * model.vocab_size),
        # Parameter, gradient and two moments are read, all but the gradient are written; the gradient was.
        "optimizer": Work(8 * FLOAT32 * num_parameters, 12 * num_parameters),
    }
    for index in range(model.num_layers):
        for name, work in _layer(model, index).items():
            parts[name] = parts.get(name, Work()) + positions * work
    return parts


def total(parts: Mapping[str, Work]) -> Work:
    """The work of all parts."""
    return sum(parts.values(), start=Work())


def _layer(model: ModelConfig, index: int) -> dict[str, Work]:
    """Work of one block for one position."""
    if model.arch == "samba":
        mixer = _window_attention(model) if index % 2 else _mamba(model)
        return mixer | {"mlp": _mlp(model)}
    mixer = _mamba2(model) if model.arch == "mamba2" else _mamba(model)
    return mixer | (_branch(model) if model.sources else {})


def _out_projection(model: ModelConfig) -> Work:
    """Output of the recurrence, the branch's where there is one, gate and residual in; residual out."""
    d, e = model.hidden_size, model.inner_size
    gathered = BFLOAT16 * e * (3 if model.sources else 2)
    return both_ways(gathered, FLOAT32 * d, 2 * e * d) + Work(FLOAT32 * d)


def _mamba2(model: ModelConfig) -> dict[str, Work]:
    d, e, n, heads = model.hidden_size, model.inner_size, model.state_size, model.num_heads
    group = model.n_groups * n
    conv = e + 2 * group
    into = both_ways(FLOAT32 * d, BFLOAT16 * (e + conv + heads), 2 * d * (e + conv + heads))
    # On average half a chunk lies before a position: scores and values, then state in and state out.
    scan = model.chunk_size * (group + e) + 4 * e * n
    return {
        "projections": into + _out_projection(model),
        "convolution": both_ways(BFLOAT16 * conv, BFLOAT16 * conv, 2 * model.conv_kernel * conv),
        "scan": both_ways(BFLOAT16 * (conv + heads), BFLOAT16 * e, scan),
    }


def _mamba(model: ModelConfig) -> dict[str, Work]:
    d, e, n, rank = model.hidden_size, model.inner_size, model.state_size, model.time_step_rank
    into = both_ways(FLOAT32 * d, BFLOAT16 * 2 * e, 4 * d * e)
    small = both_ways(BFLOAT16 * e, BFLOAT16 * (rank + 2 * n), 2 * e * (rank + 2 * n))
    # The time step is computed from its low rank where it is used. The recurrence: decay, add, read out.
    scan = both_ways(BFLOAT16 * (e + rank + 2 * n), BFLOAT16 * e, 2 * rank * e + 7 * e * n)
    return {
        "projections": into + small + _out_projection(model),
        "convolution": both_ways(BFLOAT16 * e, BFLOAT16 * e, 2 * model.conv_kernel * e),
        "scan": scan,
    }


def _branch(model: ModelConfig) -> dict[str, Work]:
    e, n, sources = model.inner_size, model.state_size, model.sources
    keys_and_queries = BFLOAT16 * 2 * n
    parts = {
        "hax_projection": both_ways(BFLOAT16 * e, keys_and_queries, 4 * e * n),
        "attention": both_ways(keys_and_queries + BFLOAT16 * e, BFLOAT16 * e + FLOAT32)
        + Work(2 * _INTEGERS, 2 * (n + e) * model.sparse_keys + 2 * (3 * n + 2 * e) * model.sparse_keys),
    }
    if "sign_bin_lsh" in sources:
        parts["hashing"] = Work(keys_and_queries + 4 * 4, 4 * n * model.num_hash)
    if "key_selection" in sources:
        # Gradients reach the scorer at the sampled keys alone.
        parts["key_scorer"] = Work(keys_and_queries + FLOAT32, 4 * n * (4 * n + 1))
        parts["lifetimes"] = Work(2 * FLOAT32)
        parts["gate_loss"] = Work(keys_and_queries, 2 * n * model.keys_per_source)
    return parts


def _window_attention(model: ModelConfig) -> dict[str, Work]:
    d, window = model.hidden_size, model.attention_window
    into = both_ways(FLOAT32 * d, BFLOAT16 * 3 * d, 6 * d * d)
    out = both_ways(BFLOAT16 * d, FLOAT32 * d, 2 * d * d) + Work(FLOAT32 * d)
    attend = both_ways(BFLOAT16 * 3 * d, BFLOAT16 * d) + Work(0, (4 + 10) * d * window)
    return {"projections": into + out, "attention": attend}


def _mlp(model: ModelConfig) -> Work:
    d = model.hidden_size
    return both_ways(FLOAT32 * d, FLOAT32 * d, 6 * d * model.mlp_size) + Work(FLOAT32 * d)
