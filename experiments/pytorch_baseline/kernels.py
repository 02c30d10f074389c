"""The three operations that have kernels of their own, and which form of each is used.

With mamba_ssm and causal_conv1d installed, their kernels; else the same in plain PyTorch. `Kernels.used`
says which, operation by operation: nothing falls back in silence.
"""

import importlib.metadata

import torch
import torch.nn.functional as F

# Why a package cannot be used, where it cannot.
MISSING: dict[str, str] = {}
try:
    from causal_conv1d import causal_conv1d_fn
except ImportError as error:
    causal_conv1d_fn, MISSING["causal_conv1d"] = None, str(error)
try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError as error:
    selective_scan_fn = rmsnorm_fn = mamba_chunk_scan_combined = None
    MISSING["mamba_ssm"] = str(error)

PLAIN = "plain PyTorch"


class Kernels:
    """Convolution, scans and the gated norm, each by the installed kernel or in plain PyTorch.

    Args:
      installed: whether to use installed kernels at all. They round products of float32 inputs to TF32,
        so a comparison in float32 goes without.
      device, dtype: what they will be used on.

    Attributes:
      used: the form of each operation, in words.
    """

    def __init__(self, installed: bool, device: torch.device, dtype: torch.dtype):
        use = installed and device.type == "cuda"
        packages = {
            "causal_conv1d": "causal_conv1d",
            "selective_scan": "mamba_ssm",
            "ssd": "mamba_ssm",
            "gated_rms_norm": "mamba_ssm",
        }
        self.used: dict[str, str] = {}
        for name, package in packages.items():
            if use:
                refused = MISSING.get(package) or _refusal(name, device, dtype)
                self.used[name] = f"{PLAIN} ({package}: {refused})" if refused else _named(package)
            else:
                self.used[name] = PLAIN

    def _has(self, name: str) -> bool:
        return not self.used[name].startswith(PLAIN)

    def causal_conv1d(self, x, weight, bias):
        """SiLU of the causal depthwise filter: x (b, t, c), weight (c, 1, w), bias (c,) -> (b, t, c)."""
        x = x.transpose(1, 2)
        if self._has("causal_conv1d"):
            y = causal_conv1d_fn(x, weight[:, 0], bias, activation="silu")
        else:
            width = weight.shape[-1]
            y = F.silu(F.conv1d(x, weight, bias, padding=width - 1, groups=x.shape[1])[..., : x.shape[2]])
        return y.transpose(1, 2)

    def selective_scan(self, x, dt, dt_bias, A, B, C, D, gate):
        """Mamba's recurrence, skip and gate.

        x, dt, gate (b, t, e), dt before its bias and softplus; A (e, n); B, C (b, t, n); D, dt_bias (e,).
        """
        if self._has("selective_scan"):
            turned = (array.transpose(1, 2).contiguous() for array in (x, dt, B, C, gate))
            x, dt, B, C, gate = turned
            y = selective_scan_fn(
                x, dt, A, B, C, D.float(), z=gate, delta_bias=dt_bias.float(), delta_softplus=True
            )
            return y.transpose(1, 2)
        wide = _wide(x.dtype)
        step = F.softplus(dt.to(wide) + dt_bias.to(wide))
        y = plain_selective_scan(x.to(wide), step, A.to(wide), B.to(wide), C.to(wide))
        return ((y + D.to(wide) * x) * F.silu(gate.to(wide))).to(x.dtype)

    def ssd(self, x, dt, dt_bias, A, B, C, D, chunk_size):
        """Mamba-2's recurrence and skip.

        x (b, t, h, p); dt (b, t, h) before its bias and softplus; A, D, dt_bias (h,); B, C (b, t, g, n).
        """
        if self._has("ssd"):
            return mamba_chunk_scan_combined(
                x, dt, A, B, C, chunk_size=chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True
            )
        wide = _wide(x.dtype)
        step = F.softplus(dt.to(wide) + dt_bias.to(wide))
        y, _ = plain_ssd(x.to(wide), step, A.to(wide), B.to(wide), C.to(wide), chunk_size)
        return (y + D.to(wide)[:, None] * x).to(x.dtype)

    def gated_rms_norm(self, x, gate, weight, eps):
        """weight u / sqrt(mean(u^2) + eps) over the last axis, with u = x SiLU(gate)."""
        if self._has("gated_rms_norm"):
            return rmsnorm_fn(x, weight, None, z=gate, eps=eps, norm_before_gate=False)
        wide = _wide(x.dtype)
        u = x.to(wide) * F.silu(gate.to(wide))
        return (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps) * weight.to(wide)).to(x.dtype)


def plain_selective_scan(x, dt, A, B, C):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t, one position after the other."""
    state = torch.zeros(x.shape[0], x.shape[2], A.shape[1], dtype=x.dtype, device=x.device)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)
        state = decay * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1)


def plain_ssd(x, dt, A, B, C, chunk_size):
    """The same recurrence with one decay a head, in chunks: matrices within, a state from one to the next.

    Returns y (b, t, h, p) and the last state (b, h, p, n).
    """
    batch, length, heads, _ = x.shape
    B, C = (array.repeat_interleave(heads // array.shape[2], dim=2) for array in (B, C))
    u = x * dt[..., None]
    state = torch.zeros(batch, heads, x.shape[3], B.shape[3], dtype=x.dtype, device=x.device)
    outputs = []
    for begin in range(0, length, chunk_size):
        part = slice(begin, min(begin + chunk_size, length))
        # log of the decay from the chunk's start up to and including each position, (b, h, t).
        total = torch.cumsum((dt[:, part] * A).transpose(1, 2), dim=-1)
        size = total.shape[-1]
        past = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
        between = (total[..., :, None] - total[..., None, :]).masked_fill(~past, float("-inf"))
        weights = torch.einsum("bihn,bjhn->bhij", C[:, part], B[:, part]) * torch.exp(between)
        within = torch.einsum("bhij,bjhp->bihp", weights, u[:, part])
        carried = torch.einsum("bihn,bhpn,bhi->bihp", C[:, part], state, torch.exp(total))
        outputs.append(within + carried)
        left = torch.exp(total[..., -1:] - total)
        added = torch.einsum("bjhn,bjhp,bhj->bhpn", B[:, part], u[:, part], left)
        state = state * torch.exp(total[..., -1])[..., None, None] + added
    return torch.cat(outputs, dim=1), state


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _named(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why an installed kernel cannot be used here; empty if it can. A build may lack a dtype."""
    try:
        x = torch.zeros(1, 16, 16, dtype=dtype, device=device)
        vector, matrix = x[0, 0], torch.zeros(16, 16, device=device)
        if name == "causal_conv1d":
            causal_conv1d_fn(x, torch.zeros(16, 4, dtype=dtype, device=device), vector, activation="silu")
        elif name == "selective_scan":
            selective_scan_fn(x, x, matrix, x, x, matrix[0], z=x, delta_bias=matrix[0], delta_softplus=True)
    except (RuntimeError, TypeError, ValueError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
