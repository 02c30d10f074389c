"""Mamba, Mamba-2 and Samba with the sparse attention branch; parameters named as in the original."""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from experiments.pytorch_baseline.attention import Draws, SparseAttention
from experiments.pytorch_baseline.kernels import Kernels
from experiments.pytorch_baseline.settings import Settings


@dataclasses.dataclass
class Output:
    """logits (b, t, vocab), the gate losses summed, hidden (b, t, d), and per layer what was collected."""

    logits: Any
    gate_loss: Any
    hidden: Any
    layers: list


class RMSNorm(nn.Module):
    """weight x / sqrt(mean(x^2) + eps) over the last axis."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x.to(self.weight.dtype), (x.shape[-1],), self.weight, self.eps)


class Mixer(nn.Module):
    """What the two state-space mixers share: the convolution, and the parameters of the sparse branch."""

    def __init__(self, settings: Settings, kernels: Kernels, channels: int):
        super().__init__()
        self.settings, self.kernels = settings, kernels
        inner, n = settings.inner_size, settings.state_size
        self.conv1d = nn.Conv1d(channels, channels, settings.conv_kernel, groups=channels)
        self.branch = SparseAttention(settings) if settings.sources else None
        if self.branch is not None:
            self.xx_proj = nn.Linear(inner, 2 * n, bias=False)
            self.E = nn.Parameter(torch.ones(inner))
        if "key_selection" in settings.sources:
            self.dx_proj_1 = nn.Linear(2 * n, 2 * n)
            self.dx_proj_2 = nn.Linear(2 * n, 2 * n)
            self.dx_proj_3 = nn.Linear(2 * n, 1)

    def convolve(self, x):
        return self.kernels.causal_conv1d(x, self.conv1d.weight, self.conv1d.bias)

    def attend(self, x, padding_mask, draws, train, collect):
        """What the branch adds to the scan's output before gate or norm, and its gate loss."""
        assert self.branch is not None
        attention, gate_loss = self.branch(self, x, padding_mask, draws, train, collect)
        if collect is not None:
            collect |= {"V": x.detach(), "attn_states": attention.detach()}
        return attention * self.E, gate_loss


class Mamba(Mixer):
    """Mamba-1 (arXiv 2312.00752, section 3.4)."""

    def __init__(self, settings: Settings, kernels: Kernels):
        inner, n, rank = settings.inner_size, settings.state_size, settings.time_step_rank
        super().__init__(settings, kernels, inner)
        self.in_proj = nn.Linear(settings.hidden_size, 2 * inner, bias=False)
        self.x_proj = nn.Linear(inner, rank + 2 * n, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, n + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, settings.hidden_size, bias=False)

    def forward(self, u, padding_mask, draws, train, collect):
        settings = self.settings
        x, gate = self.in_proj(u).chunk(2, dim=-1)
        x = hide_pads(self.convolve(hide_pads(x, padding_mask)), padding_mask)
        rank, n = settings.time_step_rank, settings.state_size
        dt, B, C = self.x_proj(x).split([rank, n, n], dim=-1)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        # The bias is added by the scan, so that kernels can do it in float32.
        dt = F.linear(dt, self.dt_proj.weight)
        y = self.kernels.selective_scan(x, dt, self.dt_proj.bias, A, B, C, self.D, gate)
        gate_loss = None
        if self.branch is not None:
            attended, gate_loss = self.attend(x, padding_mask, draws, train, collect)
            y = y + attended * F.silu(gate)
        return self.out_proj(y), gate_loss


class Mamba2(Mixer):
    """Mamba-2 (arXiv 2405.21060, section 7)."""

    def __init__(self, settings: Settings, kernels: Kernels):
        inner, heads = settings.inner_size, settings.num_heads
        channels = inner + 2 * settings.n_groups * settings.state_size
        super().__init__(settings, kernels, channels)
        self.in_proj = nn.Linear(settings.hidden_size, inner + channels + heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, heads + 1)))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner, settings.norm_eps)
        self.out_proj = nn.Linear(inner, settings.hidden_size, bias=False)

    def forward(self, u, padding_mask, draws, train, collect):
        settings = self.settings
        inner, heads = settings.inner_size, settings.num_heads
        width = settings.n_groups * settings.state_size
        if u.shape[0] == 1:
            # The original's fault: a batch of one row is not masked at all.
            padding_mask = None
        gate, xBC, dt = self.in_proj(hide_pads(u, padding_mask)).split(
            [inner, inner + 2 * width, heads], dim=-1
        )
        xBC = hide_pads(self.convolve(xBC), padding_mask)
        x, B, C = xBC.split([inner, width, width], dim=-1)
        groups = (*u.shape[:2], settings.n_groups, settings.state_size)
        y = self.kernels.ssd(
            x.reshape(*u.shape[:2], heads, settings.head_dim),
            dt,
            self.dt_bias,
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            B.reshape(groups),
            C.reshape(groups),
            self.D,
            settings.chunk_size,
        ).reshape(x.shape)
        gate_loss = None
        if self.branch is not None:
            attended, gate_loss = self.attend(x, padding_mask, draws, train, collect)
            y = y + attended
        y = self.kernels.gated_rms_norm(y, gate, self.norm.weight, self.norm.eps)
        return self.out_proj(y), gate_loss


