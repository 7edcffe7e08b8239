"""Gated DeltaNet."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..ops import short_convolution
from ..registry import register_block
from .recurrence import GatedDeltaMixer


@register_block("gated_delta_net")
class GatedDeltaNet(GatedDeltaMixer):
    """Gated DeltaNet: a static short convolution and SiLU on q, k and v, then the gated delta rule.

    Source: Yang et al. 2025 (arXiv 2412.06464); the paper's choice, Lee et al. 2026, §2.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        expand_v: float = 2.0,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
    ):
        super().__init__(hidden_size, num_heads, head_dim, expand_v, conv_size, norm_eps)
        self.conv_dim = 2 * self.key_dim + self.value_dim
        self.conv_weight = nn.Parameter(torch.zeros(self.conv_dim, conv_size))

    def qkv(
        self, x: torch.Tensor, conv_state: torch.Tensor, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        qkv, conv_state = short_convolution(qkv, self.conv_weight, conv_state, lengths)
        q, k, v = F.silu(qkv).split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
        return q, k, v, conv_state

    def draw_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        super().draw_weights(std, generator)
        # Mostly the current token, so that a fresh layer reads what its projections say.
        taps = torch.empty_like(self.conv_weight).normal_(std=std, generator=generator)
        taps[:, -1] += 1.0
        init.copy_(self.conv_weight, taps)
