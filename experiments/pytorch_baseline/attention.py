"""The sparse attention branch with dense masks, as in the paper: one (t, t) matrix a source.

Its faults are the original's: hashing and the key scorer look at the whole padded row, the projection is
drawn anew at every call, and a query that sees no key attends to all positions alike.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from experiments.pytorch_baseline.settings import Settings


@dataclasses.dataclass
class Draws:
    """The random arrays of one call of one branch: projection (n, r), noise (b, t); None is drawn."""

    projection: Any = None
    noise: Any = None


class SparseAttention(nn.Module):
    """[k, q] = v W, k / sqrt(n); softmax(q k^T over visible keys) v.

    The parameters belong to the mixer, where the original has them; this only holds the rules.
    """

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings

    def forward(self, mixer, v, padding_mask, draws: Draws, train: bool, collect: dict | None):
        """Attends within v (b, t, e).

        Returns:
          The attention (b, t, e) before the scale E, and the gate loss, a scalar. `collect` receives what
          was decided and the numbers it was decided by.
        """
        n = self.settings.state_size
        key, query = mixer.xx_proj(v).split(n, dim=-1)
        key = key * n**-0.5
        with torch.no_grad():
            masks = [
                self._mask(name, query.detach(), key.detach(), draws, collect)
                for name in self.settings.sources
                if name != "key_selection"
            ]
        gate_loss = torch.zeros((), device=v.device)
        if "key_selection" in self.settings.sources:
            scores = self._key_scores(mixer, query.detach(), key.detach())
            masks.append(running_top(scores.detach(), self.settings.keys_per_source))
            if collect is not None:
                collect |= {"key_score": scores.detach(), "selected": masks[-1]}
            if train:
                gate_loss = self._gate_loss(scores, query, key, padding_mask, draws, collect)
        visible = masks[0]
        for mask in masks[1:]:
            visible = visible | mask
        if collect is not None:
            collect |= {"mask": visible, "Q2": query.detach(), "K2": key.detach()}
        scores = query @ key.transpose(1, 2)
        # The lowest number is added, not put in: where no key is visible all positions weigh the same, and
        # the gradient still passes.
        hidden = torch.zeros((), dtype=scores.dtype, device=v.device).masked_fill(
            ~visible, torch.finfo(scores.dtype).min
        )
        scores = scores + hidden
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(v.dtype, torch.float32))
        return weights.to(v.dtype) @ v, gate_loss

    def _mask(self, name, query, key, draws, collect):
        settings, length = self.settings, query.shape[1]
        i = torch.arange(length, device=query.device)[:, None]
        j = torch.arange(length, device=query.device)
        if name == "full":
            return (j <= i)[None]
        if name == "sliding_window":
            return ((j <= i) & (i - j < settings.keys_per_source))[None]
        if name == "sink":
            return ((j <= i) & (j < settings.keys_per_source))[None]
        if name == "dilated":
            return ((j <= i) & (j % settings.dilation == settings.dilation - 1))[None]
        if draws.projection is None:
            shape = (settings.state_size, settings.num_hash)
            draws.projection = torch.randn(shape, device=query.device, dtype=query.dtype)
        code = sign_code if name == "sign_bin_lsh" else argmax_code
        query_hashed, key_hashed = (hash_features(x) @ draws.projection for x in (query, key))
        codes = code(query_hashed), code(key_hashed)
        if collect is not None:
            collect |= {"query_bin": codes[0], "key_bin": codes[1]}
        same = (codes[0][:, :, None] == codes[1][:, None]) & (j <= i)
        # The number of keys of the bucket from j on: the most recent key has 1.
        recency = same.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
        return same & (recency <= settings.keys_per_source)

    def _key_scores(self, mixer, query, key):
        summary = F.normalize(query.cumsum(1), dim=1)
        x = F.relu(mixer.dx_proj_1(torch.cat([key, summary], dim=-1)))
        return mixer.dx_proj_3(F.relu(mixer.dx_proj_2(x)))[..., 0]

    def _gate_loss(self, scores, query, key, padding_mask, draws, collect):
        wide = torch.promote_types(scores.dtype, torch.float32)
        with torch.no_grad():
            noise = draws.noise
            if noise is None:
                noise = torch.rand(scores.shape, device=scores.device, dtype=wide)
            if padding_mask is not None:
                noise = noise.masked_fill(~padding_mask, -1)
            count = min(self.settings.keys_per_source, noise.shape[1])
            sampled = noise.topk(count, dim=1).indices
            chosen = key.gather(1, sampled[..., None].expand(-1, -1, key.shape[-1]))
            wants = torch.sigmoid((query @ chosen.transpose(1, 2)).to(wide))
            position = torch.arange(noise.shape[1], device=noise.device)
            target = (wants * (position[None, :, None] >= sampled[:, None])).sum(1)
        predicted = scores.gather(1, sampled)
        loss = ranking_loss(predicted.to(wide), target)
        if collect is not None:
            collect |= {"selected_score": predicted.detach(), "selected_target": target, "sampled": sampled}
            collect["layer_gate_loss"] = loss.detach()
        return loss


def hash_features(x):
    """x minus its mean over the row, each feature divided by its norm over the row."""
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def sign_code(hashed):
    """Bit r, worth 2^r, is set where coordinate r is positive."""
    powers = 2 ** torch.arange(hashed.shape[-1], device=hashed.device)
    return ((hashed > 0) * powers).sum(-1)


def argmax_code(hashed):
    """The index of the largest coordinate."""
    return hashed.argmax(-1)


def running_top(scores, count):
    """(b, t, t): whether key j is among the `count` best of 0..i."""
    length = scores.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    table = scores[:, None].expand(-1, length, -1).masked_fill(~past, float("-inf"))
    best = table.topk(min(count, length), dim=-1).indices
    return torch.zeros_like(table, dtype=torch.bool).scatter_(-1, best, True) & past


def ranking_loss(predicted, target):
    """Binary cross-entropy of every ordered pair, its diagonal included, averaged.

    The logit is the difference of two scores, the label 1, 0.5 or 0 for a target above, equal, below.
    """
    difference = predicted[:, :, None] - predicted[:, None]
    above, below = target[:, :, None], target[:, None]
    label = (above > below).to(difference.dtype) + 0.5 * (above == below).to(difference.dtype)
    return F.binary_cross_entropy_with_logits(difference, label)