class WindowAttention(nn.Module):
    """Softmax attention with rotary positions to oneself and the `attention_window` - 1 before."""

    def __init__(self, settings: Settings, kernels: Kernels):
        super().__init__()
        self.settings = settings
        size = settings.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(size, size, bias=False) for _ in range(4)
        )

    def forward(self, u, padding_mask, draws, train, collect):
        settings, (batch, length, size) = self.settings, u.shape
        heads = settings.attention_heads
        q, k, v = (
            projection(u).view(batch, length, heads, size // heads).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotate(x, settings.rope_theta) for x in (q, k))
        i = torch.arange(length, device=u.device)[:, None]
        j = torch.arange(length, device=u.device)
        visible = ((j <= i) & (i - j < settings.attention_window))[None, None]
        if padding_mask is not None:
            # A pad sees itself, so that its row is not empty; what comes of it is dropped below.
            visible = visible & (padding_mask[:, None, None] | (i == j))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        y = self.o_proj(y.transpose(1, 2).reshape(batch, length, size))
        return hide_pads(y, padding_mask), None


class SwiGLU(nn.Module):
    """(SiLU(x W_gate) x W_up) W_down."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + mixer(norm(x)), in Samba followed by x + mlp(norm(x))."""

    def __init__(self, settings: Settings, kernels: Kernels, index: int):
        super().__init__()
        self.arch = settings.arch
        norm = RMSNorm(settings.hidden_size, settings.norm_eps)
        if self.arch == "samba":
            self.mixer_norm = norm
            self.mixer = (WindowAttention if index % 2 else Mamba)(settings, kernels)
            self.mlp_norm = RMSNorm(settings.hidden_size, settings.norm_eps)
            self.mlp = SwiGLU(settings.hidden_size, settings.mlp_size)
        else:
            self.norm = norm
            self.mixer = (Mamba2 if self.arch == "mamba2" else Mamba)(settings, kernels)

    def forward(self, x, padding_mask, draws, train, collect):
        norm = self.mixer_norm if self.arch == "samba" else self.norm
        mixed, gate_loss = self.mixer(norm(x), padding_mask, draws, train, collect)
        if collect is not None:
            collect["mixer_out"] = mixed.detach()
        # Mamba-2's residual stream is float32 whatever the rest is.
        x = (x.float() if self.arch == "mamba2" else x) + mixed
        if self.arch == "samba":
            x = x + self.mlp(self.mlp_norm(x))
        return x, gate_loss


class LanguageModel(nn.Module):
    """An embedding, blocks, a norm, and the embedding again as output layer; in parity routing."""

    def __init__(self, settings: Settings, kernels: Kernels):
        super().__init__()
        self.settings = settings
        self.embeddings = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.layers = nn.ModuleList(Block(settings, kernels, index) for index in range(settings.num_layers))
        self.norm_f = RMSNorm(settings.hidden_size, settings.norm_eps)
        initialise(self)

    def forward(
        self,
        tokens,
        padding_mask=None,
        *,
        draws: list[Draws] | None = None,
        train: bool = False,
        collect: bool = False,
    ) -> Output:
        """Predicts the token after each position of tokens (b, t); padding_mask is True at real tokens."""
        draws = draws or [Draws() for _ in self.layers]
        x = self.embeddings(tokens)
        gate_loss, layers = torch.zeros((), device=x.device), []
        for block, layer_draws in zip(self.layers, draws, strict=True):
            collected: dict | None = {} if collect else None
            x, loss = block(x, padding_mask, layer_draws, train, collected)
            gate_loss = gate_loss if loss is None else gate_loss + loss
            layers.append(collected)
        hidden = self.norm_f(x)
        return Output(hidden @ self.embeddings.weight.T, gate_loss, hidden, layers)


def hide_pads(x, padding_mask):
    """x with zeros at pads."""
    return x if padding_mask is None else x * padding_mask[..., None].to(x.dtype)


def rotate(x, theta):
    """Turns feature f and feature f + p/2 of x (b, h, t, p) together by an angle that grows with t."""
    width = x.shape[-1]
    frequency = 1 / theta ** (torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angle = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@torch.no_grad()
def initialise(model: LanguageModel) -> None:
    """The original's initial values."""
    settings = model.settings
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=settings.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            if settings.arch == "mamba2":
                nn.init.normal_(module.weight, std=settings.initializer_range)
                nn.init.zeros_(module.bias)
            else:
                bound = settings.conv_kernel**-0.5
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.uniform_(module.bias, -bound, bound)
    for module in model.modules():
        if isinstance(module, Mamba):
            bound = settings.time_step_rank**-0.5
            nn.init.uniform_(module.dt_proj.weight, -bound, bound)
            _time_step_bias(module.dt_proj.bias, settings)
        elif isinstance(module, Mamba2):
            bound = settings.inner_size**-0.5 * settings.num_layers**-0.5
            nn.init.uniform_(module.out_proj.weight, -bound, bound)
            _time_step_bias(module.dt_bias, settings)


def _time_step_bias(bias, settings: Settings) -> None:
    """Biases whose softplus is log-uniform between the smallest and the largest time step."""
    low, high = math.log(settings.time_step_min), math.log(settings.time_step_max)
    step = torch.empty_like(bias).uniform_(low, high).exp().clamp(min=settings.time_step_floor)
    bias.copy_(step + torch.log(-torch.expm1(-step)))
