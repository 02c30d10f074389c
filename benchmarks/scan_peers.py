"""Other people's kernels of the two recurrences, where they are installed; nothing of the project needs them.

`mamba_ssm` (PyTorch: a CUDA selective scan, a Triton SSD; Apache-2.0) and `jax-linear-attention` (its
Mosaic GPU form of Mamba-1). Inputs come as JAX arrays in this project's layout and are turned into what the
peer wants before anything is timed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Peer:
    """One other implementation of an op.

    Attributes:
      name: as it stands in results.
      prepare: from our arguments (x, dt, A, B, C, dy) to its own.
      forward, forward_backward: of those arguments; the output first.
      wait: waits for a result.
      output: its output as ours, (b, t, e) or (b, t, h, p), on the host.
    """

    name: str
    prepare: Callable[..., tuple]
    forward: Callable[..., Any]
    forward_backward: Callable[..., Any]
    wait: Callable[[Any], Any]
    output: Callable[[Any], np.ndarray]


def selective_scan_peers() -> tuple[list[Peer], dict[str, str]]:
    """The peers that are there, and why the others are not."""
    return _those_there({"mamba_ssm": _mamba_ssm_selective_scan, "jax_linear_attention": _jla_mamba})


def ssd_peers() -> tuple[list[Peer], dict[str, str]]:
    """The peers that are there, and why the others are not."""
    return _those_there({"mamba_ssm": _mamba_ssm_ssd})


def _those_there(makers: dict[str, Callable[[], Peer]]) -> tuple[list[Peer], dict[str, str]]:
    peers, absent = [], {}
    for name, make in makers.items():
        try:
            peers.append(make())
        except Exception as error:
            # An optional package can fail in many ways as it is imported: for want of a GPU, of a library.
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return peers, absent


def _mamba_ssm_selective_scan() -> Peer:
    import torch
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def prepare(x, dt, A, B, C, dy):
        # Theirs is (b, e, t).
        time_last = [_to_torch(array).transpose(1, 2).contiguous() for array in (x, dt, B, C, dy)]
        x, dt, B, C, dy = time_last
        inputs = [array.requires_grad_() for array in (x, dt, _to_torch(A), B, C)]
        return (*inputs, dy)

    def forward(x, dt, A, B, C, dy):
        del dy
        with torch.no_grad():
            return selective_scan_fn(x, dt, A, B, C)

    def forward_backward(x, dt, A, B, C, dy):
        out = selective_scan_fn(x, dt, A, B, C)
        return out, *torch.autograd.grad(out, (x, dt, A, B, C), dy)

    return Peer(
        "mamba_ssm",
        prepare,
        forward,
        forward_backward,
        _wait_for_torch,
        lambda out: out.detach().float().transpose(1, 2).cpu().numpy(),
    )


def _mamba_ssm_ssd() -> Peer:
    import torch
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    # Their recommended chunk; smaller ones are slower.
    chunk = 256

    def prepare(*arrays):
        *inputs, dy = (_to_torch(array) for array in arrays)
        return (*(array.requires_grad_() for array in inputs), dy)

    def forward(x, dt, A, B, C, dy):
        del dy
        with torch.no_grad():
            return mamba_chunk_scan_combined(x, dt, A, B, C, chunk)

    def forward_backward(x, dt, A, B, C, dy):
        out = mamba_chunk_scan_combined(x, dt, A, B, C, chunk)
        return out, *torch.autograd.grad(out, (x, dt, A, B, C), dy)

    return Peer(
        "mamba_ssm",
        prepare,
        forward,
        forward_backward,
        _wait_for_torch,
        lambda out: out.detach().float().cpu().numpy(),
    )


def _jla_mamba() -> Peer:
    from jla import ops

    def scan(x, dt, A, B, C):
        return ops.linear_attention("mamba1", C, B, x, dt=dt, a=A, impl="mosaic_gpu")[0]

    def forward_backward(x, dt, A, B, C, dy):
        out, pull = jax.vjp(scan, x, dt, A, B, C)
        return out, *pull(dy.astype(out.dtype))

    return Peer(
        "jax_linear_attention",
        lambda *arrays: arrays,
        jax.jit(lambda x, dt, A, B, C, dy: scan(x, dt, A, B, C)),
        jax.jit(forward_backward),
        jax.block_until_ready,
        lambda out: np.asarray(out, np.float32),
    )


def _to_torch(array: jax.Array) -> Any:
    """The array's numbers on PyTorch's GPU, in the same dtype."""
    import torch

    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[array.dtype.name]
    return torch.from_numpy(np.array(array, np.float32)).to("cuda", dtype)


def _wait_for_torch(result: Any) -> None:
    import torch

    del result
    torch.cuda.synchronize()
