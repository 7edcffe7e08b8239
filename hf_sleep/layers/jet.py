"""The Jet block's mixer."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..ops import dynamic_short_convolution
from ..registry import register_block
from .recurrence import GatedDeltaMixer


class KernelGenerator(nn.Module):
    """Generates a convolution's taps from the layer's input: `[B, T, C]` to `[B, T, D, W]`, channel-major."""

    def __init__(self, hidden_size: int, width: int, conv_size: int, reduction: int):
        super().__init__()
        self.conv_size = conv_size
        self.w1 = nn.Linear(hidden_size, max(1, width // reduction), bias=False)
        self.w2 = nn.Linear(self.w1.out_features, width * conv_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x))).unflatten(-1, (-1, self.conv_size))


class DynamicConvolution(nn.Module):
    """Holds the generator under the name that published checkpoints use."""

    def __init__(self, hidden_size: int, width: int, conv_size: int, reduction: int):
        super().__init__()
        self.kernel_generator = KernelGenerator(hidden_size, width, conv_size, reduction)

    def forward(
        self, v: torch.Tensor, x: torch.Tensor, conv_state: torch.Tensor, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return dynamic_short_convolution(v, self.kernel_generator(x), conv_state, lengths)


@register_block("jet")
class Jet(GatedDeltaMixer):
    """Jet: the gated delta rule with a dynamic short convolution on the values alone.

    Args:
        generator_reduction: value width over the tap generator's hidden width.

    Source: Gu et al. 2025 (Jet-Nemotron, arXiv 2508.15884), §3; parameter names as in its checkpoints.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        expand_v: float = 2.0,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        generator_reduction: int = 8,
    ):
        super().__init__(hidden_size, num_heads, head_dim, expand_v, conv_size, norm_eps)
        self.conv_dim = self.value_dim
        self.dynamic_conv1d = DynamicConvolution(hidden_size, self.value_dim, conv_size, generator_reduction)

    def qkv(
        self, x: torch.Tensor, conv_state: torch.Tensor, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        v, conv_state = self.dynamic_conv1d(self.v_proj(x), x, conv_state, lengths)
        return F.silu(self.q_proj(x)), F.silu(self.k_proj(x)), F.silu(v), conv_state

    def draw_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        super().draw_weights(std, generator)
        # Taps that start at zero would let no gradient through: start at "the current token".
        bias = self.dynamic_conv1d.kernel_generator.w2.bias
        identity = torch.zeros_like(bias).view(self.value_dim, self.conv_size)
        identity[:, -1] = 1.0
        init.copy_(bias, identity.flatten())
